"""DiT as a system: classes from folders, columns and prompts; the published loss and its gradient; drawing against the
published process run on diffusers' network; checkpoints of facebookresearch/DiT and fast-DiT; whole small runs."""

import argparse
import json
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import close
from PIL import Image
from test_dit import published, reference_loss
from torch import Tensor, nn

import nanomed
import sample
import train
from nanomed import data, systems, weights
from nanomed.adapters import lora
from nanomed.data import DataError
from nanomed.data.prompts import read_prompts
from nanomed.data.readers.classes import class_of, named
from nanomed.denoisers.dit import DiT, DiTConfig, positions
from nanomed.run import runs
from nanomed.systems.dit import KVASIR, RECIPES, ClassDiT

CLASSES = ("dyed lifted polyps", "normal z line", "polyps")
SHAPE = dict(depth=2, hidden_size=48, num_heads=2, patch_size=2, input_size=8)
VAE = dict(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4)
STEPS = 20


def miniature() -> tuple[ClassDiT, diffusers.DiTTransformer2DModel, diffusers.AutoencoderKL]:
    """Ours, and diffusers' network and autoencoder with the same weights. (The two numbers that are set in the network
    are explained in test_dit.py.) As in test_pixart_pipeline.py its last layer is fitted to the noise of latents."""
    torch.manual_seed(0)
    reference = diffusers.DiTTransformer2DModel(2, 24, 4, 8, 2, sample_size=8, patch_size=2, num_embeds_ada_norm=3,
                                                norm_eps=1e-6).eval()  # fmt: skip
    shared = reference.transformer_blocks[0].norm1.emb
    shared.time_proj.downscale_freq_shift = 0
    for block in reference.transformer_blocks:
        block.norm1.emb = shared
    vae = diffusers.AutoencoderKL(**VAE, latent_channels=4, down_block_types=["DownEncoderBlock2D"] * 4,
                                  up_block_types=["UpDecoderBlock2D"] * 4, scaling_factor=0.18215).eval()  # fmt: skip
    fitted(reference)
    system = systems.build("dit-tiny", transformer=dict(SHAPE), vae=dict(VAE), size=64, classes=CLASSES).eval()
    tensors = {name: t.clone() for name, t in published(reference.state_dict(), system.transformer.config).items()}
    weights.load(system.transformer, tensors)
    weights.load(system.vae, {name: t.clone() for name, t in vae.state_dict().items()})
    return system, reference, vae


@torch.no_grad()
def fitted(network: nn.Module) -> None:
    network.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight *= 0.3
    network.pos_embed.proj.weight *= 10
    network.pos_embed.proj.bias.copy_(torch.tensor([30.0, -30.0]).repeat(24))
    torch.manual_seed(1)
    abars, seen = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0), []
    hook = network.proj_out_2.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0].flatten(0, 1)))
    t = torch.randint(0, 1000, (400,))
    noise, abar = torch.randn(400, 4, 8, 8), abars[t].view(-1, 1, 1, 1)
    network(abar.sqrt() * 0.6 * torch.randn_like(noise) + (1 - abar).sqrt() * noise, t, torch.randint(0, 4, (400,)))
    hook.remove()
    asked = noise.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16).double()
    found = torch.linalg.lstsq(torch.cat([seen[0], torch.ones(len(seen[0]), 1)], 1).double(), asked).solution
    network.proj_out_2.weight.view(2, 2, 8, -1)[:, :, :4] = found[:-1].T.view(2, 2, 4, -1)
    network.proj_out_2.bias.view(2, 2, 8)[:, :, :4] = found[-1].view(2, 2, 4)


class Draws:
    """The same draws for both: the i-th of any shape."""

    def __init__(self, rows: int):
        self.rows, self.drawn = rows, 0

    def randn(self, *shape: int) -> Tensor:
        self.drawn += 1
        return torch.randn(self.rows, *shape, generator=torch.Generator().manual_seed(self.drawn))


