"""The PixArt system from prompts to pixels against diffusers' PixArtAlphaPipeline, on miniature checkpoints.

A network with random weights is a blind test: its latents have a standard deviation of 200, and what reaches the
decoder's first norm is noise in whatever way it came about. So the last layer of the miniatures is fitted, in closed
form, to predict the noise in latents of unit variance, and the text is made to matter. The last tests show what the
comparison sees.
"""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from conftest import close
from diffusers.image_processor import PixArtImageProcessor
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha as published
from safetensors.torch import save_file
from torch import Tensor, nn

import nanomed
from nanomed import systems, weights
from nanomed.adapters import lora
from nanomed.systems.pixart import PixArt, read_scheduler
from nanomed.systems.sizes import binned, cropped
from nanomed.text.t5 import T5Encoder
from nanomed.text.unigram import train_unigram

PROMPTS = ["  An endoscopic image of a POLYP in the left part, shiny and wet.", "A dermoscopic image: Melanoma."]
LATENTS, IMAGES = 1e-5, 1e-4  # tolerances: final latents, relative in norm; images before they are clamped
KINDS = {"256": 32, "512": 64, "1024-MS": 128}  # the side of the latents that tells the versions apart

# name -> version, height, width, resolution binning, negative prompts
CASES = {
    "512 as it comes": ("512", None, None, True, None),
    "512 wide": ("512", 64, 160, False, None),
    "1024-MS square": ("1024-MS", 96, 96, False, None),
    "1024-MS tall": ("1024-MS", 160, 96, False, ["blurred", ""]),
    "256 through a trained size": ("256", 190, 300, True, None),
}


def fitted(transformer: nn.Module) -> None:
    """Least squares for the last layer: from what it sees at noised normal latents to the noise in them.

    A large bias at the patches' projection lets the magnitude of a patch through the norms, which else hide it: then
    the sampler is steered back towards the data at every step, as by a trained network."""
    transformer.pos_embed.proj.weight *= 10
    transformer.pos_embed.proj.bias.copy_(torch.tensor([30.0, -30.0]).repeat(24))
    torch.manual_seed(1)
    alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    seen, asked = [], []
    hook = transformer.proj_out.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0].flatten(0, 1)))
    for rows, height, width in [(8, 64, 64), (32, 8, 20), (32, 12, 12), (32, 20, 12), (8, 26, 40)]:
        t = torch.randint(0, 1000, (rows,))
        abar = alphas_cumprod[t].view(-1, 1, 1, 1)
        noise = torch.randn(rows, 4, height, width)
        x = abar.sqrt() * 0.6 * torch.randn_like(noise) + (1 - abar).sqrt() * noise
        size = torch.tensor([[8.0 * height, 8.0 * width]] * rows)
        sizes = dict(resolution=size, aspect_ratio=size[:, :1] / size[:, 1:])
        transformer(x, torch.randn(rows, 5, transformer.config.caption_channels), t, sizes)
        patches = noise.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 3, 5, 1)  # (rows, h, w, p, p, 4)
        asked.append(patches.reshape(-1, 16))
    hook.remove()
    features = torch.cat(seen).double()  # (N, D); a norm makes their sum 0, so that there is no need for one of them
    features = torch.cat([features[:, 1:], torch.ones(len(features), 1)], 1)
    found = torch.linalg.lstsq(features, torch.cat(asked).double()).solution
    weight = transformer.proj_out.weight.view(2, 2, 8, -1)
    weight[:, :, :4] = torch.cat([torch.zeros(1, 16), found[:-1]]).T.view(2, 2, 4, -1)
    transformer.proj_out.bias.view(2, 2, 8)[:, :, :4] = found[-1].view(2, 2, 4)


