"""Captions by language models.

python -m nanomed.captions vsg folder:DIR --out captions.csv --model llava-llama3 --modality endoscopy
python -m nanomed.captions simplify captions.csv --model t5-large
python -m nanomed.captions paraphrase prompt-gt.csv --model weights/Qwen/Qwen2.5-7B-Instruct --out paraphrases.csv
python -m nanomed.captions train --out weights/captioner-tiny         the same as train.py --model captioner-tiny

`vsg` and `paraphrase` go on where they were stopped, and under torchrun their processes share the work.
"""

import csv
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from nanomed import weights
from nanomed.captions import paraphrase as rules
from nanomed.captions import rewording, vsg
from nanomed.captions.journal import Journal
from nanomed.captions.networks import t5
from nanomed.data import ranges
from nanomed.data.table import TEXT_COLUMNS, DataError, column, read_csv
from nanomed.run import files, flags
from nanomed.run.flags import UsageError
from nanomed.run.progress import Progress, progress
from nanomed.run.ranks import Ranks
from nanomed.text.unigram import T5Tokenizer

REPOSITORIES = {
    "llava-llama3": "lmms-lab/llama3-llava-next-8b",  # what Med-Art's released code asked
    "llava-mistral": "llava-hf/llava-v1.6-mistral-7b-hf",
    "ovis": "AIDC-AI/Ovis1.6-Gemma2-9B",
    "ovis2": "AIDC-AI/Ovis2-8B",
    "tiny": "captioner-tiny",
    "t5-large": "google-t5/t5-large", "t5-base": "google-t5/t5-base", "t5-small": "google-t5/t5-small",
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Vsg:
    """Flags of `vsg`."""

    out: Annotated[str, "a file to write"] = "captions.csv"  # captions; all that is known of the images is in OUT.jsonl
    model: str = "llava-llama3"  # llava-llama3, llava-mistral, ovis, ovis2, tiny, or the folder of a model
    modality: str = "endoscopy"  # endoscopy, skin, xray, fundus or microscopy
    simplifier: str = ""  # T5 that shortens what is too long: t5-large (the paper's), a folder; empty: ask again
    tokenizer: str = ""  # folder of T5's tokenizer that counts; empty: the simplifier's, PixArt's or t5-small's
    range: str = ""  # auto | BITS | LOW:HIGH: black and white of images with more than 8 bits, as of train.py
    count: Annotated[str, "t5 | captioner"] = "t5"  # whose tokens; the released code counts the captioner's
    limit: Annotated[int, "1 .. 10^6"] = vsg.LIMIT  # tokens that a caption may have
    attempts: Annotated[int, "1 .. 10000"] = 10  # answers drawn for an image at most
    batch: Annotated[int, "1 .. 65536"] = 4  # images asked about together
    precision: Annotated[str, "fp32 | bf16 | fp16"] = "bf16"  # of the weights
    int8: bool = False  # the language model in whole numbers, row by row: half of bf16's memory, near its answers
    place: Annotated[str, "device | cpu | share"] = "device"  # of its layers; cpu: one by one; share: by process
    compile: bool = False  # let torch.compile fuse what it can: a minute at first, faster then
    seed: Annotated[int, "0 ..< 2^63"] = 0  # of all the answers
    device: str = ""  # cuda, cuda:1, mps or cpu; empty: the best there is
    review: bool = False  # also write OUT.html, image beside caption
    dry_run: bool = False  # say what memory it takes, by arithmetic, and end


@dataclass
class Simplify:
    """Flags of `simplify`."""

    model: str = "t5-large"  # or a folder of a T5
    out: Annotated[str, "a file to write"] = ""  # empty: FILE.simplified.csv
    limit: Annotated[int, "1 .. 10^6"] = vsg.LIMIT  # only what has more tokens is shortened, and to no more than these
    batch: Annotated[int, "1 .. 65536"] = 8  # captions at a time
    device: str = ""  # as of vsg


@dataclass
class Paraphrase:
    """Flags of `paraphrase`."""

    out: Annotated[str, "a file to write"] = "paraphrases.csv"  # what became of each prompt is in OUT.jsonl
    model: str = "grammar"  # folder of a Llama 3, Mistral, Qwen 2.5 or Gemma 2 Instruct; grammar: by rules, no model
    count: Annotated[int, "1 .. 1000"] = 10  # paraphrases of a prompt
    attempts: Annotated[int, "1 .. 10000"] = 40  # answers drawn for a prompt at most
    judge: str = rewording.JUDGE  # folder of the text encoder, CLIP or T5, for prompts that are not of the grammar
    agreement: Annotated[float, "0 .. 1"] = 0.8  # cosine of a prompt and a paraphrase there, at least
    batch: Annotated[int, "1 .. 65536"] = 10  # answers drawn together
    precision: Annotated[str, "fp32 | bf16 | fp16"] = "bf16"  # of the model's weights
    int8: bool = False  # as of vsg
    place: Annotated[str, "device | cpu | share"] = "device"  # as of vsg
    compile: bool = False  # as of vsg
    seed: Annotated[int, "0 ..< 2^63"] = 0  # of all the answers
    device: str = ""  # as of vsg


@dataclass
class Train:
    """Flags of `train`, and of train.py where --model is captioner-tiny."""

    model: Annotated[str, "captioner-tiny"] = "captioner-tiny"  # the one that there is
    out: Annotated[str, "a folder to write"] = "weights/captioner-tiny"  # folder of the captioner
    steps: Annotated[int, "1 .. 10^9"] = 500  # of the optimizer
    batch: Annotated[int, "1 .. 65536"] = 32  # scenes at a time
    scenes: Annotated[int, "1 .. 10^6"] = 3000  # of the toy world
    lr: Annotated[float, "> 0"] = 2e-3  # the largest learning rate; it rises over 100 steps and falls by a cosine
    seed: Annotated[int, "0 ..< 2^63"] = 0  # of weights and batches
    device: str = ""  # cuda, cuda:1, mps or cpu; empty: the best there is


def main() -> int:
    """Hand the words behind the verb to the function of the verb."""
    words = sys.argv[1:]
    verbs = {"vsg": write_captions, "simplify": simplify, "paraphrase": paraphrase, "train": train}
    if not words or words[0] not in verbs:
        if words and words[0] in ("-h", "--help"):
            print(__doc__)
            return 0
        raise UsageError(f"say {', '.join(verbs)}; python -m nanomed.captions VERB --help tells more")
    return verbs[words[0]](words[1:])


def subject(words: list[str], what: str) -> tuple[str, list[str]]:
    """The word that stands first, unless help is asked for."""
    if words and words[0] in ("-h", "--help"):
        return "", words
    if not words or words[0].startswith("-"):
        raise UsageError(f"{what} is to stand first")
    return words[0], words[1:]


@torch.no_grad()
def write_captions(words: list[str]) -> int:
    """`vsg`: ask about every image until an answer is kept, and write what is kept."""
    spec, words = subject(words, "a data set such as folder:DIR")
    config = flags.parse(Vsg, words, description="Captions of a data set's images.")
    vsg.question(config.modality, "")
    checked(config)
    ranks = Ranks.join(config.device)
    ranges.judge(config.range)
    pictures = vsg.pictures(spec, span=config.range)
    if config.dry_run:
        from nanomed.captions import sizes

        network = sizes.sketch(config.model, REPOSITORIES.get(config.model, config.model))
        if ranks.first:
            job = sizes.Job(len(pictures), config.batch, vsg.SAMPLING["max_new_tokens"], max(ranks.world, 2))
            print(sizes.report(config.model, network, DTYPES[config.precision], job))
        return 0
    reviewed = Path(config.out).with_name(Path(config.out).name + ".html")
    if config.review:
        files.expect_own(reviewed)
    path = _found(config.model)
    shortener = _t5(config.simplifier, ranks.device) if config.simplifier else None
    model = loaded(path, config, ranks)
    model.ask("")
    own = config.count == "captioner" or (model.prompt and not config.tokenizer)  # a miniature brings no T5 along
    count = model.count if own else _counter(config.tokenizer, shortener)
    settings = dict(data=spec, model=config.model, modality=config.modality, simplifier=config.simplifier,
                    count=config.count, limit=config.limit, attempts=config.attempts, precision=config.precision,
                    int8=config.int8, seed=config.seed)  # fmt: skip
    settings |= {"range": config.range} if config.range else {}
    journal = vsg.Journal(config.out, settings)

    def judged(opening: str, features: str) -> vsg.Rules:
        return vsg.Rules(opening, features, count, config.limit, shortener and _shorten(shortener, config.limit))

    named = {picture.name: picture for picture in pictures}
    bar = Progress(len(pictures), "captions", "image")
    for names in journal.open(list(named), ranks, config.batch):
        bar.update(len(journal.known) - bar.done)  # the others' among them
        batch = [named[name] for name in names]
        for result in vsg.caption(model, batch, config.modality, judged, config.attempts, config.seed):
            journal.append(result)
    bar.update(len(journal.known) - bar.done)
    bar.close()
    model.finish()
    ranks.barrier()
    if ranks.first:
        journal.write_csv()
        found = journal.results()
        results = [found[picture.name] for picture in pictures if picture.name in found]
        print(vsg.statistics(results))
        if config.review:
            from nanomed.captions.review import page

            files.write_text(reviewed, page(results, pictures, Path(config.out)))
            files.mark_own(reviewed)
    return 0


def _found(name: str) -> Path:
    """The folder of a captioner."""
    try:
        return weights.find(REPOSITORIES.get(name, name))
    except weights.WeightsNotFound:
        if "captioner-tiny" not in (REPOSITORIES.get(name), Path(name).name):
            raise
        raise weights.WeightsNotFound(f"{name} is not there: python train.py --model captioner-tiny makes it") from None


def _t5(name: str, device: torch.device) -> t5.Shortener:
    return t5.load(REPOSITORIES.get(name, name), device=device)


def _counter(folder: str, shortener: t5.Shortener | None):
    """Counts T5's tokens, the end included."""
    if shortener and not folder:
        return lambda text: shortener.tokenizer.lengths([text])[0]
    places = [folder] if folder else TOKENIZERS
    for place in places:
        try:
            found = weights.find(place)
        except weights.WeightsNotFound:
            continue
        tokenizer = T5Tokenizer.from_folder(found / "tokenizer" if (found / "tokenizer").is_dir() else found)
        return lambda text: tokenizer.lengths([text])[0]
    raise UsageError(f"no T5 tokenizer in {', '.join(places)}, to count a caption's tokens: say --tokenizer FOLDER, or "
                     f"--count captioner")  # fmt: skip


TOKENIZERS = ("PixArt-alpha/PixArt-XL-2-512x512", "google-t5/t5-large", "google-t5/t5-small")


def _shorten(shortener: t5.Shortener, limit: int):
    """Med-Art's call: four beams, 90 to 120 tokens (three quarters of the limit, and the limit)."""
    return lambda text: shortener.generate([f"simplify: {text}"], beams=4, min_length=limit * 3 // 4,
                                           max_length=limit, early_stopping=True)[0]  # fmt: skip


@torch.inference_mode()
def simplify(words: list[str]) -> int:
    """`simplify`: shorten the captions of a CSV that have more tokens than the limit."""
    name, words = subject(words, "a CSV file with captions")
    config = flags.parse(Simplify, words, description="Captions shortened by a T5.")
    path = Path(name)
    records = read_csv(path)
    text = column(records[0][1], TEXT_COLUMNS) if records else None
    if text is None:
        raise DataError(f"{path}: no rows with a column {' or '.join(TEXT_COLUMNS[:2])}")
    target = Path(config.out) if config.out else path.with_suffix(".simplified.csv")
    files.expect_own(target)
    shortener = _t5(config.model, Ranks.join(config.device).device)
    lengths = shortener.tokenizer.lengths([record[text] for _, record in records])
    long = [i for i, length in enumerate(lengths) if length > config.limit]
    for start in progress(range(0, len(long), config.batch), "simplifying", "batch"):
        rows = long[start : start + config.batch]
        asked = [f"simplify: {records[i][1][text]}" for i in rows]
        short = shortener.generate(asked, beams=4, min_length=config.limit * 3 // 4, max_length=config.limit,
                                   early_stopping=True)  # fmt: skip
        for i, written in zip(rows, short):
            records[i][1][text] = written
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(records[0][1]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(record for _, record in records)
    files.write_text(target, out.getvalue())
    files.mark_own(target)
    print(f"{target}: {len(long):,} of {len(records):,} captions shortened")
    return 0


@torch.no_grad()
def paraphrase(words: list[str]) -> int:
    """`paraphrase`: draw other wordings of every prompt, and write those that are kept."""
    source, words = subject(words, "a file of prompts, or a data set such as clef:DIR,")
    config = flags.parse(Paraphrase, words, description="Prompts in other words.")
    if config.model == "grammar":
        return rules.main([source, "--out", config.out, "--n", str(config.count)])
    checked(config)
    prompts = [prompt for prompt in dict.fromkeys(rules.read_source(source)) if prompt]
    if not prompts:
        raise DataError(f"{source}: no prompts")
    ranks = Ranks.join(config.device)
    path = weights.find(config.model)
    encoder = None
    if not all(map(rewording.in_grammar, prompts)):
        encoder = rewording.Encoder(config.judge, prompts, ranks.device)
    settings = dict(source=source, model=config.model, count=config.count, attempts=config.attempts, seed=config.seed,
                    judge=config.judge, agreement=config.agreement, precision=config.precision,
                    int8=config.int8)  # fmt: skip
    model = loaded(path, config, ranks)
    model.say("")
    journal = Journal(config.out, settings, key="prompt")
    judged = rewording.Rules(encoder and encoder.agree, config.agreement)
    effort = rewording.Effort(config.count, config.attempts, config.batch, config.seed)
    bar = Progress(len(prompts), "paraphrases", "prompt")
    for (prompt,) in journal.open(prompts, ranks, 1):
        bar.update(len(journal.known) - bar.done)
        journal.append(rewording.reword(model, prompt, judged, effort))
    bar.update(len(journal.known) - bar.done)
    bar.close()
    model.finish()
    ranks.barrier()
    if ranks.first:
        rewording.write_csv(journal, prompts)
        found = journal.records()
        records = [found[prompt] for prompt in prompts if prompt in found]
        print(f"{config.out}: {rewording.statistics(records, config.count)}")
        if any(record["refused"] for record in records):
            print(f"every refused answer, with its reason: {journal.path}")
    return 0


def loaded(path: Path, config: Vsg | Paraphrase, ranks: Ranks):
    """The model of a folder, where and as the flags want it."""
    from nanomed.captions import memory, models

    model = models.load(path, DTYPES[config.precision], ranks.device, config.int8, config.place, ranks)
    if config.compile:
        memory.compiled(model.writer)
    return model


def checked(config: Vsg | Paraphrase) -> None:
    """Refuse flags that exclude each other."""
    if config.int8 and config.place == "share":
        raise UsageError("--place share is for weights as they are, not for whole numbers: leave out --int8")


def train(words: list[str]) -> int:
    """Also what train.py does where --model is captioner-tiny."""
    config = flags.parse(Train, words, description="A captioner in miniature, trained on the toy world.")
    flags.check_place(f"--out {config.out}", config.out, folder=True)
    from nanomed.captions import tiny

    tiny.expect_free(config.out)
    ranks = Ranks.join(config.device)
    if ranks.world > 1:
        raise UsageError("the captioner in miniature trains in one process: leave out torchrun")

    def bar(steps):
        return progress(steps, "training", "step")

    model = tiny.train(tiny.Recipe(config.steps, config.batch, config.scenes, config.lr, config.seed), bar,
                       ranks.device)  # fmt: skip
    tiny.save(model, config.out)
    with torch.inference_mode():
        right, same = tiny.accuracy(model)
    print(f"{config.out}: {right:.1%} of the attributes that it names are right, {same:.1%} of the captions are exact")
    return 0


if __name__ == "__main__":
    flags.main(main)
