"""Kandinsky 2.2 from prompt to pixels against diffusers' two pipelines, on miniatures that are saved as the published
repositories: the same noise in the same order, every revision of the schedulers' files, mistakes that must show."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from conftest import close
from diffusers import KandinskyV22Pipeline, KandinskyV22PriorPipeline

import nanomed
from nanomed import weights
from nanomed.diffusion.process import Diffusion
from nanomed.systems.kandinsky2 import Kandinsky2
from nanomed.text.tokenizers import train_bpe

PROMPTS = ["Generate an image with 1 polyp.", "Generate an image containing a green/black box artefact.", "polyp"]
NEGATIVE = ["box", "an image with an instrument", ""]
LENGTH, WIDTH = 16, 24  # tokens; width of the embeddings
MAIN = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=True, clip_sample_range=1.0,
            steps_offset=1, timestep_spacing="leading", variance_type="fixed_small", thresholding=False)  # fmt: skip
REVISIONS = {  # what the decoder's scheduler_config.json may say
    "main": {},
    "a learned variance, thresholding": dict(variance_type="learned_range", clip_sample=False, thresholding=True,
                                             dynamic_thresholding_ratio=0.9, sample_max_value=2.0),
    "fixed_small_log, linspace": dict(variance_type="fixed_small_log", timestep_spacing="linspace", steps_offset=0),
    "fixed_large, no clamp": dict(variance_type="fixed_large", clip_sample=False),
}  # fmt: skip


def miniature(folder: Path, revision: str = "main") -> Path:
    """The two repositories in small: random weights, scaled such that latents and embeddings are of unit size."""
    torch.manual_seed(0)
    train_bpe(PROMPTS, 60).save(folder / "t")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "t", model_max_length=LENGTH)
    text = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH, hidden_act="gelu", projection_dim=WIDTH, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14,
        hidden_act="gelu", projection_dim=WIDTH,
    )  # fmt: skip
    prior = diffusers.PriorTransformer(num_attention_heads=4, attention_head_dim=8, num_layers=2, embedding_dim=WIDTH,
                                       num_embeddings=LENGTH)  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        in_channels=4, out_channels=8, block_out_channels=(32, 32, 64), layers_per_block=1, cross_attention_dim=16,
        attention_head_dim=16, encoder_hid_dim=WIDTH, norm_num_groups=16,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", resnet_time_scale_shift="scale_shift",
        encoder_hid_dim_type="image_proj", addition_embed_type="image",
    )  # fmt: skip
    movq = diffusers.VQModel(
        block_out_channels=(32, 32, 64), layers_per_block=1, latent_channels=4, num_vq_embeddings=20, vq_embed_dim=4,
        norm_num_groups=16, norm_type="spatial",
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
    )  # fmt: skip
    text_encoder = transformers.CLIPTextModelWithProjection(text)
    image_encoder = transformers.CLIPVisionModelWithProjection(vision)
    with torch.no_grad():
        for name in ("positional_embedding", "prd_embedding", "clip_mean"):
            getattr(prior, name).normal_()
        prior.clip_std.uniform_(0.5, 2)
        prior.proj_to_clip_embeddings.weight.mul_(2)
        unet.conv_out.weight[:4].mul_(0.5)
        follow_the_noise(unet)
        for tower in (text_encoder, image_encoder):  # transformers starts them so small that all texts look alike
            for p in tower.parameters():
                p.mul_(4 if p.dim() > 1 else 1)
    processor = transformers.CLIPImageProcessor()
    unclip = diffusers.UnCLIPScheduler(
        variance_type="fixed_small_log", clip_sample_range=10.0, prediction_type="sample"
    )
    ddpm = diffusers.DDPMScheduler(**MAIN | REVISIONS[revision])
    first = KandinskyV22PriorPipeline(prior, image_encoder, text_encoder, tokenizer, unclip, processor)
    first.save_pretrained(folder / "kandinsky-2-2-prior")
    KandinskyV22Pipeline(unet, ddpm, movq).save_pretrained(folder / "kandinsky-2-2-decoder")
    return folder


def follow_the_noise(unet) -> None:
    """Let epsilon be mostly x, as a trained U-Net's is, and the rest random: else the clamp of x_0 hides mistakes.
    x and -x go along the outermost skip, and silu(x) - silu(-x) = x."""
    last, i = unet.up_blocks[-1].resnets[-1], torch.arange(8)
    sign = torch.tensor([1.0] * 4 + [-1.0] * 4)
    unet.conv_in.weight[:8], unet.conv_in.bias[:8] = 0, 0
    unet.conv_in.weight[i, i % 4, 1, 1] = sign
    last.conv_shortcut.weight[:8] = 0
    last.conv_shortcut.weight[i, 32 + i, 0, 0] = 1
    unet.conv_out.weight[i % 4, i, 1, 1] += 0.9 * sign


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder(revision): the miniature of a revision, made once."""
    made: dict[str, Path] = {}

    def get(revision: str = "main") -> Path:
        if revision not in made:
            made[revision] = miniature(tmp_path_factory.mktemp("published"), revision)
        return made[revision]

    return get


