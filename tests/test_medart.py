"""Med-Art: exact adapters, the colour loss inside the training step, the rows of Table 3, and the whole run of the tiny
preset.

Oracles: the published adapters' tensors (manifests), peft on the saved folders, autograd with every activation held,
`sample` itself for what is drawn inside the loss, and uninterrupted runs for resumed ones.
"""

import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import manifests
import numpy as np
import peft
import pytest
import torch
from conftest import StopAfter, close
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.profiler import ProfilerActivity, profile

import nanomed
import train
from nanomed import data, systems
from nanomed.adapters import lora
from nanomed.autoencoders.kl import AutoencoderKL
from nanomed.data import DataError
from nanomed.denoisers.pixart import PixArtTransformer
from nanomed.diffusion import hldf
from nanomed.diffusion.guidance import guided
from nanomed.run import flags, runs, signals
from nanomed.run.flags import UsageError
from nanomed.run.randomness import ImageNoise
from nanomed.run.ranks import ALONE
from nanomed.run.signals import PREEMPTED
from nanomed.systems.assembly import Found
from nanomed.systems.medart import PRESETS, MedArt
from nanomed.systems.miniatures.medart import MedArtTiny, tiny_tokenizer
from nanomed.text.t5 import T5Config, T5Encoder
from nanomed.training.placement import Placement

SMALL = dict(transformer=dict(num_attention_heads=2, attention_head_dim=12, num_layers=2, sample_size=8, patch_size=2,
                              caption_channels=16, interpolation_scale=1.0),
             text_encoder=dict(vocab_size=160, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2),
             vae=dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4),
             length=24, hldf_every=3, hldf_steps=4)  # fmt: skip
