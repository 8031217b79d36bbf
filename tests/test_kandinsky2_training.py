"""Tuning Kandinsky 2.2: the two losses against their formulas, adapters through train.py in the paper's three stages,
what is saved and read again, and the miniature that learns from nothing. Weights are random; runs take seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import close
from PIL import Image
from safetensors.torch import load_file
from test_kandinsky2_pipeline import LENGTH, MAIN, PROMPTS, WIDTH, miniature

import nanomed
import train
from nanomed import systems
from nanomed.adapters import lora
from nanomed.data import toy
from nanomed.data.images import padded, to_unit
from nanomed.run import runs, signals
from nanomed.run.flags import UsageError
from nanomed.run.randomness import ImageNoise
from nanomed.run.signals import PREEMPTED
from nanomed.systems import kandinsky2
from nanomed.systems.miniatures import kandinsky2 as kandinsky2_tiny
from nanomed.text.clip_vision import preprocess

TINY = ["--model", "kandinsky2-tiny", "--data", "toy:24", "--batch", "4", "--steps", "2", "--save_every", "2",
        "--score_images", "0", "--test_prompts", "", "--log_every", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return miniature(tmp_path_factory.mktemp("published"))


@pytest.fixture
def system(folder):
    system = nanomed.load("kandinsky2", weights=folder)
    system.size = 32
    return system


@pytest.fixture
def run_train(monkeypatch, tmp_path_factory):
    """Run train.py in this process: run_train(folder, *flags) -> (exit code, run folder)."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    torch.set_num_threads(1)
    few = dict(size=32, steps=2, prior_steps=2)  # of the samplers, for the grids that a run draws
    monkeypatch.setitem(kandinsky2.PRESETS, "kandinsky2", few)
    tiny = kandinsky2_tiny.PRESETS["kandinsky2-tiny"]
    monkeypatch.setitem(kandinsky2_tiny.PRESETS, "kandinsky2-tiny", tiny | few)

    def go(out: Path, *flags: str, stop_after: int = 10**9) -> tuple[int, Path]:
        class Stop:
            left = stop_after

            @property
            def received(self) -> str:
                self.left -= 1
                return "SIGTERM" if self.left <= 0 else ""

        monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(out), "--cache", str(cache), *flags])
        monkeypatch.setattr(signals, "StopSignal", Stop)
        return train.main(), runs.newest(out)

    return go


def fields(rows: int = 4) -> dict:
    """A training batch as the caches give it."""
    torch.manual_seed(1)
    mask = torch.arange(LENGTH) < torch.tensor([[3], [9], [5], [2]])[:rows]
    return {
        "image_embeds": torch.randn(rows, WIDTH),
        "latents": torch.randn(rows, 4, 8, 8),
        "prompt": ["a"] * rows,
        "text_states": torch.randn(rows, LENGTH, WIDTH),
        "text_embeds": torch.randn(rows, WIDTH),
        "text_mask": mask,
    }


# ------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("gamma", [0.0, 5.0])
@pytest.mark.parametrize("released", [False, True])
def test_the_priors_loss_is_its_formula(system, released, gamma):
    """x_0 of the standardised embedding. On the prior's own squared-cosine schedule with the weight min(SNR, 5) of an
    x_0-prediction; or as the released script has it, on the decoder's schedule with min(SNR, 5) / SNR."""
    system.released, system.snr_gamma = released, gamma
    batch = fields()
    torch.manual_seed(2)
    found = system(batch, "prior", 0)["loss"]
    torch.manual_seed(2)
    t, noise = torch.randint(1000, (4,)), torch.randn(4, WIDTH)
    scheduler = (
        diffusers.DDPMScheduler(**MAIN) if released else diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    )
    x0 = (batch["image_embeds"] - system.prior.clip_mean) / system.prior.clip_std
    out = system.prior(
        scheduler.add_noise(x0, noise, t), t, batch["text_states"], batch["text_embeds"], batch["text_mask"]
    )
    abar = scheduler.alphas_cumprod[t]
    snr = abar / (1 - abar)
    weight = 1.0 if not gamma else snr.clamp(max=gamma) / (snr if released else 1)
    close(found, (F.mse_loss(out, x0, reduction="none").mean(1) * weight).mean(), 1e-5)


