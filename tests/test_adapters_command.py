"""Adapters come and go: `--lora` of sample.py, train.py and nanomed.load, and `python -m nanomed.adapters`, against the
images of diffusers and peft on miniatures in the published layout."""

import copy
import json
import shutil
import sys
from pathlib import Path

import diffusers
import peft
import pytest
import test_kandinsky2_pipeline as kandinsky2
import test_pixart_pipeline as pixart
import torch
from conftest import close
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import nanomed
from nanomed import systems
from nanomed.adapters import formats, lora, onto
from nanomed.adapters.__main__ import main
from nanomed.run import flags
from nanomed.run.flags import UsageError
from nanomed.weights import WeightsError, WeightsNotFound

CLOSE = 1e-4  # images in [0, 1]


@pytest.fixture(scope="module")
def pixart_folder(tmp_path_factory) -> Path:
    return pixart.miniature(tmp_path_factory.mktemp("pixart") / "PixArt-alpha" / "mini", 32)


@pytest.fixture(scope="module")
def kandinsky_folder(tmp_path_factory) -> Path:
    return kandinsky2.miniature(tmp_path_factory.mktemp("kandinsky"))


def stir(module, by: float = 0.1) -> None:
    """Give an adapter's tensors values that show in an image."""
    torch.manual_seed(3)
    with torch.no_grad():
        for param in lora.parameters(module) if lora.adapted(module) else []:
            param.add_(by * torch.randn_like(param))


@torch.no_grad()
def drawn(system) -> torch.Tensor:
    return system.sample(pixart.PROMPTS, pixart.Draws(2), steps=4, height=64, width=64, binning=False)


@torch.no_grad()
def diffusers_draws(folder: Path, change=lambda pipe: None) -> torch.Tensor:
    pipe = pixart.pipeline(folder)
    change(pipe)
    return pipe(pixart.PROMPTS, "", latents=pixart.Draws(2).randn(4, 8, 8), num_inference_steps=4, height=64, width=64,
                output_type="pt", clean_caption=False, use_resolution_binning=False).images  # fmt: skip


def diffusers_reads(network, file: Path, part: str) -> None:
    """As its pipelines read a file: tensors and header, then each part its own."""
    state, alphas, metadata = diffusers.StableDiffusionPipeline.lora_state_dict(file, return_lora_metadata=True)
    assert not alphas and metadata
    network.load_lora_adapter(state, prefix=part, metadata=metadata)


@pytest.fixture(scope="module")
def theirs(pixart_folder, tmp_path_factory):
    """One adapter of peft on diffusers' transformer, in three scripts' layouts, and what diffusers draws with it at
    full weight and at 0.8."""
    out = tmp_path_factory.mktemp("theirs")
    transformer = diffusers.PixArtTransformer2DModel.from_pretrained(pixart_folder / "transformer")
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj"])
    torch.manual_seed(7)
    wrapped = peft.get_peft_model(copy.deepcopy(transformer), config)
    with torch.no_grad():
        for name, param in wrapped.named_parameters():
            if "lora_" in name:
                param.add_(0.1 * torch.randn_like(param))
    wrapped.save_pretrained(out / "peft")
    state = get_peft_model_state_dict(wrapped)
    plain = {k.removeprefix("base_model.model."): v.contiguous() for k, v in state.items()}
    about = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    header = {LORA_ADAPTER_METADATA_KEY: json.dumps({f"transformer.{k}": v for k, v in about.items()}, default=str)}
    (out / "diffusers").mkdir()
    save_file({f"transformer.{k}": v for k, v in plain.items()},
              out / "diffusers" / "pytorch_lora_weights.safetensors", header | {"format": "pt"})  # fmt: skip
    kohya = {}
    for key, tensor in plain.items():
        layer, _, factor = key.removesuffix(".weight").rpartition(".lora_")
        place = f"lora_unet_{layer.replace('.', '_')}"
        kohya[f"{place}.{ {'A': 'lora_down', 'B': 'lora_up'}[factor]}.weight"] = tensor
        kohya[f"{place}.alpha"] = torch.tensor(6.0)
    save_file(kohya, out / "anything.safetensors")

    def with_theirs(pipe) -> None:
        pipe.transformer = wrapped.base_model.model

    images = {}
    for weight in (1.0, 0.8):
        for layer in wrapped.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                layer.set_scale("default", weight)
        images[weight] = diffusers_draws(pixart_folder, with_theirs)
    images[0.0] = diffusers_draws(pixart_folder)
    assert min((images[a] - images[b]).abs().max() for a, b in ((1.0, 0.8), (1.0, 0.0), (0.8, 0.0))) > 0.005
    return out, images