@torch.no_grad()
def theirs(network: nn.Module, labels: list[int], scale: float, channels: int, size: int = 64) -> Tensor:
    """Latents by the published sampler, written out: the process respaced to a few steps, betas derived anew, a learned
    range, nothing clamped; guidance of the first `channels`, the rest as the class has it."""
    grid = [round(i * 999 / (STEPS - 1)) for i in range(STEPS)]
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[grid]
    before = np.append(1.0, abar[:-1])
    betas = 1 - abar / before
    posterior = betas * (1 - before) / (1 - abar)
    clipped = np.log(np.append(posterior[1], posterior[1:]))
    noise = Draws(len(labels))
    x = noise.randn(4, size // 8, size // 8).double()
    y = torch.tensor([*labels, *[3] * len(labels)])
    for i in reversed(range(STEPS)):
        t = torch.full((len(y),), grid[i])
        with_class, without = network(torch.cat([x, x]).float(), t, y).sample.double().chunk(2)
        guided = without[:, :channels] + scale * (with_class - without)[:, :channels]
        epsilon, v = torch.cat([guided, with_class[:, channels:]], 1).chunk(2, 1)
        fraction = (v + 1) / 2
        log_variance = fraction * np.log(betas[i]) + (1 - fraction) * clipped[i]
        clean = (x - np.sqrt(1 - abar[i]) * epsilon) / np.sqrt(abar[i])
        x = (betas[i] * np.sqrt(before[i]) * clean + (1 - before[i]) * np.sqrt(1 - betas[i]) * x) / (1 - abar[i])
        if i > 0:
            x = x + torch.exp(0.5 * log_variance) * noise.randn(*x.shape[1:])
    return x


# -------------------------------------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize("three", [False, True])
def test_classes_to_pixels_equal_the_published_sampler(three):
    """Guidance of all four channels, and of the published three: latents to 1e-5 relative in norm, pixels to 1e-4."""
    system, network, vae = miniature()
    system.three_channels = three
    seen = []
    system.vae.post_quant_conv.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0] * 0.18215))
    with torch.no_grad():
        images = system.sample(["polyps", "An image of the normal z-line."], Draws(2), steps=STEPS)
    expected = theirs(network, [2, 1], 3.0, 3 if three else 4)
    other = theirs(network, [2, 1], 3.0, 4 if three else 3)
    assert ((seen[0] - expected).norm() / expected.norm()) <= 1e-5 < 0.01 < (expected - other).norm() / expected.norm()
    with torch.no_grad():
        decoded = vae.double().decode(expected / 0.18215).sample
    assert 0.3 < expected.std() < 3 and decoded.std() > 0.05
    close(images, (decoded / 2 + 0.5).clamp(0, 1), 1e-4)


@pytest.mark.parametrize("error", ["class", "guidance", "steps", "null", "variance"])
def test_the_comparison_sees_planted_errors(error):
    """Another class, 2% more guidance, a step less, a null class that is a class, a fixed variance."""
    system, network, _ = miniature()
    seen = []
    system.vae.post_quant_conv.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0] * 0.18215))
    changes = {"guidance": dict(guidance=3.06), "steps": dict(steps=STEPS - 1),
               "null": dict(negative_prompts=["polyps"] * 2)}  # fmt: skip
    if error == "variance":
        system.transformer.register_forward_hook(lambda module, inputs, out: out * torch.tensor([1.0, -1]).view(
            2, 1, 1).repeat_interleave(4, 0))  # fmt: skip
    prompts = ["polyps", "polyps" if error == "class" else "normal z line"]
    with torch.no_grad():
        system.sample(prompts, Draws(2), **{"steps": STEPS} | changes.get(error, {}))
    expected = theirs(network, [2, 1], 3.0, 4)
    assert (seen[0] - expected).norm() / expected.norm() > 1e-4


def test_a_guidance_of_1_asks_the_class_alone_and_other_shapes_are_drawn():
    system, network, _ = miniature()
    rows, seen = [], []
    system.transformer.register_forward_hook(lambda module, inputs, out: rows.append(len(out)))
    system.vae.post_quant_conv.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0] * 0.18215))
    with torch.no_grad():
        system.sample(["polyps"], Draws(1), steps=STEPS, guidance=1.0)
        assert system.sample(["polyps"], Draws(1), steps=2, height=32, width=96).shape == (1, 3, 32, 96)
    expected = theirs(network, [2], 1.0, 4)
    assert rows[:STEPS] == [1] * STEPS and ((seen[0] - expected).norm() / expected.norm()) <= 1e-5
    with pytest.raises(ValueError, match="72 x 64: sides must be multiples of 16"):
        system.sample(["polyps"], Draws(1), height=72, width=64)


# ------------------------------------------------------------------------------------------------------------- training


