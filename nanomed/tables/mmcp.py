"""The tables of the first paper: Chaichuk & Tutubalina, MMCP team at ImageCLEFmed MEDVQA-GI 2024.

Its protocol for Kandinsky 2.2, in the order of the trainings: the decoder at rank 32 for 40 epochs; upon it the prior
at every rank; upon the prior of rank 128 the decoder at every rank; 100 epochs, the checkpoint with the best FID.
"""

from nanomed.tables.rows import (
    CLASSIFIED,
    COPIES,
    F1,
    FID,
    INCEPTION,
    PARAMETERS,
    PRECISION,
    RECALL,
    Column,
    Number,
    Row,
    Table,
    Training,
    Words,
)

FEW = ("--steps", "8", "--batch", "8", "--warmup", "0", "--save_every", "8", "--score_images", "0")
TOY, BASE = (*FEW, "--test_prompts", ""), ("--data", "toy:100")
K2 = ("--model", "kandinsky2", "--precision", "bf16")
K2_TOY = ("--model", "kandinsky2-tiny", *TOY, "--augment", "False")
K3, K3_TOY = ("--model", "kandinsky3", "--precision", "bf16"), ("--model", "kandinsky3-tiny", *TOY)
RANKS = (4, 8, 16, 32, 48, 64, 128)
EPS = ("1e-8", "1e-10", "1e-15")  # of AdamW, that were tried for Kandinsky 3


def _of_rank(stage: str, rank: int, upon: str) -> Training:
    adapter = ("--stage", stage, "--rank", str(rank))
    return Training(f"kandinsky2-{stage}-{rank}", (*K2, *adapter), (*K2_TOY, *adapter), upon)


def _kandinsky3(rank: int, eps: str) -> Training:
    adapter, name = ("--rank", str(rank), "--eps", eps), f"kandinsky3-{rank}" + ("" if eps == EPS[0] else f"-{eps}")
    return Training(name, (*K3, *adapter), (*K3_TOY, "--stage", "unet", *adapter), "", "toy-kandinsky3")


def _of_a_fifth_less(name: str, flags: Words, tiny: Words, *upon: str) -> Training:
    """A training that does not see the fifth of every class which mmcp-4 tests on."""
    return Training(f"held-out-{name}", (*flags, "--valid", "0.2"), (*tiny, "--valid", "0.2"), *upon)


_FIRST, _PRIOR = ("--stage", "decoder", "--rank", "32"), ("--stage", "prior", "--rank", "128")
_DECODER = ("--stage", "decoder", "--rank", "128")
MSDM = ("--model", "msdm", "--precision", "bf16"), ("--model", "msdm-tiny", *TOY)
TRAININGS = (
    Training("toy-kandinsky2", (), ("--model", "kandinsky2-tiny", *TOY, *BASE)),
    Training("toy-kandinsky3", (), ("--model", "kandinsky3-tiny", *TOY, *BASE)),
    Training("kandinsky2-first", (*K2, *_FIRST, "--epochs", "40"), (*K2_TOY, *_FIRST), "", "toy-kandinsky2"),
    *(_of_rank("prior", rank, "kandinsky2-first") for rank in RANKS),
    *(_of_rank("decoder", rank, "kandinsky2-prior-128") for rank in RANKS),
    *(_kandinsky3(rank, EPS[0]) for rank in (4, 128)),
    *(_kandinsky3(4, eps) for eps in EPS[1:]),
    Training("msdm", *MSDM),
    *(_of_a_fifth_less(*parts) for parts in (
        ("first", (*K2, *_FIRST, "--epochs", "40"), (*K2_TOY, *_FIRST), "", "toy-kandinsky2"),
        ("prior", (*K2, *_PRIOR), (*K2_TOY, *_PRIOR), "held-out-first"),
        ("decoder", (*K2, *_DECODER), (*K2_TOY, *_DECODER), "held-out-prior"),
        ("msdm", *MSDM),
    )),
)  # fmt: skip
DRAWN, DRAWN_TOY = ("--steps", "150"), ("--steps", "4", "--batch", "64")  # decoder steps; of the prior its own 25

_CLIPS = "gradients are clipped at 1, as the code means to and does not (its list of parameters is empty)"
_PADS = "images are padded for CLIP as for MoVQ; the code crops them for CLIP"
_NOISE = "the prior's own noise in its loss; the code takes the decoder's"
_PAPER = "Chaichuk & Tutubalina 2024"
# 327,680 and 205,824 parameters a rank; the paper prints the prior's rank 48 as 15,728,649, a misprint.
_SIZES = {"prior": {4: 1_310_720, 48: 15_728_649, 128: 41_943_040}, "decoder": {4: 823_296, 128: 26_345_472}}