@pytest.mark.parametrize("name", ["peft", "diffusers", "anything.safetensors"])
def test_files_of_three_layouts_draw_what_diffusers_draws(name, theirs, pixart_folder):
    """peft's folder, the folder of diffusers' scripts and kohya's keys; at two weights."""
    out, images = theirs
    for given, weight in ((f"{out / name}", 1.0), (f"{out / name}=0.8", 0.8)):
        system = nanomed.load("pixart", weights=pixart_folder, lora=given)
        close(drawn(system), images[weight], CLOSE)
        assert not lora.adapted(system.transformer) and system.loras[0]["weight"] == weight


def test_several_are_added_up_and_part_names_are_not_needed(theirs, pixart_folder, tmp_path):
    """0.3 and 0.5 of one adapter are 0.8 of it; the oldest files, and those with PEFT's own keys, name no part."""
    out, images = theirs
    system = nanomed.load("pixart", weights=pixart_folder, lora=f"{out / 'peft'}=0.3,{out / 'anything.safetensors'}=.5")
    close(drawn(system), images[0.8], CLOSE)
    bare = {k.removeprefix("transformer."): v
            for k, v in load_file(out / "diffusers" / "pytorch_lora_weights.safetensors").items()}  # fmt: skip
    save_file(bare, tmp_path / "a=b,c.safetensors")  # a name that looks like a list of weights
    system = nanomed.load("pixart", weights=pixart_folder, lora=f"{tmp_path / 'a=b,c.safetensors'}")
    system_at = nanomed.load("pixart", weights=pixart_folder, lora=f"{out / 'peft'}={4 / 6}")  # no alpha: the rank
    close(drawn(system), drawn(system_at), CLOSE)


REFUSED = {
    "LoHa": {"lora_unet_x.hada_w1_a": 1, "lora_unet_x.hada_w1_b": 1, "lora_unet_x.alpha": 0},
    "LoKr": {"lora_unet_x.lokr_w1": 1},
    "OFT": {"lora_unet_x.oft_blocks": 1},
    "IA3": {"lora_unet_x.weight": 1, "lora_unet_x.on_input": 0},
    "DyLoRA": {"lora_unet_x.lora_A.0": 1, "lora_unet_x.lora_B.0": 1},
    "differences": {"lora_unet_x.diff": 1, "lora_unet_x.diff_b": 1},
    "Tucker": {"lora_unet_x.lora_mid.weight": 1, "lora_unet_x.lora_up.weight": 1, "lora_unet_x.lora_down.weight": 1},
    "no adapter": {"blocks.0.weight": 1},
    "no place in": {"lora_unet_x.lora_up.weight": 1, "lora_unet_x.lora_down.weight": 1},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_adapters_of_other_kinds_are_named(kind, pixart_folder, tmp_path):
    save_file({k: torch.ones([2] * dims) for k, dims in REFUSED[kind].items()}, tmp_path / "x.safetensors")
    system = nanomed.load("pixart", weights=pixart_folder)
    before = drawn(system)
    with pytest.raises(WeightsError, match=kind) as error:
        system.add_lora(str(tmp_path / "x.safetensors"))
    assert "x.safetensors" in str(error.value) and "\n" not in str(error.value)
    assert torch.equal(drawn(system), before)


@pytest.mark.parametrize("given, kind, message", [
    ("nowhere.safetensors", WeightsNotFound, "no such file"),
    ("HERE=much", UsageError, "must be a number"),
    ("HERE=nan", UsageError, "say FILE"),
    ("HERE,", UsageError, "say FILE"),
    ("", UsageError, "say FILE"),
    ("x" * 5000, WeightsNotFound, "no such file"),
    ("EMPTY", WeightsNotFound, "holds no adapter"),
    ("TWO", WeightsError, "name one"),
    ("PEFTFILE", WeightsNotFound, "adapter_config.json"),
])  # fmt: skip
def test_what_cannot_be_found_or_read_is_said(given, kind, message, theirs, tmp_path):
    (tmp_path / "e").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "p").mkdir()
    for name in "ab":
        save_file({"x": torch.ones(1)}, tmp_path / "two" / f"{name}.safetensors")
    save_file({"base_model.model.x.lora_A.weight": torch.ones(1, 1)}, tmp_path / "p" / "adapter_model.safetensors")
    places = {"HERE": theirs[0] / "peft", "EMPTY": tmp_path / "e", "TWO": tmp_path / "two",
              "PEFTFILE": tmp_path / "p" / "adapter_model.safetensors"}  # fmt: skip
    for name, place in places.items():
        given = given.replace(name, str(place))
    with pytest.raises(kind, match=message):
        onto.fold(given, {"net": torch.nn.Sequential(torch.nn.Linear(2, 2))})