def test_the_loss_and_its_gradient_equal_the_published_ones():
    """training_losses of the published diffusion, on diffusers' network and posterior, with the same draws; the second
    label was dropped. To 1e-5 and, all parameters, 1e-4 of the largest gradient."""
    system, network, vae = miniature()
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    torch.manual_seed(4)
    losses = system({"image": images, "prompt": ["polyps", "", "normal-z-line"]}, "transformer", 0)
    torch.manual_seed(4)
    posterior = vae.encode(images).latent_dist
    x0 = ((posterior.mean + posterior.std * torch.randn(posterior.mean.shape)) * 0.18215).detach()
    t = torch.randint(1000, (3,))
    noise = torch.randn(x0.shape)
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t].view(-1, 1, 1, 1)
    xt = (abar.sqrt() * x0 + (1 - abar).sqrt() * noise).float()
    expected = reference_loss(network(xt, t, torch.tensor([2, 3, 1])).sample, x0, xt, t, noise).mean()
    close(losses["loss"], expected, 1e-5)
    close(losses["mse"] + losses["vlb"], losses["loss"], 1e-6)
    assert losses["vlb"] > 0 and not losses["mse"].requires_grad
    losses["loss"].backward()
    expected.backward()
    reference = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    gradients = published(reference, system.transformer.config)
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, parameter in system.transformer.named_parameters():
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-4 * largest, name


def test_cached_latents_give_the_same_loss():
    system, _, _ = miniature()
    batch = {"image": torch.rand(2, 3, 64, 64) * 2 - 1, "prompt": ["polyps", ""]}
    frozen = system.frozen("transformer")
    assert frozen.keys() == {"image"} and frozen["image"][0] == "vae"
    losses = []
    for given in (batch, frozen["image"][1](batch["image"]) | {"prompt": batch["prompt"]}):
        torch.manual_seed(6)
        losses.append(system(given, "transformer", 0)["loss"])
    close(*losses, 1e-6)
    assert system(system.example("transformer", 2, torch.device("cpu")), "transformer", 0)["loss"].isfinite()
    assert system.example("vae", 2, torch.device("cpu"))["image"].shape == (2, 3, 64, 64)


def test_the_recipe_is_fast_dits():
    """Its train.py: AdamW at 1e-4 without decay or clipping, batches of 256, an average of 0.9999, a tenth of
    the labels dropped. S/8 for eight classes has the weights of the manifest, less its table of positions."""
    recipe = RECIPES["dit-s8"][""] | RECIPES["dit-s8"]["transformer"]
    assert (recipe["lr"], recipe["batch"], recipe["weight_decay"], recipe["ema"]) == (1e-4, 256, 0.0, 0.9999)
    assert recipe["clip"] == 0 and ClassDiT.dropout == 0.1
    system = systems.build("dit-s8", random=True)
    assert system.transformer.config == DiTConfig.named("S/8", num_classes=8) and system.latent_shape == (4, 64, 64)
    assert (system.steps, system.guidance, system.three_channels, system.size) == (250, 4.0, False, 512)
    assert sum(p.numel() for p in system.transformer.parameters()) == 32_785_664 - 64 * 384
    other = systems.build("dit-s8", random=True, dit="B/4", size=256)
    assert other.transformer.config == DiTConfig.named("B/4", num_classes=8, input_size=32)


# -------------------------------------------------------------------------------------------------------------- classes


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 40), (len(path.parent.name) * 5, 60, 90)).save(path)


def test_classes_come_from_folders_and_columns(tmp_path):
    """Prompts become names; abbreviations of diagnoses are spelled out; a sentence is a class where nothing else is."""
    for label in ("polyps", "normal-z-line", "dyed-lifted-polyps"):
        picture(tmp_path / "kvasir" / label / "a.png")
    table, names = named(data.load(f"kvasir:{tmp_path / 'kvasir'}"))
    assert names == CLASSES and sorted(row.prompts for row in table.rows) == [(name,) for name in CLASSES]
    for label in ("MEL", "nv"):
        picture(tmp_path / "skin" / label / "a.png")
    assert named(data.load(f"skin:{tmp_path / 'skin'}"))[1] == ("melanocytic nevus", "melanoma")
    for name in "ab":
        picture(tmp_path / "plain" / f"{name}.png")
    rows = "file_name,text,category\na.png,shiny,polyps\nb.png,dull,ulcer_x\n"
    (tmp_path / "plain" / "metadata.csv").write_text(rows)
    assert named(data.load(f"folder:{tmp_path / 'plain'}"))[1] == ("polyps", "ulcer x")
    (tmp_path / "plain" / "metadata.csv").write_text("file_name,text\na.png,shiny\nb.png,shiny\nb.png,dull\n")
    table, names = named(data.load(f"folder:{tmp_path / 'plain'}"))
    assert names == ("dull", "shiny") and {row.prompts for row in table.rows} == {("shiny",), ("shiny", "dull")}
    (tmp_path / "plain" / "metadata.csv").write_text("file_name,text\na.png,shiny\nb.png,dull\n")
    with pytest.raises(DataError, match="folder: no classes; put images into class folders, or add a column label"):
        named(data.load(f"folder:{tmp_path / 'plain'}"))
    (tmp_path / "plain" / "metadata.csv").write_text("file_name,text,category\na.png,x,polyps\nb.png,y,\n")
    with pytest.raises(DataError, match="b.png: has no class, as others have"):
        named(data.load(f"folder:{tmp_path / 'plain'}"))


