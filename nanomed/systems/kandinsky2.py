"""Kandinsky 2.2 (Razzhigaev et al. 2023), and the MMCP team's LoRA on both of its diffusion models (2024, section 4.1).

    prompt --CLIP bigG--> text states (B, 77, 1280) --25 steps of the prior, guidance 4--> image embedding (B, 1280)
    noise (B, 4, 32, 32) --150 steps of the U-Net on that embedding, guidance 4--> latents --MoVQ--> (B, 3, 256, 256)

    system = nanomed.load("kandinsky2", weights=DIR)      # DIR/kandinsky-2-2-prior and DIR/kandinsky-2-2-decoder

Stage "prior" learns which embeddings the images of a prompt have, stage "decoder" to draw images from theirs. Neither
needs the other, so the paper tunes them in turns: decoder, ranks of the prior, ranks of the decoder.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanomed.adapters import lora
from nanomed.autoencoders.movq import MoVQ, load_movq
from nanomed.denoisers.kandinsky2 import DecoderUNet, PriorTransformer, load_decoder, load_prior, shortest
from nanomed.diffusion import samplers
from nanomed.diffusion.guidance import guided
from nanomed.diffusion.process import Cond, Diffusion
from nanomed.run.flags import UsageError
from nanomed.systems.assembly import TRANSFORMERS, Found, Part
from nanomed.systems.base import System, Weighting, each_once
from nanomed.text import clip, clip_vision
from nanomed.text.tokenizers import ClipTokenizer

PRIOR, DECODER = "kandinsky-community/kandinsky-2-2-prior", "kandinsky-community/kandinsky-2-2-decoder"
PRESETS = {"kandinsky2": dict(size=256)}
RECIPES = {  # of the released scripts, and 100 epochs of each stage
    "kandinsky2": {"": dict(data="toy", augment=False, views=1, epochs=100.0, batch=64, lr=1e-4, clip=1.0, ema=0.0,
                            rank=128)},
}  # fmt: skip
# Their noise where no file says it: a squared cosine and x_0 within 10, a line and x_0 within 1.
SCHEDULES = (
    Diffusion(schedule="squaredcos", prediction="sample", spacing="unclip", clip=10.0),
    Diffusion(0.00085, 0.012, spacing="leading", offset=1, clip=1.0),
)


@dataclass
class Options:
    """options of Kandinsky 2.2"""

    released: bool = False  # the prior's loss as released, on the decoder's noise schedule


OPTIONS = (Options, Weighting)  # of train.py for these presets


class Kandinsky2(System):
    """Prior, decoder U-Net, MoVQ and the two towers of a CLIP.

    schedules   of the prior and of the decoder; no setting, because they stand in the published files
    released    train the prior as the released script does: on the decoder's noise schedule, with the weight of an
                epsilon-prediction for what is an x_0-prediction
    """

    defaults = dict(size=256, steps=150, prior_steps=25, guidance=4.0, prior_guidance=4.0, snr_gamma=5.0,
                    released=False, pad=True, dropout=0.0)  # fmt: skip
    name = "kandinsky2"
    parts = {
        "prior": Part(PriorTransformer, load_prior, source=PRIOR),
        "unet": Part(DecoderUNet, load_decoder, source=DECODER),
        "movq": Part(MoVQ, load_movq, source=DECODER),
        "text_encoder": Part(lambda **c: clip.ClipText(clip.ClipTextConfig(**c) if c else clip.BIG_G, projection=True),
                             partial(clip.load_clip_text, projection=True), TRANSFORMERS, PRIOR),
        "image_encoder": Part(lambda **c: clip_vision.ClipVision(clip_vision.ClipVisionConfig(**c) if c else
                                                             clip_vision.BIG_G),
                              clip_vision.load_clip_vision, TRANSFORMERS, PRIOR),
    }  # fmt: skip
    tokenizers = {"tokenizer": (ClipTokenizer.from_folder, PRIOR)}
    denoiser, autoencoder, image_field = "unet", "movq", "latents"
    stages = {"prior": ("prior",), "decoder": ("unet",)}
    adapters = {"prior": lora.ATTENTION, "unet": lora.ATTENTION}
    adapter_folders = {"prior": "prior", "unet": "decoder"}
    text_fields = ("text_states", "text_embeds", "text_mask")
    trimmed = ("text_mask", "text_states")
    in_order = False

    def __init__(self, found: Found, schedules: tuple[Diffusion, Diffusion] = SCHEDULES, **settings: Any):
        super().__init__(found, **settings)
        self.prior_diffusion, self.diffusion = schedules
        self.nothing: Tensor | None = None  # the embedding of no image, in training
        self.text_shape = self.prior.num_embeddings, self.prior.embedding_dim
        self.unit = self.movq.factor**2
        if self.size % self.unit:
            raise UsageError(f"--size {self.size}: a multiple of {self.unit} for {self.name}")
        side = self.size // self.movq.factor
        self.latent_shape = (self.unet.in_channels, side, side)

    @classmethod
    def stated(cls, place: Callable[..., Path]) -> dict:
        return {"schedules": tuple(Diffusion.from_json(place("scheduler", source)) for source in (PRIOR, DECODER))}

    @each_once
    def encode_text(self, prompts: list[str]) -> Cond:
        """What the prior reads: text_states (B, 77, E) after CLIP's last norm, text_embeds (B, E) pooled and projected,
        text_mask bool (B, 77). The tower itself is given no mask. Each distinct prompt is encoded once."""
        ids, mask = self.tokenizer(prompts, length=self.prior.num_embeddings)
        states = self.text_encoder.features(ids.to(self.weight("text_encoder").device))
        return {"text_states": states.last, "text_embeds": states.embeds, "text_mask": mask}

    def frozen(self, stage: str) -> dict[str, tuple[str, Callable]]:
        """The prior needs images' embeddings and text, the decoder embeddings and latents."""

        def seen(images: Tensor) -> dict[str, Tensor]:
            return {"image_embeds": self.image_encoder.embed(images)}

        if stage == "prior":
            return {"image": ("image_encoder", seen), "text": ("text_encoder", self.encode_text)}
        both = "image_encoder movq", lambda images: self.image_moments(images) | seen(images)
        return {"image": both} if stage == "decoder" else {}

    def forward(self, batch: dict, stage: str, step: int) -> dict[str, Tensor]:
        """The prior's loss is on x_0, the standardised embedding; the decoder's on the noise in MoVQ's latents, with
        its second half of channels left alone.

        `batch` holds "image" and "prompt", or what `frozen` makes of them. Where a prompt was dropped, the decoder sees
        the embedding of no image.
        """
        if "image_embeds" not in batch:
            batch = batch | self.frozen(stage)["image"][1](batch["image"])
        embeds = batch["image_embeds"].to(self.device).float()
        if stage == "prior":
            (cond,) = shortest(self.text(batch))
            x0 = self.prior.standardised(embeds).detach()
            says, predict = self.prior_diffusion, self.noise_of(partial(self.prior, **cond))
            noising = self.diffusion if self.released else says
            return {"loss": self.denoising_loss(predict, x0, says=says, noising=noising)}
        if "prompt" in batch:
            if self.nothing is None:  # every process asks in the same step: the tower may be in shares
                self.nothing = self.image_encoder.embed_nothing().detach()
            dropped = torch.tensor([prompt == "" for prompt in batch["prompt"]]).to(embeds.device)
            embeds = torch.where(dropped[:, None], self.nothing.to(embeds), embeds)
        predict = self.noise_of(partial(self.unet, image_embeds=embeds.to(self.dtype)))
        return {"loss": self.denoising_loss(predict, self.latents(batch).float())}

    def trainable(self, stage: str) -> dict[str, torch.nn.Parameter]:
        if not self.shapes and not lora.adapted(self.get_submodule(self.stages[stage][0])):
            raise UsageError(f"--rank 0: stage {stage} trains adapters on the published weights; choose a rank")
        self.nothing = None  # the tower may have changed
        return super().trainable(stage)

    def example(self, stage: str, batch: int, device: torch.device) -> dict:
        if not self.uses_text(stage):
            return super().example(stage, batch, device)
        length, width = self.text_shape
        shapes = {"image_embeds": (width,), "latents": self.latent_shape, "text_states": (length, width),
                  "text_embeds": (width,)}  # fmt: skip
        made = {name: torch.randn(batch, *shape, device=device) for name, shape in shapes.items()}
        return made | {"text_mask": torch.ones(batch, length, device=device) > 0}

    def sample(self, prompts: list[str], noise: samplers.Noise, steps: int | None = None, guidance: float | None = None,
               negative_prompts: list[str] | None = None, height: int | None = None, width: int | None = None,
               prior_steps: int | None = None, prior_guidance: float | None = None) -> Tensor:  # fmt: skip
        """Draw one image for each prompt: (B, 3, height, width) in [0, 1], the sides rounded up to multiples of 64.

        `noise.randn` is asked by the prior for (1, E), or (2, E) with negative prompts, and then by the decoder for
        latents: of each the first draw, then one a step.
        """
        first = self.prior_guidance if prior_guidance is None else prior_guidance
        second = self.guidance if guidance is None else guidance
        embeds = self.imagine(prompts, noise, prior_steps or self.prior_steps, first, negative_prompts)
        size = height or self.size, width or self.size
        return self.to_unit(self.decode(self.draw(embeds, size, noise, steps or self.steps, second)))

    def imagine(self, prompts: list[str], noise: samplers.Noise, steps: int, guidance: float,
                negative_prompts: list[str] | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The prior: embeddings (B, E) of prompts, and those to guide away from: imagined too, or that of no image."""
        texts, away, each = prompts, [""] * len(prompts), 1
        if negative_prompts:  # every other row is of a negative prompt, and all are guided away from it
            texts = [text for pair in zip(prompts, negative_prompts) for text in pair]
            away, each = [text for text in negative_prompts for _ in range(2)], 2
        cond, null = shortest(self.encode_text(texts), self.encode_text(away))
        rows = guided(self.prior, cond, null, guidance)  # of (B each, E)

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            return rows(x.flatten(0, 1), t.repeat_interleave(each)).unflatten(0, (-1, each))

        x = noise.randn(each, self.prior.embedding_dim).to(self.dtype)
        embeds = self.prior.embedding(samplers.unclip(denoise, self.prior_diffusion, x, steps, noise))
        nothing = self.image_encoder.embed_nothing().to(x).expand(len(x), -1)
        return embeds[:, 0], embeds[:, 1] if negative_prompts else nothing

    def draw(self, embeds: tuple[Tensor, Tensor], size: tuple[int, int], noise: samplers.Noise, steps: int,
             guidance: float) -> Tensor:  # fmt: skip
        """The decoder: latents (B, 4, h, w) of images of a height and width in pixels, that have the first of two
        embeddings (B, E) and are guided away from the second."""
        height, width = (-(-side // self.unit) * self.movq.factor for side in size)
        x = noise.randn(self.unet.in_channels, height, width).to(self.dtype)
        cond, null = ({"image_embeds": each} for each in embeds)
        whole = guided(self.unet, cond, null, guidance, self.unet.in_channels)
        denoise = whole if self.diffusion.variance == "learned_range" else self.noise_of(whole)
        return samplers.ddpm(denoise, self.diffusion, x, steps, noise)