# ------------------------------------------------------------------------------------------------ from format to format


@pytest.fixture
def run(pixart_folder, tmp_path):
    """A saved system with an adapter that was trained, as train.py leaves it: make(kind) -> (folder, its image)."""

    def make(kind: str = "lora", name: str = "pixart", rank: int = 3) -> tuple[Path, torch.Tensor]:
        system = systems.build(name, str(pixart_folder))
        stage = [*system.stages][-1]
        system.adapt(stage, rank, 5.0, kind)
        for part in system.stages[stage]:
            stir(system.get_submodule(part))
        system.save(tmp_path / "run")
        return tmp_path / "run", drawn(system.eval())

    return make


@pytest.mark.parametrize("kind", lora.KINDS)
@pytest.mark.parametrize("to", ["peft", "diffusers", "kohya"])
def test_a_round_trip_is_exact_to_the_last_bit(kind, to, run, pixart_folder, tmp_path, capsys):
    folder, _ = run(kind)
    assert main([str(folder), "--to", to, "--out", str(tmp_path / "out")]) == 0
    written = Path(capsys.readouterr().out.strip())
    before, after = (nanomed.load("pixart", weights=pixart_folder).transformer for _ in range(2))
    formats.load_peft(folder / "transformer_lora", before)
    assert onto.attach(onto.sources(written)[0], {"text_encoder": torch.nn.Linear(2, 2), "transformer": after}) == [
        "transformer"
    ]
    first, second = lora.state(before), lora.state(after)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    for name, layer in lora.layers_of(before).items():
        assert torch.equal(layer.merged_weight(), after.get_submodule(name).merged_weight())


def test_diffusers_and_peft_draw_the_same_from_what_is_written(run, pixart_folder, tmp_path):
    folder, ours = run()
    main([str(folder), "--to", "diffusers", "--out", str(tmp_path / "d.safetensors")])
    main([str(folder), "--to", "peft", "--out", str(tmp_path / "p")])
    assert (ours - diffusers_draws(pixart_folder)).abs().max() > 0.005

    class Reads(diffusers.PixArtTransformer2DModel, PeftAdapterMixin):
        """diffusers' own reader of its format, which it has not yet given to PixArt."""

    def with_file(pipe) -> None:
        pipe.transformer = Reads.from_pretrained(pixart_folder / "transformer")
        diffusers_reads(pipe.transformer, tmp_path / "d.safetensors", "transformer")

    close(diffusers_draws(pixart_folder, with_file), ours, CLOSE)
    close(diffusers_draws(pixart_folder, lambda pipe: setattr(
        pipe, "transformer", peft.PeftModel.from_pretrained(pipe.transformer, tmp_path / "p").merge_and_unload()
    )), ours, CLOSE)  # fmt: skip