def test_the_decoders_loss_is_its_formula_and_leaves_the_variance_alone(system):
    """epsilon on the first 4 of 8 channels, min(SNR, 5) / SNR; the other channels get no gradient."""
    batch = fields()
    params = system.unet.requires_grad_(True)
    torch.manual_seed(2)
    found = system(batch, "decoder", 0)["loss"]
    torch.manual_seed(2)
    t, noise = torch.randint(1000, (4,)), torch.randn(4, 4, 8, 8)
    scheduler = diffusers.DDPMScheduler(**MAIN)
    out = system.unet(scheduler.add_noise(batch["latents"], noise, t), t, batch["image_embeds"])
    snr = scheduler.alphas_cumprod[t] / (1 - scheduler.alphas_cumprod[t])
    errors = F.mse_loss(out[:, :4], noise, reduction="none").mean((1, 2, 3))
    close(found, (errors * snr.clamp(max=5) / snr).mean(), 1e-5)
    found.backward()
    gradient = params.conv_out.weight.grad
    assert gradient[:4].abs().min(0).values.max() > 0 and gradient[4:].abs().max() == 0


def test_cached_fields_and_raw_ones_give_the_same_loss(system):
    """What `frozen` names is what `forward` would compute: embeddings, latents and text states."""
    raw = {"image": torch.rand(3, 3, 32, 32) * 2 - 1, "prompt": PROMPTS}
    for stage in ("prior", "decoder"):
        frozen = system.frozen(stage)
        made = {kind: encode(raw[{"image": "image", "text": "prompt"}[kind]]) for kind, (_, encode) in frozen.items()}
        torch.manual_seed(0)
        live = system(raw, stage, 0)["loss"]
        torch.manual_seed(0)
        cached = {"prompt": PROMPTS} | {name: value for part in made.values() for name, value in part.items()}
        assert torch.equal(system(cached, stage, 0)["loss"], live)
        assert {part for parts, _ in frozen.values() for part in parts.split()}.isdisjoint(system.stages[stage])


def test_a_dropped_prompt_means_no_image_to_the_decoder(system):
    batch = fields(2)
    torch.manual_seed(0)
    found = system(batch | {"prompt": ["", "a"]}, "decoder", 0)["loss"]
    embeds = torch.cat([system.image_encoder.embed_nothing(), batch["image_embeds"][1:]])
    torch.manual_seed(0)
    assert torch.equal(found, system(batch | {"image_embeds": embeds}, "decoder", 0)["loss"])
    assert not torch.equal(found, system(batch, "decoder", 0)["loss"])


def test_every_process_asks_the_frozen_tower_equally_often_whatever_its_prompts(system, monkeypatch):
    """In shares its blocks are put together by all processes at once: one that asked alone would wait for ever."""
    calls = []
    tower = system.image_encoder.vision_model.encoder.layers[0]
    tower.register_forward_pre_hook(lambda *_: calls.append(1))
    counts = []
    for prompts in (["", "a"], ["a", "b"]):
        system.adapt("decoder", 2)
        system.trainable("decoder")
        calls.clear()
        for step in range(2):
            system(fields(2) | {"prompt": prompts}, "decoder", step)
        counts.append(len(calls))
    assert counts == [1, 1]


# -------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("size", [28, 32, 256])
def test_embeddings_are_of_what_clip_would_see(system, size):
    """What reaches the tower is what CLIP's preprocessing makes of the image in its file."""
    seen = {}
    system.image_encoder.register_forward_hook(lambda module, inputs, output: seen.update(pixels=inputs[0]))
    image = Image.fromarray(toy.render(toy.scene(3), size))
    system.image_encoder.embed(to_unit(np.asarray(image))[None])
    close(seen["pixels"][0], preprocess(image, 28), 1e-6)