def pipelines(folder: Path, dtype: torch.dtype = torch.float64) -> tuple:
    first = KandinskyV22PriorPipeline.from_pretrained(folder / "kandinsky-2-2-prior")
    second = KandinskyV22Pipeline.from_pretrained(folder / "kandinsky-2-2-decoder")
    for pipeline in (first, second):
        pipeline.to(dtype).set_progress_bar_config(disable=True)
    return first, second


class Replay:
    """diffusers' draws: one generator, all rows of a batch at once. Rows of negative prompts come behind the others."""

    def __init__(self, rows: int, dtype: torch.dtype):
        self.rows, self.dtype, self.generator = rows, dtype, torch.Generator().manual_seed(0)

    def randn(self, *shape: int) -> torch.Tensor:
        if len(shape) == 2:  # (1 or 2, E): the prior
            return torch.randn(shape[0], self.rows, shape[1], generator=self.generator, dtype=self.dtype).transpose(
                0, 1
            )
        return torch.randn(self.rows, *shape, generator=self.generator, dtype=self.dtype)


SETTINGS = dict(height=32, width=32, steps=4, prior_steps=3, guidance=4.0, prior_guidance=4.0, negative=None)


def reference(pipelines, prompts, height, width, steps, prior_steps, guidance, prior_guidance, negative):
    """diffusers: embeddings, what they are guided away from, final latents, images before they are clamped."""
    first, second = pipelines
    generator = torch.Generator().manual_seed(0)
    imagined = first(prompts, negative, num_inference_steps=prior_steps, generator=generator,
                     guidance_scale=prior_guidance)  # fmt: skip
    embeds, null = imagined.image_embeds, imagined.negative_image_embeds
    latents = second(embeds, null, height, width, num_inference_steps=steps, generator=generator,
                     guidance_scale=guidance, output_type="latent").images  # fmt: skip
    return embeds, null, latents, second.movq.decode(latents, force_not_quantize=True).sample


def ours(system: Kandinsky2, prompts, height, width, steps, prior_steps, guidance, prior_guidance, negative):
    noise = Replay(len(prompts), system.dtype)
    embeds = system.imagine(prompts, noise, prior_steps, prior_guidance, negative)
    latents = system.draw(embeds, (height, width), noise, steps, guidance)
    return *embeds, latents, system.movq.decode(latents)


def excess(found, expected, latents: float = 1e-5) -> float:
    """The largest error of embeddings, nulls and latents (1e-5 of the largest value) and images (1e-4), in units of
    its tolerance."""
    return max(
        (out.double() - ref.double()).abs().max().item() / (tolerance * max(1.0, ref.abs().max().item()))
        for out, ref, tolerance in zip(found, expected, (1e-5, 1e-5, latents, 1e-4), strict=True)
    )


# ------------------------------------------------------------------------------------------------- prompt to pixels

CASES = {
    "32 x 32": ("main", {}),
    "48 x 32": ("main", dict(height=48)),
    "40 x 64, rounded up to 48 x 64": ("main", dict(height=40, width=64)),
    "negative prompts": ("main", dict(negative=NEGATIVE, height=48)),
    "no guidance": ("main", dict(guidance=1.0, prior_guidance=1.0)),
    "other steps and scales": ("main", dict(steps=3, prior_steps=5, guidance=2.5, prior_guidance=6.0)),
    **{revision: (revision, {}) for revision in REVISIONS if revision != "main"},
}