def test_bf16_is_half_as_large_and_read_again(run, pixart_folder, tmp_path):
    folder, ours = run()
    main([str(folder), "--to", "kohya", "--out", str(tmp_path / "k.safetensors"), "--dtype", "bf16"])
    tensors = load_file(tmp_path / "k.safetensors")
    assert {t.dtype for k, t in tensors.items() if "alpha" not in k} == {torch.bfloat16}
    system = nanomed.load("pixart", weights=pixart_folder, lora=str(tmp_path / "k.safetensors"))
    close(drawn(system), ours, 0.05)


# ------------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("name, kind", [("pixart", "dora"), ("medart", "lora")])
def test_pixart_and_medart_merged_are_a_pipeline_of_diffusers(name, kind, run, pixart_folder, tmp_path):
    """The transformer and, of Med-Art, T5. What did not change is the published file."""
    folder, ours = run(kind, name)
    base = pixart_folder if name == "pixart" else pixart_folder.parents[1]  # itself, or where ORG/NAME lies
    assert main([str(folder), "--merge", "--out", str(tmp_path / "whole"), "--weights", str(base)]) == 0
    close(diffusers_draws(tmp_path / "whole"), ours, CLOSE)
    assert (ours - diffusers_draws(pixart_folder)).abs().max() > 0.005
    close(drawn(nanomed.load("pixart", weights=tmp_path / "whole")), ours, CLOSE)
    inside = {str(p.relative_to(pixart_folder)) for p in pixart_folder.rglob("*") if p.is_file()}
    assert {str(p.relative_to(tmp_path / "whole")) for p in (tmp_path / "whole").rglob("*") if p.is_file()} == inside
    with pytest.raises(UsageError, match="is there already"):  # never over what is there
        main([str(folder), "--merge", "--out", str(tmp_path / "whole")])


def test_kandinsky_merged_is_two_pipelines_of_diffusers(kandinsky_folder, tmp_path, capsys):
    system = systems.build("kandinsky2", str(kandinsky_folder))
    for stage, part in (("prior", system.prior), ("decoder", system.unet)):
        system.adapt(stage, 2)
        stir(part, 0.05)  # at three times as much the random networks amplify rounding without bound
    system.save(tmp_path / "run")
    command = [str(tmp_path / "run"), "--merge", "--weights", str(kandinsky_folder), "--out", str(tmp_path / "whole")]
    assert main(command) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "whole" / f"kandinsky-2-2-{part}") for part in ("prior", "decoder")
    ]
    with torch.no_grad():
        merged = kandinsky2.reference(kandinsky2.pipelines(tmp_path / "whole", torch.float32), kandinsky2.PROMPTS,
                                      **kandinsky2.SETTINGS)  # fmt: skip
        plain = kandinsky2.reference(kandinsky2.pipelines(kandinsky_folder, torch.float32), kandinsky2.PROMPTS,
                                     **kandinsky2.SETTINGS)  # fmt: skip
        ours = kandinsky2.ours(system.eval(), kandinsky2.PROMPTS, **kandinsky2.SETTINGS)
        assert kandinsky2.excess(ours, merged, latents=1e-4) <= 1 < 10 < kandinsky2.excess(plain, merged, latents=1e-4)
        # each part's adapter alone, through diffusers' own reader
        file = tmp_path / "d.safetensors"
        assert main([str(tmp_path / "run"), "--to", "diffusers", "--out", str(file)]) == 0
        first, second = kandinsky2.pipelines(kandinsky_folder, torch.float32)
        diffusers_reads(first.prior, file, "prior")
        diffusers_reads(second.unet, file, "unet")
        theirs = kandinsky2.reference((first, second), kandinsky2.PROMPTS, **kandinsky2.SETTINGS)
        assert kandinsky2.excess(ours, theirs, latents=1e-4) <= 1