PROMPTS = ["An image with a polyp", "Generate an image"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def small(dtype: torch.dtype = torch.float32, **options) -> MedArt:
    """A system of random weights with adapters in place that are no longer zero."""
    torch.manual_seed(0)
    system = systems.build("medart-tiny", **SMALL | options).to(dtype)
    system.adapt("adapters", 2)
    for module in (system.transformer, system.text_encoder):
        if lora.adapted(module):
            for param in lora.parameters(module):
                param.data += 0.1 * torch.randn_like(param)
    system.trainable("adapters")
    return system


def a_batch(dtype: torch.dtype = torch.float32) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {"image": torch.rand(2, 3, 16, 16, generator=generator).to(dtype) * 2 - 1, "prompt": PROMPTS}


def gradients(system: MedArt) -> torch.Tensor:
    found = torch.cat([p.grad.flatten() for p in system.parameters() if p.requires_grad])
    system.zero_grad()
    return found


# ---------------------------------------------------------------------------------------------- the paper's numbers


def published(**options) -> MedArt:
    """Med-Art at full size, without a byte of weights."""
    with torch.device("meta"):
        parts = {"transformer": PixArtTransformer(), "text_encoder": T5Encoder(T5Config()), "vae": AutoencoderKL()}
        return MedArt(Found(parts, {}, {}, base="meta"), **options)


@pytest.mark.parametrize(
    "part, manifest, modules, parameters",
    [("transformer", "medart_pixart512_r8", 287, 6_882_688), ("text_encoder", "medart_t5xxl_r8", 120, 9_043_968)],
)
def test_adapters_are_the_published_ones_tensor_by_tensor(part, manifest, modules, parameters):
    system = published()
    system.adapt("adapters", 8)
    params = system.trainable("adapters")
    mine = lora.state(system.get_submodule(part))
    names = {f"base_model.model.{name}": tuple(tensor.shape) for name, tensor in mine.items()}
    assert names == manifests.names_and_shapes(f"lora/{manifest}")
    assert len(mine) == 2 * modules and sum(tensor.numel() for tensor in mine.values()) == parameters
    assert sum(p.numel() for p in params.values()) == 6_882_688 + 9_043_968


def test_the_released_lists_of_targets_name_the_same_layers():
    """proj_in and wi stand in them and match nothing."""
    for part, manifest in (("transformer", "medart_pixart512_r8"), ("text_encoder", "medart_t5xxl_r8")):
        released = manifests.about(f"lora/{manifest}")["target_modules"]
        module = getattr(published(), part)
        assert set(MedArt.adapters[part]) <= set(released)
        with pytest.warns(UserWarning, match="proj_in" if part == "transformer" else "wi"):
            lora.inject(module, 8, targets=released)
        other = published()
        other.adapt("adapters", 8)
        assert lora.state(module).keys() == lora.state(other.get_submodule(part)).keys()


@pytest.mark.parametrize("preset, epochs, every", [("medart", 15, 500), ("medart-skin", 10, 1500)])
def test_presets_are_the_released_commands(preset, epochs, every):
    recipe = systems.recipe(preset) | systems.recipe(preset, "adapters")
    said = dict(rank=8, lr=1e-4, weight_decay=1e-2, batch=1, precision="bf16", clip=1.0, ema=0.0, epochs=epochs)
    assert said.items() <= recipe.items()
    config = flags.parse(train.Config, ["--model", preset], models=flags.Models(systems.recipe, systems.options))
    assert config.augment and config.schedule == "constant" and config.adapter == "lora"
    system = published(**PRESETS[preset])
    assert system.config()["hldf_every"] == every and system.config()["hldf_steps"] == 20
    assert system.guidance == 4.5 and system.dropout == 0 and not system.jitter
    assert system.stages == {"adapters": ("transformer", "text_encoder")}


# ------------------------------------------------------------------------------------------- HLDF inside a step


def test_colours_are_added_in_every_nth_step_from_the_first():
    system, batch = small(), a_batch()
    for step in range(7):
        torch.manual_seed(step)
        both = system(batch, "adapters", step)["loss"]
        torch.manual_seed(step)
        noise = super(MedArt, system).forward(batch, "adapters", step)["loss"]
        if step % 3 == 0:
            assert both.item() == pytest.approx((noise + system.colour_loss(batch) / 4).item(), rel=1e-6)
        else:
            assert both.item() == noise.item()


def test_validation_is_without_colours():
    system, batch = small(), a_batch()
    with torch.no_grad():
        torch.manual_seed(0)
        loss = system(batch, "adapters", 0)["loss"]
        torch.manual_seed(0)
        assert loss.item() == super(MedArt, system).forward(batch, "adapters", 0)["loss"].item()


def test_what_is_drawn_inside_the_loss_is_what_sample_draws(monkeypatch):
    system, drawn = small(), []
    monkeypatch.setattr(hldf, "colour_loss", lambda images, targets, channels: drawn.append(images) or images.mean())
    torch.manual_seed(5)
    system.colour_loss(a_batch())

    class Noise:
        def randn(self, *shape):
            torch.manual_seed(5)
            return torch.randn(2, *shape)

    with torch.no_grad():
        images = system.eval().sample(PROMPTS, Noise(), steps=4)
    assert drawn[0].abs().max() < 3  # in the range where the clamp below hides little
    close((drawn[0] / 2 + 0.5).clamp(0, 1), images, 1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("options", [{}, {"hldf_keep": 2}, {"text_adapter": "dora"}, {"text_adapter": "none"}])
def test_gradients_equal_those_of_held_activations(monkeypatch, dtype, tolerance, options):
    """Of every adapter of both parts, through both branches of guidance, all steps and the decoder."""
    system, batch = small(dtype, **options), a_batch(dtype)
    torch.manual_seed(0)
    system.colour_loss(batch).backward()
    assert all(p.grad.any() for p in system.parameters() if p.requires_grad)
    ours = gradients(system)
    monkeypatch.setattr(hldf, "recomputed", lambda net, cond, null, scale, *rest: guided(net, cond, null, scale))
    torch.manual_seed(0)
    system.colour_loss(batch).backward()
    held = gradients(system)
    assert ((ours - held).norm() / held.norm()).item() < tolerance


def test_peak_memory_of_a_step_with_twenty_solver_steps_is_that_with_two(monkeypatch):
    """The bar is 1.5; the meter is torch's profiler. With activations held it is far beyond."""
    shape = SMALL["transformer"] | dict(sample_size=16, attention_head_dim=24)

    def peak(steps: int) -> int:
        system = small(transformer=shape, hldf_steps=steps)
        batch = {"image": torch.rand(1, 3, 32, 32), "prompt": PROMPTS[:1]}

        def run():
            system(batch, "adapters", 0)["loss"].backward()
            system.zero_grad()

        run()
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
            run()
        events = [e for e in measured.profiler.kineto_results.events() if e.name() == "[memory]"]
        changes = [change for _, change in sorted((e.start_ns(), e.nbytes()) for e in events)]
        return int(np.cumsum(changes).max())

    assert peak(20) <= 1.5 * peak(2)
    monkeypatch.setattr(hldf, "recomputed", lambda net, cond, null, scale, *rest: guided(net, cond, null, scale))
    assert peak(20) > 4 * peak(2)


def test_cached_and_raw_images_give_the_same_loss():
    system, batch = small(), a_batch()
    cached = {"prompt": PROMPTS} | system.image_moments(batch["image"])
    losses = []
    for each in (batch, cached):
        torch.manual_seed(0)
        losses.append(system(each, "adapters", 0)["loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_released_scale_is_a_third():
    paper, released = small(), small(hldf_channels="mean")
    values = []
    for system in (paper, released):
        torch.manual_seed(0)
        values.append(system.colour_loss(a_batch()).item())
    assert values[0] == pytest.approx(3 * values[1], rel=1e-6)


# ----------------------------------------------------------------------------------------- Table 3, row by row


def test_t5_without_an_adapter_is_frozen_and_computed_once():
    system = small(text_adapter="none")
    assert system.stages["adapters"] == ("transformer",)
    assert not lora.adapted(system.text_encoder) and not any(p.requires_grad for p in system.text_encoder.parameters())
    assert system.frozen("adapters").keys() == {"image", "text"}
    cached = {"prompt": PROMPTS} | system.image_moments(a_batch()["image"]) | system.states(PROMPTS)
    torch.manual_seed(0)
    loss = system(cached, "adapters", 1)["loss"]
    torch.manual_seed(0)
    assert loss.item() == pytest.approx(system(a_batch(), "adapters", 1)["loss"].item(), rel=1e-6)


def test_t5_that_trains_is_never_cached():
    assert small().frozen("adapters").keys() == {"image"}


def test_dora_on_t5_alone():
    system = small(text_adapter="dora")
    assert all(
        layer.lora_magnitude_vector is not None for layer in system.text_encoder.modules() if hasattr(layer, "lora_A")
    )
    assert all(
        layer.lora_magnitude_vector is None for layer in system.transformer.modules() if hasattr(layer, "lora_A")
    )


def test_what_learns_to_read_here_reads_in_training_what_it_is_asked():
    """Prompts are lower-cased for drawing (the published pipeline) and not for training (the published script). A T5 of
    thousands of books does not care; one that has seen the toy world's prompts alone would meet words it never learned.
    """
    system = small()
    asked, learned = (encode(["Generate an image with 1 polyp. "]) for encode in (system.encode_text, system.states))
    assert torch.equal(asked["prompt_embeds"], learned["prompt_embeds"])
    words = tiny_tokenizer(512)(["generate an image with 1 polyp."], length=24)[1].sum()
    assert words <= 8  # a piece a word, the full stop and the end; else letters
    learned = MedArt.states(system, ["Generate an image with 1 polyp. "])
    assert not torch.equal(asked["prompt_embeds"], learned["prompt_embeds"])


def test_an_unknown_kind_of_adapter_is_refused():
    with pytest.raises(UsageError, match="--text_adapter loha: choose .*none, lora"):
        words = ["--model", "medart", "--text_adapter", "loha"]
        flags.parse(train.Config, words, models=flags.Models(systems.recipe, systems.options))


@pytest.fixture
def folder(tmp_path):
    """Kvasir in miniature, as Med-Art lays it out: class folders below one metadata.csv."""
    rng = np.random.default_rng(0)
    lines = ["file_name,text"]
    for name in ("dyed-lifted-polyps/a.png", "dyed-lifted-polyps/b.png", "normal-cecum/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(tmp_path / name)
        lines.append(f'{name},"A caption, with a comma, of {name}"')
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    return tmp_path


def test_caption_variants(folder):
    table = data.load(f"folder:{folder}")
    assert [row.prompts for row in table.rows][0] == ("A caption, with a comma, of dyed-lifted-polyps/a.png",)
    empty = data.with_captions(table, "empty")
    assert {row.prompts for row in empty.rows} == {("",)}
    simple = data.with_captions(table, "An endoscopic image of {category}")
    assert [row.prompts[0] for row in simple.rows] == ["An endoscopic image of dyed lifted polyps"] * 2 + [
        "An endoscopic image of normal cecum"
    ]
    other = folder / "ovis.csv"
    other.write_text("file_name,text\nnormal-cecum/a.png,c\ndyed-lifted-polyps/a,a\ndyed-lifted-polyps/b.png,b\n")
    assert [row.prompts for row in data.with_captions(table, str(other)).rows] == [("a",), ("b",), ("c",)]


def test_captions_that_do_not_fit_are_named(folder):
    table = data.load(f"folder:{folder}")
    other = folder / "other.csv"
    other.write_text("file_name,text\na.png,which\n")
    with pytest.raises(DataError, match=r"no caption for .*dyed-lifted-polyps/b.png"):
        data.with_captions(table, str(other))
    other.write_text("file_name,text\na.png,one\nnormal-cecum/a.png,two\ndyed-lifted-polyps/a.png,x\nb.png,y\n")
    with pytest.raises(DataError, match="more than one name"):
        data.with_captions(table, str(other))
    other.write_text("file_name,text\na.png,\n")
    with pytest.raises(DataError, match=r"other.csv:2: an empty caption"):
        data.with_captions(table, str(other))
    with pytest.raises(DataError, match="no such file; say empty"):
        data.with_captions(table, "nowhere.csv")
    unclassed = data.Table("x", tuple(data.Row(row.file, row.prompts) for row in table.rows))
    with pytest.raises(DataError, match="no category"):
        data.with_captions(unclassed, "An image of {category}")


def test_a_column_names_the_category(folder):
    text = (folder / "metadata.csv").read_text().replace("file_name,text", "file_name,text,category")
    (folder / "metadata.csv").write_text(
        "\n".join([text.split("\n")[0], *(f"{x},polyps" for x in text.split("\n")[1:])])
    )
    assert {row.label for row in data.load(f"folder:{folder}").rows} == {"polyps"}


# --------------------------------------------------------------------------------------------------- whole runs

FLAGS = ["--model", "medart-tiny", "--data", "toy:12", "--batch", "2", "--steps", "4", "--save_every", "2", "--valid",
         "0.2", "--score_images", "0", "--log_every", "1", "--keep", "9", "--hldf_every", "2"]  # fmt: skip


@pytest.fixture
def run_train(monkeypatch, tmp_path_factory):
    """Run train.py in this process: run_train(folder, *flags, stop_after=step) -> (exit code, run folder)."""
    cache = tmp_path_factory.getbasetemp() / "medart-cache"
    monkeypatch.setattr(MedArt, "sample", lambda self, prompts, noise, **_: torch.zeros(len(prompts), 3, 32, 32))

    def go(out, *flags, stop_after=10**9):
        monkeypatch.setattr(sys, "argv", ["train.py", *FLAGS, "--out", str(out), "--cache", str(cache), *flags])
        monkeypatch.setattr(signals, "StopSignal", StopAfter(stop_after))
        code = train.main()
        return code, runs.newest(out)

    return go


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tmp_path_factory.mktemp("medart-run")


def test_the_tiny_preset_from_nothing_to_adapters_that_peft_loads(run_train, finished, monkeypatch):
    code, run = run_train(finished)
    assert code == 0
    model = run / "model"
    assert {path.name for path in model.iterdir() if path.is_dir()} == {
        "vae", "transformer", "text_encoder", "tokenizer", "transformer_lora", "text_encoder_lora"
    }  # fmt: skip
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert any("colour" in line for line in log)

    monkeypatch.undo()
    trained = nanomed.load(run)
    assert not any(lora.adapted(part) for part in trained.children())  # folded: nothing to pay for when drawing
    base = MedArtTiny.build(**_shapes(model))
    base.tokenizer = trained.tokenizer
    for part in ("transformer", "text_encoder"):
        file = next((model / part).glob("*.safetensors"))
        base.get_submodule(part).load_state_dict(load_file(file))
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        ours = trained.transformer(x, t, **trained.states(["a polyp"]))
        for part in ("transformer", "text_encoder"):  # the very folders, by peft
            theirs = peft.PeftModel.from_pretrained(base.get_submodule(part), model / f"{part}_lora")
            setattr(base, part, theirs.merge_and_unload())
        reference = base.transformer(x, t, **base.states(["a polyp"]))
    close(ours, reference, 1e-5)
    settings = json.loads((model / "transformer_lora" / "adapter_config.json").read_text())
    assert settings["r"] == 8 and settings["lora_alpha"] == 8
    images = trained.sample(["a polyp", "two polyps"], ImageNoise(0, range(2)), steps=2)
    assert images.shape == (2, 3, 32, 32) and images.min() >= 0 and images.max() <= 1


def test_a_run_of_version_0_1_is_read_as_the_miniature_that_it_is(run_train, finished, tmp_path):
    """It wrote "medart" for both; only the miniature has a VAE of its own."""
    run = runs.newest(finished) or run_train(finished)[1]
    shutil.copytree(run / "model", tmp_path / "old")
    said = json.loads((tmp_path / "old" / "system.json").read_text())
    assert said["system"] == "medart-tiny"
    (tmp_path / "old" / "system.json").write_text(json.dumps(said | {"system": "medart"}))
    assert type(nanomed.load(tmp_path / "old")) is MedArtTiny


def _shapes(model) -> dict:
    settings = json.loads((model / "system.json").read_text())
    return {name: settings[name] for name in ("transformer", "text_encoder", "vae", "length")}


@pytest.mark.parametrize("stops", [(10,), (5, 6)])
def test_resume_is_bitwise_exact_across_hldf_steps(run_train, finished, tmp_path, stops):
    """Stopped among the adapters' steps, and twice: in the base model and beside an HLDF step of the adapters."""
    whole = runs.newest(finished) or run_train(finished)[1]
    code, _ = run_train(tmp_path, stop_after=stops[0])
    for stop in (*stops[1:], 10**9):
        assert code == PREEMPTED
        code, run = run_train(tmp_path, "--resume", "latest", stop_after=stop)
    assert code == 0
    paths = sorted(path.relative_to(whole) for path in whole.glob("model/*/*.safetensors"))
    paths += [path.relative_to(whole) for path in whole.glob("checkpoints/adapters-step-000004/*.safetensors")]
    assert len(paths) == 7
    for path in paths:
        mine, theirs = load_file(run / path), load_file(whole / path)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine), path


def test_flags_of_med_art_are_refused_elsewhere(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--model", "msdm-tiny", "--hldf_every", "5"])
    with pytest.raises(UsageError, match="unrecognized arguments: --hldf_every"):
        train.main()


def test_parts_are_plain_attributes_with_published_names():
    assert [name for name, part in published().named_children()] == ["transformer", "text_encoder", "vae"]
    assert isinstance(published().vae, nn.Module)


# ---------------------------------------------------------------------------------------- T5 in pieces, and elsewhere

WORKER = """
import sys

import conftest
import torch
from nanomed.run.randomness import ImageNoise
from nanomed.run.ranks import Ranks
from nanomed.training.placement import Placement
from test_medart import PROMPTS, small

ranks = Ranks.join()
rank, world, device = ranks.rank, ranks.world, ranks.device
system = small()
placement = Placement(system, "adapters", "share", ranks)
placement.settle()
params = list(system.trainable("adapters").values())
model = ranks.parallel(system)
for part, most in (("text_encoder", 0.75), ("vae", 0.6)):  # adapters are whole in both
    whole = sum(param.numel() for param in small().get_submodule(part).parameters())
    held = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in system.get_submodule(part).parameters())
    assert world == 1 or held < most * whole, (part, held, whole)
images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
for row in [rank] if world > 1 else [0, 1]:  # each process has one of the images
    torch.manual_seed(row)
    loss = model({"image": images[row : row + 1], "prompt": PROMPTS[row : row + 1]}, "adapters", 0)["loss"]
    (loss / (1 if world > 1 else 2)).backward()
found = torch.cat([p.grad.flatten() for p in params])
system.eval()
placement.whole()
with torch.no_grad():
    for _ in range(1 + rank):  # unevenly many
        drawn = system.sample(PROMPTS, ImageNoise(0, range(2)), steps=2)
system.trainable("adapters")
placement.apart()  # in pieces again
system({"image": images[:1], "prompt": PROMPTS[:1]}, "adapters", 1)["loss"].backward()
if rank == 0:
    torch.save({"gradient": found, "drawn": drawn}, sys.argv[1])
if world > 1:
    torch.distributed.destroy_process_group()
"""


def test_two_processes_that_share_frozen_parts_get_the_gradients_of_one(tmp_path):
    """FSDP2 over gloo, T5 and the VAE in shares: noise loss and HLDF, adapters of both parts; 1e-5 relative. Then an
    uneven drawing."""
    (tmp_path / "worker.py").write_text(WORKER)
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{tests.parent}:{tests}", "OMP_NUM_THREADS": "1"}
    results = []
    for count in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if count == 2 else []
        words = [sys.executable, *launch, str(tmp_path / "worker.py"), str(tmp_path / f"{count}.pt")]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        results.append(torch.load(tmp_path / f"{count}.pt", weights_only=True))
    one, two = (result["gradient"] for result in results)
    assert ((one - two).norm() / one.norm()).item() < 1e-5
    close(results[1]["drawn"], results[0]["drawn"], 1e-5)


def test_a_run_of_two_processes_that_share_t5(tmp_path):
    """train.py from the base model on; both ways of holding T5 train the same adapters to 1e-5."""
    common = [*FLAGS, "--cache", str(tmp_path / "cache"), "--batch", "1", "--steps", "2", "--save_every", "2"]
    models = []
    for name, more in (("whole", []), ("shared", ["--frozen", "share"])):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        words = [sys.executable, *launch, "train.py", *common, "--out", str(tmp_path / name), *more]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        models.append(runs.newest(tmp_path / name) / "model")
    for part in ("transformer_lora", "text_encoder_lora"):
        whole, shared = (load_file(model / part / "adapter_model.safetensors") for model in models)
        assert any(tensor.any() for key, tensor in whole.items() if "lora_B" in key)
        for key in whole:
            close(shared[key], whole[key], 1e-5)


def test_a_frozen_t5_may_work_on_another_device():
    """States come out where the transformer is. (The meta device stands for the CPU of a machine with a GPU.)"""
    system = small(text_adapter="none")
    expected = system.states(PROMPTS)
    Placement(system, "adapters", "cpu", ALONE).settle()
    assert next(system.text_encoder.parameters()).device.type == "cpu"
    close(system.states(PROMPTS)["prompt_embeds"], expected["prompt_embeds"], 0)
    system.text_encoder.to("meta")
    system.transformer.to("meta")
    system.text_encoder.trimmed = lambda ids, mask: torch.zeros(*ids.shape, 16)
    system.text_encoder.to_empty(device="cpu")
    assert system.states(PROMPTS)["prompt_embeds"].device.type == "meta"