@torch.no_grad()
def miniature(folder: Path, sample_size: int) -> Path:
    """A checkpoint in the published layout with the published names, its tokenizer a spiece.model alone."""
    torch.manual_seed(0)
    tokenizer = train_unigram([prompt.lower() for prompt in PROMPTS] + ["blurred"], 80)
    tokenizer.save(folder / "tokenizer")
    t5 = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=len(tokenizer) + 3,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            is_gated_act=True,
        )  # fmt: skip
    )
    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=24, cross_attention_dim=48, num_layers=2, caption_channels=32,
        sample_size=sample_size,
    )  # fmt: skip
    fitted(transformer)
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, scaling_factor=0.18215,
    )  # fmt: skip
    for name, part in dict(transformer=transformer, vae=vae, text_encoder=t5).items():
        part.save_pretrained(folder / name)
    diffusers.DPMSolverMultistepScheduler().save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {kind: miniature(tmp_path_factory.mktemp(kind), side) for kind, side in KINDS.items()}


class Draws:
    """The same initial latents for both."""

    def __init__(self, rows: int):
        self.rows, self.drawn = rows, []

    def randn(self, *shape: int) -> Tensor:
        self.drawn.append(torch.randn(self.rows, *shape, generator=torch.Generator().manual_seed(5)))
        return self.drawn[-1]


def watch(vae: nn.Module) -> list[Tensor]:
    """What goes into a decoder and what comes out of it: latents without their factor, images before the clamp."""
    seen = []
    vae.post_quant_conv.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    vae.decoder.register_forward_hook(lambda module, inputs, out: seen.append(out))
    return seen