def test_kohya_has_a_file_for_each_denoiser_and_all_come_back(kandinsky_folder, tmp_path, capsys):
    system = systems.build("kandinsky2", str(kandinsky_folder))
    for stage, part in (("prior", system.prior), ("decoder", system.unet)):
        system.adapt(stage, 2)
        stir(part, 0.3)
    system.save(tmp_path / "run")
    main([str(tmp_path / "run"), "--to", "kohya", "--out", str(tmp_path / "k")])
    written = capsys.readouterr().out.split()
    assert [Path(name).name for name in written] == ["k-unet.safetensors", "k-prior.safetensors"]
    again = nanomed.load("kandinsky2", weights=kandinsky_folder, lora=",".join(written))
    straight = nanomed.load("kandinsky2", weights=kandinsky_folder, lora=str(tmp_path / "run"))
    for part in ("prior", "unet"):
        ours, theirs = again.get_submodule(part).state_dict(), straight.get_submodule(part).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ------------------------------------------------------------------------------------------------------------- showing


def test_show_says_what_a_file_is(theirs, capsys, tmp_path):
    out, _ = theirs
    lines = []
    for name in ("peft", "diffusers", "anything.safetensors"):
        assert main(["show", str(out / name)]) == 0
        lines.append(capsys.readouterr().out)
    for text, kind in zip(lines, ("PEFT", "diffusers", "kohya")):
        assert kind in text and "rank 4, alpha 6, 18 layers" in text and "float32" in text and "base: " in text, text
    save_file({f"unet.x.{k}": torch.zeros(2, 2, dtype=torch.float16) for k in ("lora_A.weight", "lora_B.weight")},
              tmp_path / "old.safetensors")  # fmt: skip
    main(["show", str(tmp_path / "old.safetensors")])
    said = capsys.readouterr().out
    assert "unet: rank 2, alpha 2 (not said: taken for the rank), 1 layers, 8 values, float16" in said


def test_names_in_kohyas_keys_get_their_dots_back(theirs, tmp_path):
    """Its file of PixArt's adapter as a PEFT folder: the tensors and alpha of the folder that peft wrote."""
    assert main([str(theirs[0] / "anything.safetensors"), "--to", "peft", "--out", str(tmp_path / "p")]) == 0
    mine, other = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "p", theirs[0] / "peft"))
    assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)
    assert json.loads((tmp_path / "p" / "adapter_config.json").read_text())["lora_alpha"] == 6


@pytest.mark.parametrize("words, code", [
    (["show", "nowhere"], 4), (["nowhere", "--to", "peft", "--out", "x"], 4), (["RUN"], 2),
    (["RUN", "--to", "peft"], 2),
    (["RUN", "--to", "peft", "--merge", "--out", "x"], 2), (["RUN", "--to", "kohya", "--out", "RUN"], 2),
    (["JUNK", "--to", "kohya", "--out", "x"], 4), (["show", ""], 4), (["show", "x" * 5000], 4),
])  # fmt: skip
def test_mistakes_are_one_line_and_an_exit_code(words, code, theirs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    places = {"RUN": theirs[0] / "peft", "JUNK": tmp_path / "junk.safetensors"}
    monkeypatch.setattr("sys.argv", ["adapters", *(str(places.get(word, word)) for word in words)])
    with pytest.raises(SystemExit) as ended:
        flags.main(main)
    assert ended.value.code == code
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1 and not said.out
    assert [path.name for path in tmp_path.iterdir()] == ["junk.safetensors"]


@pytest.mark.parametrize("change", [
    {"lora_alpha": None}, {"lora_alpha": "many"}, {"alpha_pattern": 3}, {"rank_pattern": {"(": 1}}, {"r": 5},
])  # fmt: skip
@pytest.mark.parametrize("verb", ["show", "to", "merge"])
def test_settings_that_say_no_rank_or_alpha_are_named(verb, change, theirs, pixart_folder, tmp_path):
    folder = shutil.copytree(theirs[0] / "peft", tmp_path / "peft")
    said = json.loads((folder / "adapter_config.json").read_text()) | change
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in said.items() if v is not None}))
    out = ["--out", str(tmp_path / "x")]
    words = {"show": ["show", str(folder)], "to": [str(folder), "--to", "kohya", *out],
             "merge": [str(folder), "--merge", *out, "--weights", str(pixart_folder)]}  # fmt: skip
    if verb == "show" and change in ({"lora_alpha": None}, {"rank_pattern": {"(": 1}}, {"r": 5}):
        assert main(words[verb]) == 0  # it tells what the tensors are
        return
    with pytest.raises(WeightsError, match="adapter_model"):
        main(words[verb])
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]