@torch.no_grad()
@pytest.mark.parametrize("revision, change", CASES.values(), ids=CASES)
def test_prompt_to_pixels_equals_diffusers(folder, revision, change):
    """In float64, because x_0 = (x - sigma epsilon) / signal amplifies rounding tenfold at the first steps. (The tables
    of the schedules are float32 on both sides, as published.)"""
    settings = SETTINGS | change
    expected = reference(pipelines(folder(revision)), PROMPTS, **settings)
    system = nanomed.load("kandinsky2", weights=folder(revision), dtype=torch.float64)
    found = ours(system, PROMPTS, **settings)
    assert found[3].shape[2:] == tuple(-(-side // 16) * 16 for side in (settings["height"], settings["width"]))
    assert excess(found, expected) <= 1
    if revision == "main":
        assert 0.4 < expected[2].std() < 1.5 and 0.5 < expected[0].std() < 2


@torch.no_grad()
def test_in_fp32_only_rounding_is_added(folder):
    """Embeddings to 1e-5, images to 1e-4; the latents to 1e-4, which is what their own amplification leaves."""
    expected = reference(pipelines(folder(), torch.float32), PROMPTS, **SETTINGS)
    found = ours(nanomed.load("kandinsky2", weights=folder()), PROMPTS, **SETTINGS)
    assert found[2].dtype == torch.float32
    assert excess(found, expected, latents=1e-4) <= 1


def after_post_quant_conv(system: Kandinsky2) -> None:
    movq = system.movq
    movq.decode = lambda z: movq.decoder(movq.post_quant_conv(z), movq.post_quant_conv(z))


def read_padding(system: Kandinsky2) -> None:
    encode = system.encode_text
    system.encode_text = lambda prompts: encode(prompts) | {"text_mask": torch.ones(len(prompts), LENGTH) > 0}


PLANTED = {
    "a null of zeros": (lambda s: setattr(s.image_encoder, "embed_nothing", lambda: torch.zeros(1, WIDTH)), {}),
    "the norms of MoVQ fed after post_quant_conv": (after_post_quant_conv, {}),
    "padding read by the prior": (read_padding, {}),
    "an embedding that stays standardised": (lambda s: setattr(s.prior, "embedding", lambda x: x), {}),
    "x_0 not clamped": (lambda s: setattr(s, "diffusion", replace(s.diffusion, clip=0.0)), {}),
    "the grid without its offset": (lambda s: setattr(s, "diffusion", replace(s.diffusion, offset=0)), {}),
    "one step fewer": (lambda s: None, dict(steps=3)),
    "one step of the prior fewer": (lambda s: None, dict(prior_steps=2)),
    "guidance 2% more": (lambda s: None, dict(guidance=4.08)),
    "guidance of the prior 2% more": (lambda s: None, dict(prior_guidance=4.08)),
}


@torch.no_grad()
def test_planted_mistakes_show_tenfold(folder):
    """Each likely mistake exceeds one of the tolerances ten times or more, on these very miniatures."""
    expected = ours(nanomed.load("kandinsky2", weights=folder(), dtype=torch.float64), PROMPTS, **SETTINGS)
    for mistake, (plant, change) in PLANTED.items():
        system = nanomed.load("kandinsky2", weights=folder(), dtype=torch.float64)
        plant(system)
        assert excess(ours(system, PROMPTS, **SETTINGS | change), expected) > 10, mistake


@torch.no_grad()
def test_sample_is_these_steps_clamped_to_the_unit_range(folder):
    system = nanomed.load("kandinsky2", weights=folder(), dtype=torch.float64)
    images = system.sample(PROMPTS, Replay(3, torch.float64), 4, height=32, width=32, prior_steps=3)
    close(images, (ours(system, PROMPTS, **SETTINGS)[3] / 2 + 0.5).clamp(0, 1).float(), 1e-5)


# ----------------------------------------------------------------------------------------------- the files' settings


def test_the_papers_grids(folder):
    """150 steps start at 895, not 999; the prior's 25 steps end at 0."""
    system = nanomed.load("kandinsky2", weights=folder())
    grid = system.diffusion.timesteps(150)
    assert grid[:2] == [895, 889] and grid[-1] == 1
    grid = system.prior_diffusion.timesteps(25)
    assert grid[:2] == [999, 957] and grid[-2:] == [42, 0]
    assert (system.steps, system.prior_steps, system.guidance, system.prior_guidance, system.size) == (
        150,
        25,
        4,
        4,
        256,
    )


def test_schedulers_are_read_or_refused(tmp_path):
    """Silence means what it means to diffusers; what is not known here is named."""
    path = tmp_path / "scheduler_config.json"
    for scheduler in (diffusers.DDPMScheduler(), diffusers.UnCLIPScheduler(), diffusers.DPMSolverMultistepScheduler()):
        scheduler.save_pretrained(tmp_path)
        full = Diffusion.from_json(tmp_path)
        path.write_text(json.dumps({"_class_name": type(scheduler).__name__}))
        assert repr(Diffusion.from_json(path)) == repr(full)
        close(full.alphas_cumprod, scheduler.alphas_cumprod, 1e-6)
        scheduler.set_timesteps(20)
        assert full.timesteps(20) == scheduler.timesteps.tolist()
    for stated, says in [
        ({}, "not one of DDPMScheduler"),
        ({"_class_name": "HeunDiscreteScheduler"}, "not one of DDPMScheduler"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"}, "beta_schedule = 'sigmoid'"),
        ({"_class_name": "DDPMScheduler", "timestep_spacing": "trailing"}, "timestep_spacing = 'trailing'"),
        ({"_class_name": "DDPMScheduler", "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr = True"),
    ]:
        path.write_text(json.dumps(stated))
        with pytest.raises(weights.WeightsError, match=says):
            Diffusion.from_json(path)
    with pytest.raises(weights.WeightsError, match="is missing"):
        Diffusion.from_json(tmp_path / "nowhere")


def test_what_is_missing_or_another_network_is_said(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="hf download kandinsky-community/kandinsky-2-2-prior"):
        nanomed.load("kandinsky2", weights=tmp_path)
    copy = tmp_path / "weights"
    shutil.copytree(folder(), copy)
    path = copy / "kandinsky-2-2-decoder" / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"addition_embed_type": "image_hint"}))
    with pytest.raises(
        weights.WeightsError, match="addition_embed_type is 'image_hint', which is not known here: 'image' is"
    ):
        nanomed.load("kandinsky2", weights=copy)