def test_images_are_padded_to_squares_in_the_middle():
    """Left and above get the smaller half of an odd border."""
    image = Image.fromarray(np.full((3, 6, 3), 200, np.uint8))
    square = np.asarray(padded(image))
    assert square.shape == (6, 6, 3) and (square[1:4] == 200).all() and not square[0].any() and not square[4:].any()
    assert padded(Image.new("RGB", (5, 5), "white")).tobytes() == Image.new("RGB", (5, 5), "white").tobytes()


# ------------------------------------------------------------------------------------------------------------- adapters


def test_a_stage_trains_its_adapters_alone(system):
    for stage, part, layers in (("prior", "prior", 2 * 4), ("decoder", "unet", 7 * 4)):
        system.adapt(stage, 4)
        params = system.trainable(stage)
        assert len(params) == 2 * layers and all(name.startswith(f"{part}.") and ".lora_" in name for name in params)
        assert [name for name, p in system.named_parameters() if p.requires_grad] == list(params)
        loss = system(fields(), stage, 0)["loss"]
        loss.backward()
        assert all(p.grad is not None for p in params.values())


def test_published_weights_are_not_trained_whole(system):
    with pytest.raises(UsageError, match="--rank 0: stage prior trains adapters"):
        system.trainable("prior")


def adapter(run: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / name / "adapter_model.safetensors")


def test_the_papers_three_stages(run_train, folder, tmp_path):
    """Decoder, then the prior beside that decoder, then the decoder anew beside the best prior: one command each. Saved
    as PEFT folders that peft reads, and drawn from with the adapters folded into the published weights."""
    flags = ["--model", "kandinsky2", "--weights", str(folder), "--data", "toy:24", "--batch", "4",
             "--epochs", "0", "--steps", "2", "--save_every", "2", "--score_images", "0", "--lr", "0.05"]  # fmt: skip
    _, first = run_train(tmp_path / "1", *flags, "--stage", "decoder", "--rank", "2")
    _, second = run_train(tmp_path / "2", *flags, "--stage", "prior", "--rank", "4", "--base", str(first))
    _, third = run_train(
        tmp_path / "3", *flags, "--stage", "decoder", "--rank", "8", "--adapter", "dora", "--base", str(second)
    )
    assert {p.name for p in (third / "model").iterdir()} == {"prior", "decoder", "system.json"}
    for name in ("prior", "decoder"):
        assert {p.name for p in (third / "model" / name).iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
    assert not (first / "model" / "prior").exists()
    same = adapter(first, "decoder"), adapter(second, "decoder")
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])
    assert json.loads((third / "model" / "decoder" / "adapter_config.json").read_text())["r"] == 8

    system = nanomed.load(third, weights=folder)
    assert not lora.adapted(system)
    theirs = diffusers.PriorTransformer.from_pretrained(folder / "kandinsky-2-2-prior" / "prior")
    theirs = peft.PeftModel.from_pretrained(theirs, third / "model" / "prior").eval()
    batch = fields()
    x, t = torch.randn(4, WIDTH), torch.tensor([0, 10, 500, 999])
    with torch.no_grad():
        out = theirs(x, t, batch["text_embeds"], batch["text_states"], batch["text_mask"]).predicted_image_embedding
        close(system.prior(x, t, batch["text_states"], batch["text_embeds"], batch["text_mask"]), out, 1e-5)
        bare = nanomed.load("kandinsky2", weights=folder)
        assert (
            bare.prior(x, t, batch["text_states"], batch["text_embeds"], batch["text_mask"]) - out
        ).abs().max() > 1e-3


def test_a_base_needs_to_be_a_run_and_a_stage_to_be_said(run_train, tmp_path):
    with pytest.raises(UsageError, match="say with --stage"):
        run_train(tmp_path, *TINY, "--base", "nowhere")
    with pytest.raises(UsageError, match="nowhere: not a run folder"):
        run_train(tmp_path, *TINY, "--stage", "prior", "--base", "nowhere")


# ------------------------------------------------------------------------------------------------------- the miniature


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return {}


def trained(run_train, base, tmp_path_factory) -> Path:
    if not base:
        code, base["run"] = run_train(tmp_path_factory.mktemp("base"), *TINY)
        assert code == 0
    return base["run"]


