"""The miniatures of Stable Diffusion and Kandinsky 3 through train.py: from nothing, then with adapters on top; a
published Stable Diffusion with adapters on its text encoder, too; and AdamW's epsilon. Runs take seconds."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import close
from safetensors.torch import load_file
from test_sd_system import miniature

import nanomed
import train
from nanomed import systems
from nanomed.adapters import lora
from nanomed.data import toy
from nanomed.data.images import to_unit
from nanomed.run import runs
from nanomed.run.flags import UsageError
from nanomed.run.randomness import ImageNoise
from nanomed.systems.miniatures import unets as tiny
from nanomed.training.optimizer import Descent

QUICK = ["--data", "toy:24", "--batch", "4", "--steps", "2", "--save_every", "2", "--score_images", "0",
         "--test_prompts", "", "--log_every", "1"]  # fmt: skip
PRESETS = ["sd-tiny", "kandinsky3-tiny"]


@pytest.fixture
def run_train(monkeypatch, tmp_path_factory):
    """Run train.py in this process: run_train(folder, *flags) -> run folder."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    for name in PRESETS:
        monkeypatch.setitem(tiny.PRESETS, name, tiny.PRESETS[name] | dict(steps=2))  # of the grids that a run draws

    def go(out: Path, *flags: str) -> Path:
        monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(out), "--cache", str(cache), *flags])
        assert train.main() == 0
        return runs.newest(out)

    return go


@pytest.mark.parametrize("preset", PRESETS)
def test_a_miniature_trains_draws_and_is_adapted(preset, run_train, tmp_path):
    """Both stages from nothing; what is read back draws. Then an adapter upon it: the weights below stay, and those
    that it is folded into are attention's, of the U-Net and of the text encoder."""
    run = run_train(tmp_path / "a", "--model", preset, *QUICK)
    assert json.loads((run / "state.json").read_text())["stages"] == ["vae", "unet"]
    system = nanomed.load(run)
    images = system.sample(["Generate an image with 1 polyp."] * 2, ImageNoise(0, [0, 1]), steps=2)
    assert images.shape == (2, 3, 32, 32) and 0 <= images.min() and images.max() <= 1
    assert images[0].std() > 0 and not torch.equal(images[0], images[1])

    more = ["--stage", "unet", "--rank", "4", "--lr", "0.05", "--base", str(run)]
    tuned = run_train(tmp_path / "b", "--model", preset, *QUICK, *more)
    assert {path.name for path in (tuned / "model").glob("*_lora")} == {"unet_lora", "text_encoder_lora"}
    whole = "model/unet/diffusion_pytorch_model.safetensors"
    assert (tuned / whole).read_bytes() == (run / whole).read_bytes()
    again = nanomed.load(tuned)
    moved = {name for name, p in again.named_parameters() if not torch.equal(p, system.get_parameter(name))}
    assert moved and {name.split(".")[0] for name in moved} == {"unet", "text_encoder"}
    assert all("attn" in name or "attention" in name.lower() or "DenseRelu" in name for name in moved)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_loss_falls(preset):
    """Nine steps of the U-Net on four scenes lower its loss by a fifth."""
    torch.manual_seed(0)
    system = systems.build(preset)
    scenes = [toy.scene(i) for i in range(4)]
    images = torch.stack([to_unit(toy.render(scene, 32)) for scene in scenes])
    fields = system.frozen("unet")["image"][1](images)
    batch = {name: value.detach() for name, value in fields.items()} | {"prompt": ["a polyp"] * 2 + [""] * 2}
    optimizer = torch.optim.Adam(system.trainable("unet").values(), 1e-3)
    losses = []
    for step in range(9):
        torch.manual_seed(step % 3)
        loss = system(batch, "unet", step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


@torch.no_grad()
@pytest.mark.parametrize("preset", PRESETS)
def test_latents_get_unit_deviation_without_a_change_of_images(preset):
    torch.manual_seed(0)
    system = systems.build(preset).eval()
    part = system.get_submodule(system.autoencoder)
    images = torch.stack([to_unit(toy.render(toy.scene(i), 32)) for i in range(40)])
    before, deviation = system.reconstruct(images[:4]), part.encode(images).std().item()
    measured = system.finish("vae", [images[:20], images[20:]])
    scale = tiny.PRESETS[preset].get("vae") and 0.18215 or 1.0  # the factor that a KL autoencoder begins with
    assert measured["latent_std"] * scale == pytest.approx(deviation, rel=1e-4)
    assert part.encode(images).std().item() == pytest.approx(1, rel=1e-4)
    close(system.reconstruct(images[:4]), before, 1e-4)


def test_text_encoders_of_a_published_system_are_tuned_by_a_flag(run_train, tmp_path):
    """`--text_adapter`: whichever kind; without it the U-Net's adapter alone. Text states are cached only then."""
    folder = miniature("sdxl", tmp_path / "sdxl")
    flags = ["--model", "sdxl", "--weights", str(folder), *QUICK, "--accumulate", "1", "--rank", "2"]
    run = run_train(tmp_path / "a", *flags, "--text_adapter", "rslora", "--lr", "0.05")
    names = {"unet_lora", "text_encoder_lora", "text_encoder_2_lora"}
    assert {path.name for path in (run / "model").glob("*/")} == names
    said = [json.loads((run / "model" / name / "adapter_config.json").read_text()) for name in sorted(names)]
    assert [settings["use_rslora"] for settings in said] == [True, True, False]
    tensors = load_file(run / "model" / "text_encoder_lora" / "adapter_model.safetensors")
    assert any(name.endswith("lora_B.weight") and tensor.any() for name, tensor in tensors.items())
    system = nanomed.load(run, weights=folder)
    assert not lora.adapted(system) and system.text_adapter == "rslora"
    plain = run_train(tmp_path / "b", *flags)
    assert {path.name for path in (plain / "model").glob("*/")} == {"unet_lora"}
    with pytest.raises(UsageError, match="--text_adapter dota: choose"):
        run_train(tmp_path / "c", *flags, "--text_adapter", "dota")


@pytest.mark.parametrize("eps", [1e-8, 1e-15])
def test_epsilon_is_adamws(eps):
    """Bit for bit PyTorch's, where gradients are so small that it decides."""
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 8)) for _ in range(2))
    descent = Descent({"w": ours}, 0.01, 0.0, False, eps)
    reference = torch.optim.AdamW([theirs], lr=1e-3, weight_decay=0.01, eps=eps, fused=True)
    for step in range(3):
        gradient = 1e-11 * torch.randn(8, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        descent.step(1e-3, 0.0)
        reference.step()
    assert torch.equal(ours, theirs)
    moved = (ours - torch.linspace(-1, 1, 8) * (1 - 1e-5) ** 3).abs().max().item()
    assert moved > 1e-3 if eps == 1e-15 else moved < 1e-5  # full steps, or hardly any