@pytest.mark.parametrize("a, b", [
    (torch.ones(()), torch.ones(())), (torch.ones(2, 3), torch.ones(3, 5)), (torch.ones(0, 3), torch.ones(3, 0)),
    (torch.ones(2, 3, dtype=torch.int32), torch.ones(3, 2, dtype=torch.int32)),
])  # fmt: skip
def test_tensors_that_are_no_pair_are_named(a, b, tmp_path):
    save_file({"unet.mid.lora_A.weight": a, "unet.mid.lora_B.weight": b}, tmp_path / "odd.safetensors")
    with pytest.raises(WeightsError, match="A and B of mid are"):
        main([str(tmp_path / "odd.safetensors"), "--to", "peft", "--out", str(tmp_path / "x")])
    assert [path.name for path in tmp_path.iterdir()] == ["odd.safetensors"]


# ---------------------------------------------------------------------------------------------------- the two commands


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A run of msdm-tiny with random weights, and an adapter for its U-Net and its text encoder in one file."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    system = systems.build("msdm-tiny")
    with torch.no_grad():  # its last layer starts at zero
        for param in system.parameters():
            param.add_(0.02 * torch.randn_like(param))
    system.save(folder / "model")
    for part in ("unet", "text_encoder"):
        targets = [name for name in lora.adaptable(system.get_submodule(part)) if "mlp" in name or "attn" in name]
        lora.inject(system.get_submodule(part), 2, targets=targets or [*lora.adaptable(system.get_submodule(part))][:4])
        stir(system.get_submodule(part), 0.3)
    formats.save_diffusers(folder / "both.safetensors", {p: system.get_submodule(p) for p in ("unet", "text_encoder")})
    return folder


def test_sample_writes_what_it_folded_and_mixes_nothing(tiny, tmp_path, monkeypatch):
    import sample

    (tmp_path / "p.csv").write_text("prompt\nGenerate an image with no polyps.\n")

    def go(out: str, *more: str) -> bytes:
        words = ["sample.py", "--model", str(tiny / "model"), "--prompts", str(tmp_path / "p.csv"), "--steps", "2",
                 "--out", str(tmp_path / out), "--batch", "1", *more]  # fmt: skip
        monkeypatch.setattr(sys, "argv", words)
        sample.main()
        return (tmp_path / out / "00000.png").read_bytes()

    plain, with_it = go("a"), go("b", "--lora", f"{tiny / 'both.safetensors'}=0.8")
    assert plain != with_it and with_it != go("c", "--lora", f"{tiny / 'both.safetensors'}")
    (line,) = [json.loads(line) for line in (tmp_path / "b" / "manifest.jsonl").read_text().splitlines()]
    (said,) = line["lora"]
    assert said["file"] == "both.safetensors" and said["weight"] == 0.8 and len(said["sha256"]) == 64
    assert json.loads((tmp_path / "b" / "settings.json").read_text())["drawing"]["lora"] == [said]
    with pytest.raises(UsageError, match="other settings .*lora"):
        go("b")
    with pytest.raises(UsageError, match="other settings .*lora"):
        go("a", "--lora", str(tiny / "both.safetensors"))


def test_a_file_of_two_parts_changes_both_networks(tiny):
    """The layers that it names, and nothing else."""
    plain, with_it = nanomed.load(tiny / "model"), nanomed.load(tiny / "model", lora=str(tiny / "both.safetensors"))
    tensors = load_file(tiny / "both.safetensors")
    for part in ("unet", "text_encoder"):
        changed = {name for name, t in with_it.get_submodule(part).state_dict().items()
                   if not torch.equal(t, plain.get_submodule(part).state_dict()[name])}  # fmt: skip
        told = {k.removeprefix(f"{part}.").replace(".lora_A.weight", ".weight") for k in tensors
                if k.startswith(f"{part}.") and "lora_A" in k}  # fmt: skip
        assert changed == told and changed
    assert torch.equal(plain.vae.state_dict()[(k := [*plain.vae.state_dict()][0])],
                                                   with_it.vae.state_dict()[k])  # fmt: skip