def _rank_row(stage: str, rank: int) -> Row:
    size, table = _SIZES[stage].get(rank), {"prior": 1, "decoder": 2}[stage]
    misprint = " (a misprint: 327,680 x 48 is 15,728,640)" if size == 15_728_649 else ""
    paper = {PARAMETERS: Number(size, f"{_PAPER}, Table {table}{misprint}")} if size else {}
    follows = "; ".join((_CLIPS, _PADS, *((_NOISE,) if stage == "prior" else ())))
    return Row(f"{stage}-{rank}", f"Kandinsky 2.2, {stage} of rank {rank}", f"kandinsky2-{stage}-{rank}", DRAWN,
               paper=paper, follows=follows)  # fmt: skip


def _k3_row(rank: int, eps: str) -> Row:
    name = _kandinsky3(rank, eps).name
    return Row(name, f"Kandinsky 3, rank {rank}, eps {eps}", name, DRAWN,
               follows=f"{_CLIPS}; T5 with its mask and the scale 4, which the pipeline writes as 3")  # fmt: skip


_MSDM = Row(
    "msdm", "MSDM", "msdm", ("--minmax",),
    paper={PARAMETERS: Number(326_000_000, f"{_PAPER}, which prints 326 M"),
           "FID": Number(35, f"{_PAPER}, at 100,000 steps")},
    follows="100,000 steps of the U-Net, which the paper's FID of 35 is of; latents scaled, EMA and self-conditioning "
    "on, which the code has off; images stretched one by one, as its code",
)  # fmt: skip
_RANGE = "The paper's development FIDs run from 33.6 to 66.9; which number is which row's is not known here."
_RANKS = "Of the twenty ranks in the paper's Tables 1 and 2, 4, 48 and 128 are known here; others here lie between. "
_ALL = ("--metrics", "fid,pr,colour,memorisation")
_DEVELOPMENT = (Column(PARAMETERS, ()), FID, PRECISION, RECALL, F1, COPIES)
_TOY_DATA = "toy:24"

TABLES = (
    Table(
        "mmcp-1", "LoRA rank of Kandinsky 2.2's prior, and of Kandinsky 3", _DEVELOPMENT,
        (*(_rank_row("prior", rank) for rank in RANKS), *(_k3_row(rank, EPS[0]) for rank in (4, 128)),
         *(_k3_row(4, eps) for eps in EPS[1:])),
        "clef", "mmcp", _ALL, _TOY_DATA, _ALL,
        f"{_RANKS}{_RANGE} The paper gives no count of parameters for Kandinsky 3.",
    ),
    Table(
        "mmcp-2", "LoRA rank of Kandinsky 2.2's decoder, and MSDM", _DEVELOPMENT,
        (*(_rank_row("decoder", rank) for rank in RANKS), _MSDM), "clef", "mmcp", _ALL, _TOY_DATA, _ALL,
        f"{_RANKS}{_RANGE} In which table it has MSDM's is not known here, either.",
    ),
    Table(
        "mmcp-3", "The official protocol: the organisers' script, single, multi and both",
        (*(Column(f"FID {name}", (f"FID [{name}]", *also)) for name, also in
           (("single", ()), ("multi", ()), ("both", ("FID",)))), Column("IS", ("IS [single]", "IS"))),
        (Row("kandinsky2", "Kandinsky 2.2, ranks 128 and 128", "kandinsky2-decoder-128", DRAWN),
         Row("msdm", "MSDM", "msdm", ("--minmax",))),
        "clef", "mmcp", ("--protocol", "imageclef2024"), _TOY_DATA,
        ("--protocol", "imageclef2024", "--inception", INCEPTION, "--limit", "24"),
        "The paper's FIDs here are between 0.06 and 0.12 and no other table's: they are of class probabilities "
        "(nanomed/evaluation/README.md). Single, multi and both are its rows, and its IS is the same in all three. The "
        "organisers' 5,000 test prompts are not public: drawn are the 2,000 of the other tables.",
        official=True,
    ),
    Table(
        "mmcp-4", "Generated images as training data for a classifier", CLASSIFIED,
        (Row("kandinsky2", "Kandinsky 2.2, ranks 128 and 128", "held-out-decoder", DRAWN),
         Row("msdm", "MSDM", "held-out-msdm", ("--minmax",))),
        "clefclasses", "medart", ("--metrics", "classify"), "toyclasses:120",
        ("--metrics", "classify", "--classifier", "tiny"),
        "How the paper did this is not known here. Here a ViT learns to tell polyps from no polyps, from generated "
        "or real training images, and is tested on the real images of one fifth that was held out.",
    ),
)  # fmt: skip