def pipeline(folder: Path) -> published.PixArtAlphaPipeline:
    pipe = published.PixArtAlphaPipeline(
        tokenizer=transformers.T5Tokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=transformers.T5EncoderModel.from_pretrained(folder / "text_encoder"),
        vae=diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
        transformer=diffusers.PixArtTransformer2DModel.from_pretrained(folder / "transformer"),
        scheduler=diffusers.DPMSolverMultistepScheduler.from_pretrained(folder / "scheduler"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def reference(folder: Path, case: str) -> tuple[Tensor, Tensor, Tensor]:
    """Final latents, images before the clamp, and images of diffusers' pipeline.

    The second are decoded once more in float64, from its own latents: diffusers' decoder rounds to 1e-4 of its largest
    value at 512 pixels, which is the whole tolerance (ours to 1e-6)."""
    _, height, width, binning, negative = CASES[case]
    pipe = pipeline(folder)
    seen = watch(pipe.vae)
    shape = (height or pipe.transformer.config.sample_size * 8, width or pipe.transformer.config.sample_size * 8)
    drawn = binned(*shape, pipe.transformer.config.sample_size) if binning else shape
    latents = Draws(2).randn(4, drawn[0] // 8, drawn[1] // 8)
    images = pipe(PROMPTS, negative or "", latents=latents, height=height, width=width, output_type="pt",
                  clean_caption=False, use_resolution_binning=binning).images  # fmt: skip
    exact = pipe.vae.double().decode(seen[0].double()).sample
    assert (exact - seen[1]).abs().max() < 1e-3 * exact.abs().max()
    return seen[0] * 0.18215, exact, images


@torch.no_grad()
def ours(system: PixArt, case: str, **changes) -> tuple[Tensor, Tensor, Tensor]:
    _, height, width, binning, negative = CASES[case]
    seen, noise = watch(system.vae), Draws(2)
    options = dict(height=height, width=width, negative_prompts=negative, binning=binning) | changes
    images = system.sample(PROMPTS, noise, **options)
    assert len(noise.drawn) == 1
    return seen[0] * 0.18215, seen[1], images


def errors(out: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> tuple[float, float]:
    """Of the latents, relative in norm, and of the images before the clamp, as `close` has it."""
    latents, images = ((a.double(), b.double()) for a, b in zip(out[:2], expected[:2]))
    of_images = (images[0] - images[1]).abs().max() / max(1.0, images[1].abs().max())
    return ((latents[0] - latents[1]).norm() / latents[1].norm()).item(), of_images.item()


# --------------------------------------------------------------------------------------------------------------- parity


@pytest.fixture(scope="module")
def expected(folders) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """What diffusers makes of every case."""
    return {case: reference(folders[CASES[case][0]], case) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_prompts_to_pixels_equal_diffusers(case, folders, expected):
    out = ours(nanomed.load("pixart", weights=folders[CASES[case][0]]), case)
    latents, images = errors(out, expected[case])
    assert 0.5 < expected[case][0].std() < 2 and expected[case][1].std() > 0.1
    assert latents <= LATENTS and images <= IMAGES, (latents, images)
    unit = (cropped(expected[case][1], *out[2].shape[2:]) / 2 + 0.5).clamp(0, 1)
    close(out[2], unit, IMAGES)
    close(out[2], expected[case][2], 1e-3)  # the pipeline's own images, rounded as they are


@pytest.mark.parametrize("case", ["512 wide", "1024-MS tall", "256 through a trained size"])
@pytest.mark.parametrize("error", ["vae", "null text", "steps", "guidance"])
def test_the_comparison_sees_planted_errors(error, case, folders, expected):
    """Another VAE's factor, a null text that is not "", 19 steps instead of 20 and 2% more guidance: each exceeds one
    of the two tolerances tenfold."""
    system = nanomed.load("pixart", weights=folders[CASES[case][0]])
    if error == "vae":
        system.vae.scale = 0.13025  # SDXL's
    changes = {"null text": dict(negative_prompts=["a", "a"]), "steps": dict(steps=19), "guidance": dict(guidance=4.59)}
    latents, images = errors(ours(system, case, **changes.get(error, {})), expected[case])
    assert latents > 10 * LATENTS or images > 10 * IMAGES


def test_a_guidance_of_1_leaves_the_null_text_out(folders):
    """As the pipeline does at 1.0; one row of the network for each prompt."""
    folder, rows = folders["512"], []
    system = nanomed.load("pixart", weights=folder)
    system.transformer.register_forward_hook(lambda module, inputs, out: rows.append(len(out)))
    out = ours(system, "512 wide", guidance=1.0)
    pipe = pipeline(folder)
    latents = pipe(PROMPTS, latents=Draws(2).randn(4, 8, 20), height=64, width=160, output_type="latent",
                   clean_caption=False, use_resolution_binning=False, guidance_scale=1.0).images  # fmt: skip
    assert rows == [2] * 20 and ((out[0] - latents).norm() / latents.norm()) <= LATENTS


# -------------------------------------------------------------------------------------------------------- trained sizes


@pytest.mark.parametrize("kind", KINDS)
def test_trained_sizes_are_diffusers_tables(kind):
    table = getattr(published, f"ASPECT_RATIO_{KINDS[kind] * 8}_BIN")
    nearest = PixArtImageProcessor.classify_height_width_bin
    sizes = [(int(height), int(width)) for height, width in table.values()]
    sizes += [(height, width) for height in range(40, 2400, 97) for width in range(50, 2300, 89)]
    for height, width in sizes:
        assert binned(height, width, KINDS[kind]) == nearest(height, width, ratios=table), (height, width)
    assert {binned(*size, KINDS[kind]) for size in sizes} == set(sizes[: len(table)])
    assert binned(48, 80, 16) == (48, 80)


@pytest.mark.parametrize("height, width", [(190, 300), (300, 190), (256, 256), (100, 64), (511, 700)])
def test_images_are_cropped_as_diffusers_does(height, width):
    images = torch.randn(1, 3, 208, 304)
    expected = PixArtImageProcessor.resize_and_crop_tensor(images, width, height)
    assert torch.equal(cropped(images, height, width), expected) and expected.shape[2:] == (height, width)


def test_a_system_draws_the_size_it_trains_on(folders):
    """Which need not be one of the published; another that is asked for goes through the published ones."""
    system, noise = PixArt.published(folders["512"], size=64), Draws(1)
    assert system.sample(["a"], noise, steps=1).shape == (1, 3, 64, 64)
    assert system.sample(["a"], noise, steps=1, height=128, width=64).shape == (1, 3, 128, 64)
    assert [tuple(x.shape[1:]) for x in noise.drawn] == [(4, 8, 8), (4, 88, 44)]


def test_sizes_that_patches_do_not_fill_are_refused(folders):
    system = nanomed.load("pixart", weights=folders["512"])
    with pytest.raises(ValueError, match="72 x 64: sides must be multiples of 16"):
        system.sample(["a"], Draws(1), height=72, width=64, binning=False)
    with pytest.raises(ValueError, match="1 negative prompts for 2 prompts"):
        system.sample(["a", "b"], Draws(2), negative_prompts=["c"])


# ----------------------------------------------------------------------------------------------------------------- text


def test_text_is_encoded_as_the_pipeline_does(folders):
    """Lower-cased and stripped, 120 tokens; equal to transformers where there is text, zero behind it."""
    system, pipe = nanomed.load("pixart", weights=folders["512"]), pipeline(folders["512"])
    prompts = [*PROMPTS, "", "long " * 200, PROMPTS[0]]
    with torch.no_grad():
        states, mask, _, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, clean_caption=False)
        text = system.encode_text(prompts)
    assert torch.equal(text["attention_mask"], mask.bool()) and mask.shape == (5, 120) and mask[3].all()
    close(text["prompt_embeds"][mask.bool()], states[mask.bool()], 1e-5)
    assert (text["prompt_embeds"][~mask.bool()] == 0).all()


def test_text_is_computed_once_a_sample(folders):
    """T5 once for all distinct texts, the caption projection once; neither in the steps."""
    system, calls = nanomed.load("pixart", weights=folders["512"]), []
    for part in (system.text_encoder, system.transformer.caption_projection):
        part.register_forward_hook(lambda module, inputs, out: calls.append(tuple(out.shape[:2])))
    with torch.no_grad():
        system.sample(PROMPTS, Draws(2), height=32, width=32, binning=False, steps=5)
    longest = max(system.tokenizer.lengths([prompt.lower().strip() for prompt in PROMPTS]))
    assert calls == [(3, -(-longest // 8) * 8), (4, longest)] and longest < 120


# ------------------------------------------------------------------------------------------------------------- training


def example(rows: int = 2) -> dict:
    draw = torch.Generator().manual_seed(2)
    return {"image": torch.rand(rows, 3, 64, 96, generator=draw) * 2 - 1, "prompt": PROMPTS[:rows]}


@pytest.mark.parametrize("kind", ["512", "1024-MS"])
def test_the_training_loss_is_the_published_scripts(kind, folders):
    """With the same draws: posterior, factor, DDPM noise, first half of the channels, MSE; prompts word for word; its
    gradient in the transformer. In 1024-MS with the size of the image."""
    system, pipe, batch = nanomed.load("pixart", weights=folders[kind]), pipeline(folders[kind]), example()
    torch.manual_seed(4)
    loss = system(batch, "transformer", 0)["loss"]

    torch.manual_seed(4)
    posterior = pipe.vae.encode(batch["image"]).latent_dist
    x0 = (posterior.mean + posterior.std * torch.randn(posterior.mean.shape)) * 0.18215
    t = torch.randint(1000, (2,))
    noise = torch.randn(x0.shape)
    tokens = pipe.tokenizer(batch["prompt"], max_length=120, padding="max_length", truncation=True, return_tensors="pt")
    states = pipe.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    noised = diffusers.DDPMScheduler.from_config(pipe.scheduler.config).add_noise(x0, noise, t)
    size = dict(resolution=torch.tensor([[64.0, 96.0]] * 2), aspect_ratio=torch.tensor([[64 / 96]] * 2))
    out = pipe.transformer(noised, states, t, size, encoder_attention_mask=tokens.attention_mask).sample
    expected = nn.functional.mse_loss(out.chunk(2, 1)[0], noise)

    close(loss, expected, 1e-5)
    loss.backward()
    expected.backward()
    gradients = {name: p.grad for name, p in pipe.transformer.named_parameters()}
    largest = max(g.abs().max() for g in gradients.values())
    for name, parameter in system.transformer.named_parameters():
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-5 * largest, name


def test_cached_fields_give_the_same_loss(folders):
    system, batch = nanomed.load("pixart", weights=folders["512"]), example()
    frozen = system.frozen("transformer")
    fields = frozen["image"][1](batch["image"]) | frozen["text"][1](batch["prompt"])
    assert frozen["image"][0] == "vae" and frozen["text"][0] == "text_encoder"
    losses = []
    for given in (batch, fields):
        torch.manual_seed(6)
        losses.append(system(given, "transformer", 0)["loss"])
    close(*losses, 1e-6)
    assert system.frozen("transformer").keys() == {"image", "text"}
    assert system(system.example("transformer", 1, torch.device("cpu")), "transformer", 0)["loss"].isfinite()


def test_min_snr_weights_the_loss_of_each_row(folders):
    losses = []
    for gamma in (0.0, 5.0):
        system = PixArt.published(folders["512"], snr_gamma=gamma)
        torch.manual_seed(8)
        losses.append(system(example(1), "transformer", 0)["loss"])
    torch.manual_seed(8)
    torch.randn(1, 4, 8, 12)
    t = torch.randint(1000, (1,))
    close(losses[1], losses[0] * system.diffusion.min_snr_weight(t, 5.0)[0], 1e-6)


# -------------------------------------------------------------------------------------------------------------- folders


def test_other_forms_of_the_same_folder(folders, tmp_path, expected):
    """As `pipe.save_pretrained` writes it: shards, and a tokenizer.json beside or in the place of spiece.model."""
    pipeline(folders["512"]).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*/*-of-*.safetensors"))) > 6 and (tmp_path / "tokenizer/tokenizer.json").is_file()
    (tmp_path / "tokenizer/spiece.model").unlink(missing_ok=True)
    out = ours(nanomed.load("pixart", weights=tmp_path), "512 wide")
    assert all(torch.equal(a, b) for a, b in zip(out, ours(nanomed.load("pixart", weights=folders["512"]), "512 wide")))


def test_half_precision_files(folders, tmp_path, expected):
    """The fp16 variant in shards, read as float32 and as bfloat16; images are float32 in any case."""
    pipeline(folders["512"]).to(torch.float16).save_pretrained(tmp_path, variant="fp16", max_shard_size="60KB")
    assert not list(tmp_path.glob("*/model.safetensors")) and list(tmp_path.glob("*/*fp16*.safetensors"))
    for dtype, tolerance in ((torch.float32, 0.05), (torch.bfloat16, 0.5)):
        system = nanomed.load("pixart", weights=tmp_path, dtype=dtype)
        assert {p.dtype for p in system.parameters()} == {dtype}
        out = ours(system, "512 wide")
        latents, _ = errors(out, expected["512 wide"])
        assert latents < tolerance and out[2].dtype == torch.float32


def test_the_repository_is_found_in_the_cache_and_under_weights(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(FileNotFoundError, match="hf download PixArt-alpha/PixArt-XL-2-512x512"):
        nanomed.load("pixart")
    snapshot = tmp_path / "hub" / "models--PixArt-alpha--PixArt-XL-2-512x512" / "snapshots" / "0123abcd"
    shutil.copytree(folders["512"], snapshot)
    assert nanomed.load("pixart").size == 512
    shutil.copytree(folders["256"], tmp_path / "weights" / "PixArt-alpha" / "PixArt-XL-2-512x512")
    system = nanomed.load("pixart")
    assert system.size == 256 and system.base == "PixArt-alpha/PixArt-XL-2-512x512"
    assert nanomed.load("pixart", weights=folders["1024-MS"]).size == 1024


def test_the_schedule_is_the_files(folders, tmp_path):
    shutil.copytree(folders["512"], tmp_path / "other")
    path = tmp_path / "other" / "scheduler" / "scheduler_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | dict(beta_end=0.012, beta_schedule="scaled_linear")))
    diffusion = nanomed.load("pixart", weights=tmp_path / "other").diffusion
    expected = diffusers.DPMSolverMultistepScheduler.from_pretrained(path.parent)
    close(diffusion.alphas_cumprod, expected.alphas_cumprod, 1e-6)
    for odd in (dict(algorithm_type="sde-dpmsolver++"), dict(use_karras_sigmas=True), dict(solver_order=3)):
        path.write_text(json.dumps(settings | odd))
        with pytest.raises(weights.WeightsError, match=f"scheduler_config.json: {next(iter(odd))} = .* is not known"):
            read_scheduler(path.parent)
    path.write_text(json.dumps(settings | dict(_class_name="DDPMScheduler")))
    with pytest.raises(weights.WeightsError, match="sampled by DPMSolverMultistepScheduler, not by DDPMScheduler"):
        read_scheduler(path.parent)
    path.write_text("{")
    with pytest.raises(weights.WeightsError, match="scheduler_config.json"):
        nanomed.load("pixart", weights=tmp_path / "other")


def test_parts_that_do_not_belong_together_are_refused(folders, tmp_path):
    shutil.copytree(folders["512"], tmp_path / "mixed")
    config = tmp_path / "mixed" / "text_encoder" / "config.json"
    system = nanomed.load("pixart", weights=folders["512"])
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(d_model=24)))
    other = T5Encoder(replace(system.text_encoder.config, d_model=24))
    save_file(dict(other.state_dict()), tmp_path / "mixed" / "text_encoder" / "model.safetensors")
    with pytest.raises(weights.WeightsError, match=r"text and latents of \(32, 4\) channels beside .* \(24, 4\)"):
        nanomed.load("pixart", weights=tmp_path / "mixed")


@pytest.mark.parametrize("form", ["adapter", "transformer", "from scratch"])
def test_a_trained_system_is_saved_and_read_again(form, folders, tmp_path):
    """On a published base the adapter alone, or the transformer alone; without one, everything. Training lowers the
    loss, and what is read draws the same images."""
    if form == "from scratch":
        parts = dict(transformer=dict(num_attention_heads=2, attention_head_dim=24, num_layers=1, caption_channels=16,
                                      sample_size=4),
                     text_encoder=dict(vocab_size=90, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2),
                     vae=dict(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4))  # fmt: skip
        system = PixArt.build(**parts, steps=4, guidance=2.0)
        system.tokenizer = train_unigram(PROMPTS, 60)
    else:
        system = systems.build("pixart", str(folders["512"]), size=64)
    if form == "adapter":
        system.adapt("transformer", rank=4)
    params = system.trainable("transformer")
    assert all(name.startswith("transformer.") for name in params)
    assert all(".lora_" in name for name in params) == (form == "adapter")
    fields = {}
    for kind, (_, make) in system.frozen("transformer").items():
        fields |= make(example()["image" if kind == "image" else "prompt"])
    optimizer = torch.optim.Adam(params.values(), 1e-3)
    losses = []
    for step in range(30):
        torch.manual_seed(step % 3)
        loss = system({name: t.detach() for name, t in fields.items()}, "transformer", step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])

    system.save(tmp_path / "model")
    written = {"adapter": {"transformer_lora"}, "transformer": {"transformer"}}
    everything = {"transformer", "text_encoder", "vae", "tokenizer"}
    assert {path.name for path in (tmp_path / "model").glob("*/")} == written.get(form, everything)
    again = nanomed.load(tmp_path / "model")
    assert not any(lora.adapted(part) for part in again.children()) and again.config() == system.config()
    with torch.no_grad():
        images = [s.sample(PROMPTS, Draws(2), height=32, width=32, binning=False) for s in (system, again)]
    close(images[1], images[0], 1e-4)


@pytest.mark.slow
def test_the_published_shapes_without_a_file():
    """For dry runs: 5.5 billion weights are zeros that take no memory."""

    def resident() -> int:
        return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10

    before = resident()
    system = systems.build("pixart", random=True, dtype=torch.bfloat16)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in system.named_children()}
    assert counts == dict(transformer=610_856_096, text_encoder=4_762_310_656, vae=83_653_863)
    assert resident() - before < 400 << 20  # of 10.9 GB
    assert not system.text_encoder.shared.weight[:9].any()
    fields = system.example("transformer", 2, torch.device("cpu"))
    assert fields["moments"].shape == (2, 8, 64, 64) and fields["prompt_embeds"].shape == (2, 120, 4096)