def test_prompts_name_classes():
    for prompt, index in {"polyps": 2, "POLYPS": 2, "normal-z-line": 1, "normal_z_line": 1, "": None, " ": None,
                          "An endoscopic image of dyed-lifted-polyps.": 0, "polyps, two of them": 2,
                          "dyed lifted polyps": 0}.items():  # fmt: skip
        assert class_of(prompt, CLASSES) == index, prompt
    assert class_of("MEL", ("melanocytic nevus", "melanoma")) == 1 == class_of("10", ("1", "10"))
    with pytest.raises(DataError, match="'a polyp' names no class; the model knows: dyed lifted polyps, normal z line"):
        class_of("a polyp", CLASSES)
    with pytest.raises(DataError, match=r"names several classes \(normal z line, polyps\)"):
        class_of("polyps beside the normal z line", CLASSES)


def test_prompts_files_have_a_column_for_words_and_one_for_classes(tmp_path):
    """A system takes its own first; one column alone serves either."""
    path = tmp_path / "prompts.csv"
    path.write_text("prompt,Category\nshiny,polyps\ndull,\n")
    assert read_prompts(path) == ["shiny", "dull"]
    assert read_prompts(path, ClassDiT.columns) == ["polyps", ""]
    path.write_text("label,seed\npolyps,1\n")
    assert read_prompts(path) == read_prompts(path, ClassDiT.columns) == ["polyps"]