@pytest.fixture
def trainer(pixart_folder, monkeypatch, tmp_path):
    import train
    from nanomed.run import runs

    def go(*more: str) -> Path:
        words = ["train.py", "--model", "pixart", "--weights", str(pixart_folder), "--data", "toy:6", "--size", "64",
                 "--steps", "2", "--batch", "1", "--score_images", "0", "--out", str(tmp_path / "runs"),
                 "--cache", str(tmp_path / "cache"), "--precision", "fp32", "--lr", "0.001", *more]  # fmt: skip
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.setattr("time.strftime", lambda *_: f"run-{len(list((tmp_path / 'runs').glob('*')))}")
        train.main()
        return runs.newest(tmp_path / "runs")

    return go


def test_training_starts_from_an_adapter(trainer, theirs, pixart_folder, tmp_path):
    """The adapter itself trains, with its rank and alpha, whoever wrote it; the run needs the file no more."""
    file = tmp_path / "moved.safetensors"
    file.write_bytes((theirs[0] / "anything.safetensors").read_bytes())
    run = trainer("--lora", str(file))
    file.unlink()
    before = lora_of(theirs[0] / "peft" / "adapter_model.safetensors")
    after = lora_of(run / "model" / "transformer_lora" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    moved = max((after[name] - before[name]).abs().max() for name in before)
    assert 0 < moved <= 2 * 0.001 * 1.01  # two steps of Adam at this rate
    about = json.loads((run / "model" / "transformer_lora" / "adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"]) == (4, 6)
    for path in (run / "checkpoints").glob("*"):  # and goes on from the start, bit for bit
        for part in path.glob("*"):
            part.unlink()
        path.rmdir()
    (run / "state.json").write_text('{"status": "preempted", "stages": []}')
    for path in (run / "model" / "transformer_lora").glob("*"):
        path.unlink()
    trainer("--lora", str(file), "--resume", str(run))
    again = lora_of(run / "model" / "transformer_lora" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], after[name]) for name in after)


def test_training_on_top_of_a_folded_adapter(trainer, theirs, pixart_folder, tmp_path):
    """With --rank the given ones lie below a new one: the run draws with all of them, and alone it is refused."""
    run = trainer("--lora", f"{theirs[0] / 'peft'}=0.8", "--rank", "2")
    about = json.loads((run / "model" / "transformer_lora" / "adapter_config.json").read_text())
    assert about["r"] == 2
    with_all = nanomed.load(run, str(pixart_folder))
    by_hand = nanomed.load("pixart", weights=pixart_folder,
                           lora=f"{theirs[0] / 'peft'}=0.8,{run / 'model' / 'transformer_lora'}")  # fmt: skip
    for name, tensor in by_hand.transformer.state_dict().items():
        assert torch.equal(tensor, with_all.transformer.state_dict()[name]), name
    close(drawn(nanomed.load("pixart", weights=pixart_folder, lora=str(run))), drawn(by_hand), 0)
    with pytest.raises(UsageError, match="lies on 1 others"):
        main([str(run), "--to", "peft", "--out", str(tmp_path / "p")])
    assert main([str(run), "--merge", "--out", str(tmp_path / "whole"), "--weights", str(pixart_folder)]) == 0
    close(diffusers_draws(tmp_path / "whole"), drawn(by_hand), CLOSE)


def test_an_adapter_for_nothing_that_trains_is_refused_before_anything_is_written(trainer, pixart_folder, tmp_path):
    system = systems.build("medart", str(pixart_folder))
    lora.inject(system.text_encoder, 2, targets=("q",))
    formats.save_peft(tmp_path / "t5", system.text_encoder)
    with pytest.raises(UsageError, match="nothing for transformer"):
        trainer("--lora", str(tmp_path / "t5"))
    assert not list((tmp_path / "runs").glob("*"))


def lora_of(file: Path) -> dict[str, torch.Tensor]:
    return {k.removeprefix("base_model.model."): t for k, t in load_file(file).items()}