def test_the_miniature_trains_draws_and_is_adapted(run_train, base, tmp_path_factory, tmp_path):
    """All its stages from nothing, then an adapter on top: the weights below stay, the adapter lies beside them."""
    run = trained(run_train, base, tmp_path_factory)
    assert json.loads((run / "state.json").read_text())["stages"] == ["vae", "prior", "decoder"]
    system = nanomed.load(run)
    images = system.sample(["Generate an image with 1 polyp."] * 2, ImageNoise(0, [0, 1]), steps=2)
    assert images.shape == (2, 3, 32, 32) and 0 <= images.min() and images.max() <= 1

    code, tuned = run_train(
        tmp_path / "a", *TINY, "--stage", "prior", "--rank", "4", "--lr", "0.05", "--base", str(run)
    )
    assert code == 0 and (tuned / "model" / "prior" / "adapter_config.json").is_file()
    whole = "model/prior/diffusion_pytorch_model.safetensors"
    assert (tuned / whole).read_bytes() == (run / whole).read_bytes()
    again = nanomed.load(tuned)
    moved = {name for name, p in again.named_parameters() if not torch.equal(p, system.get_parameter(name))}
    assert len(moved) == 3 * 4 and all(".to_" in name and name.startswith("prior.") for name in moved)


def test_stopped_in_the_middle_an_adapter_goes_on_exactly(run_train, base, tmp_path_factory, tmp_path):
    flags = [
        *TINY,
        "--stage",
        "decoder",
        "--rank",
        "4",
        "--steps",
        "4",
        "--base",
        str(trained(run_train, base, tmp_path_factory)),
    ]
    _, straight = run_train(tmp_path / "a", *flags)
    code, run = run_train(tmp_path / "b", *flags, stop_after=3)
    assert code == PREEMPTED
    code, run = run_train(tmp_path / "b", *flags, "--resume", "latest")
    assert code == 0
    a, b = adapter(straight, "decoder"), adapter(run, "decoder")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_two_processes_with_the_frozen_parts_in_shares_train_the_same_weights(tmp_path):
    """train.py over gloo, all three stages, half of the prompts dropped; 1e-5."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    common = [*TINY, "--cache", str(tmp_path / "cache"), "--dropout", "0.5"]
    models = []
    for place in ("device", "share"):
        words = [*launch, *common, "--out", str(tmp_path / place), "--frozen", place]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        models.append(runs.newest(tmp_path / place) / "model")
    for part in ("movq", "prior", "unet", "image_encoder", "text_encoder"):
        (whole,), (shared,) = ([load_file(file) for file in (model / part).glob("*.safetensors")] for model in models)
        assert whole.keys() == shared.keys()
        for name in whole:
            close(shared[name], whole[name], 1e-5)


@torch.no_grad()
def test_latents_and_embeddings_get_unit_deviation_without_a_change_of_images():
    """It is folded into the weights: of MoVQ with the modulation of every norm, and of the image tower."""
    torch.manual_seed(0)
    system = systems.build("kandinsky2-tiny").eval()
    images = torch.stack([to_unit(toy.render(toy.scene(i), 32)) for i in range(80)])
    before, latents = system.reconstruct(images[:4]), system.movq.encode(images)
    measured = system.finish("vae", [images[:40], images[40:]])
    assert measured["latent_std"] == pytest.approx(latents.std().item(), rel=1e-5)
    assert system.movq.encode(images).std().item() == pytest.approx(1, rel=1e-4)
    close(system.reconstruct(images[:4]), before, 1e-4)
    embeds = system.image_encoder.embed(images)
    close(embeds.std(0), torch.ones(64), 1e-3)
    close(embeds.mean(0), torch.zeros(64), 1e-3)


def test_a_dry_run_of_the_published_shapes_needs_no_file():
    """4.9 billion weights that take no memory: only names, shapes and the adapters' sizes are asked for here."""
    system = systems.build("kandinsky2", random=True)
    assert sum(p.numel() for p in system.parameters()) == 4_886_682_807
    for stage, each in (("prior", 327_680), ("decoder", 205_824)):
        system.adapt(stage, 8)
        assert sum(p.numel() for p in system.trainable(stage).values()) == 8 * each