def test_a_system_adopts_the_classes_of_its_data(tmp_path):
    """Embeddings anew for their number, named in what is saved; the same classes again change nothing."""
    torch.manual_seed(0)
    system = systems.build("dit-tiny", transformer=dict(SHAPE), vae=dict(VAE), size=64)
    assert system.classes == KVASIR and system.transformer.config.num_classes == 8
    for label in ("polyps", "normal-z-line", "dyed-lifted-polyps"):
        picture(tmp_path / label / "a.png")
    table = system.adopt(data.load(f"kvasir:{tmp_path}"))
    embedding = system.transformer.y_embedder.embedding_table.weight
    assert system.classes == CLASSES and embedding.shape == (4, 48) and 0.01 < embedding.std() < 0.03
    system.adopt(table)
    assert system.transformer.y_embedder.embedding_table.weight is embedding
    assert system.encode_text(["polyps", "", "a normal-z-line"])["labels"].tolist() == [2, 3, 1]
    nn.init.normal_(system.transformer.final_layer.linear.weight, std=0.1)
    system.eval().save(tmp_path / "saved")
    again = nanomed.load(tmp_path / "saved")
    assert again.config() == system.config() and again.classes == CLASSES
    with torch.no_grad():
        images = [s.sample(["polyps"], Draws(1), steps=2) for s in (system, again)]
    close(images[1], images[0], 1e-6)
    system.adapt("transformer", rank=2)
    assert sum(p.numel() for p in system.trainable("transformer").values()) == 2 * 2 * (4 * 48 + 2 * 48 + 2 * 5 * 48)
    assert lora.adapted(system.transformer)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def test_checkpoints_of_both_repositories_are_drawn_from(tmp_path, monkeypatch):
    """A fast-DiT .pt, of which the average is taken, and a flat one; the VAE under its repository's name. Classes are
    numbers. Nothing in a checkpoint is run."""
    torch.manual_seed(0)
    config = DiTConfig(1, 384, 6, 8, num_classes=3, input_size=16)
    network = DiT(config).eval()
    nn.init.normal_(network.final_layer.linear.weight, std=0.02)
    state = dict(network.state_dict()) | {"pos_embed": positions(2, 2, 384)}
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    torch.save(dict(model=other, ema=state, opt={}, args=argparse.Namespace(model="DiT-S/8")), tmp_path / "fast.pt")
    torch.save(state, tmp_path / "flat.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(weights.WeightsNotFound, match="hf download stabilityai/sd-vae-ft-ema"):
        nanomed.load("dit-s8", weights=tmp_path / "fast.pt")
    diffusers.AutoencoderKL(**VAE, latent_channels=4, down_block_types=["DownEncoderBlock2D"] * 4,
                            up_block_types=["UpDecoderBlock2D"] * 4).save_pretrained(
        tmp_path / "weights" / "stabilityai" / "sd-vae-ft-ema")  # fmt: skip
    drawn = []
    for name in ("fast.pt", "flat.pt"):
        system = nanomed.load("dit-s8", weights=tmp_path / name)
        assert (system.size, system.classes, system.transformer.config) == (128, ("0", "1", "2"), config)
        with torch.no_grad():
            drawn.append(system.sample(["2", "1"], Draws(2), steps=2))
    assert torch.equal(*drawn) and not torch.equal(drawn[0][0], drawn[0][1])
    with pytest.raises(weights.WeightsNotFound, match="say which checkpoint, --weights FILE.pt"):
        nanomed.load("dit-s8")


# ----------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("model", ["dit-tiny", "hunyuan-tiny"])
def test_tiny_presets_train_from_nothing_and_draw(model, tmp_path, monkeypatch):
    """train.py through all stages on the toy world, and sample.py from the run it leaves."""
    words = ["train.py", "--model", model, "--data", "toy:12", "--batch", "2", "--steps", "2", "--save_every", "2",
             "--valid", "0.2", "--score_images", "0", "--log_every", "1"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path / "runs"), "--cache", str(tmp_path / "cache")])
    cls = type(systems.build(model))
    real = cls.sample
    monkeypatch.setattr(cls, "sample", lambda self, prompts, noise, *_, **__: torch.zeros(len(prompts), 3, 32, 32))
    assert train.main() == 0
    monkeypatch.setattr(cls, "sample", real)
    run = runs.newest(tmp_path / "runs")
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in log if "stage" in line} == set(systems.build(model).stages)
    system = nanomed.load(run)
    assert system.vae.scale != 0.18215 and not lora.adapted(system.transformer)
    prompt = system.classes[3] if model == "dit-tiny" else "Generate an image with 1 polyp."
    (tmp_path / "prompts.csv").write_text(f'id,label\n1,"{prompt}"\n2,""\n')
    words = ["sample.py", "--model", str(run), "--prompts", str(tmp_path / "prompts.csv"), "--steps", "2", "--batch",
             "2"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path / "drawn")])
    sample.main()
    lines = [json.loads(line) for line in (tmp_path / "drawn" / "manifest.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [prompt, ""]
    assert Image.open(tmp_path / "drawn" / "00001.png").size == (32, 32)
    if model == "dit-tiny":
        (tmp_path / "prompts.csv").write_text("label\nnothing known\n")
        monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path / "other")])
        with pytest.raises(DataError, match="'nothing known' names no class"):
            sample.main()
        assert not (tmp_path / "other").exists()


def test_training_on_class_folders(tmp_path, monkeypatch):
    """Rows of two classes; the run knows their names, and its prompts are theirs."""
    for label in ("polyps", "normal-z-line"):
        for i in range(4):
            picture(tmp_path / "data" / label / f"{i}.png")
    words = ["train.py", "--model", "dit-tiny", "--data", f"kvasir:{tmp_path / 'data'}", "--batch", "2", "--steps", "1",
             "--save_every", "1", "--valid", "0.25", "--score_images", "0"]  # fmt: skip
    monkeypatch.setattr(ClassDiT, "sample", lambda self, prompts, noise, **_: torch.zeros(len(prompts), 3, 32, 32))
    (tmp_path / "prompts.csv").write_text("prompt,label\nshiny,ulcer\n")
    for flag in ("--grid_prompts", "--test_prompts"):  # said before anything is made
        monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path / "no"), flag, str(tmp_path / "prompts.csv")])
        with pytest.raises(DataError, match="'ulcer' names no class; the model knows: normal z line, polyps"):
            train.main()
        assert not (tmp_path / "no").exists()
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path / "runs"), "--cache", str(tmp_path / "cache")])
    asked = []
    monkeypatch.setattr(ClassDiT, "encode_text", lambda self, prompts: asked.extend(prompts) or {
        "labels": torch.zeros(len(prompts), dtype=torch.int64)})  # fmt: skip
    assert train.main() == 0
    assert nanomed.load(runs.newest(tmp_path / "runs")).classes == ("normal z line", "polyps")
    assert asked and set(asked) <= {"normal z line", "polyps", ""}
