"""Kandinsky 2.2 (Razzhigaev et al. 2023), and the MMCP team's LoRA on both of its diffusion models (2024, section 4.1).

    prompt --CLIP bigG--> text states (B, 77, 1280) --25 steps of the prior, guidance 4--> image embedding (B, 1280)
    noise (B, 4, 32, 32) --150 steps of the U-Net on that embedding, guidance 4--> latents --MoVQ--> (B, 3, 256, 256)

    system = nanomed.load("kandinsky2", weights=DIR)      # DIR/kandinsky-2-2-prior and DIR/kandinsky-2-2-decoder
    images = system.sample(["Generate an image containing a polyp."], noise)

Stage "prior" learns which embeddings the images of a prompt have, stage "decoder" to draw images from theirs. Neither
needs the other, so the paper tunes them in turns: decoder, ranks of the prior, ranks of the decoder.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nanomed.adapters import lora
from nanomed.autoencoders.movq import MoVQ, load_movq
from nanomed.denoisers.kandinsky2 import DecoderUNet, PriorTransformer, load_decoder, load_prior, shortest
from nanomed.diffusion import samplers
from nanomed.diffusion.guidance import guided
from nanomed.diffusion.process import Cond, Diffusion
from nanomed.diffusion.samplers import Noise
from nanomed.run.flags import UsageError
from nanomed.systems.assembly import TRANSFORMERS, Found, Part
from nanomed.systems.base import System, Weighting
from nanomed.text import clip, clip_vision
from nanomed.text.clip_vision import ClipVision, ClipVisionConfig
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
    snr_gamma   min-SNR weighting of both losses; 0 = none
    released    train the prior as the released script does: on the decoder's noise schedule, with the weight of an
                epsilon-prediction for what is an x_0-prediction
    pad         images that are not square are padded with black, for CLIP's eye too, instead of cropped
    """

    name = "kandinsky2"
    parts = {
        "prior": Part(PriorTransformer, load_prior, source=PRIOR),
        "unet": Part(DecoderUNet, load_decoder, source=DECODER),
        "movq": Part(MoVQ, load_movq, source=DECODER),
        "text_encoder": Part(lambda **c: clip.ClipText(clip.ClipTextConfig(**c) if c else clip.BIG_G, projection=True),
                             partial(clip.load_clip_text, projection=True), TRANSFORMERS, PRIOR),
        "image_encoder": Part(lambda **c: ClipVision(ClipVisionConfig(**c) if c else clip_vision.BIG_G),
                              clip_vision.load_clip_vision, TRANSFORMERS, PRIOR),
    }  # fmt: skip
    tokenizers = {"tokenizer": (ClipTokenizer.from_folder, PRIOR)}
    denoiser, autoencoder = "unet", "movq"
    stages = {"prior": ("prior",), "decoder": ("unet",)}
    adapters = {"prior": lora.ATTENTION, "unet": lora.ATTENTION}
    text_fields = ("text_states", "text_embeds", "text_mask")
    trimmed = ("text_mask", "text_states")
    in_order = False

    def __init__(self, found: Found, schedules: tuple[Diffusion, Diffusion] = SCHEDULES, *, size: int = 256,
                 steps: int = 150, prior_steps: int = 25, guidance: float = 4.0, prior_guidance: float = 4.0,
                 snr_gamma: float = 5.0, released: bool = False, pad: bool = True, dropout: float = 0.0):  # fmt: skip
        super().__init__(found)
        self.size, self.steps, self.prior_steps, self.pad, self.dropout = size, steps, prior_steps, pad, dropout
        self.guidance, self.prior_guidance = guidance, prior_guidance
        self.snr_gamma, self.released = snr_gamma, released
        self.prior_diffusion, self.diffusion = schedules
        self.nothing: Tensor | None = None  # the embedding of no image, in training
        self.text_shape = self.prior.num_embeddings, self.prior.embedding_dim
        self.unit = self.movq.factor**2
        if size % self.unit:
            raise UsageError(f"--size {size}: a multiple of {self.unit} for {self.name}")
        self.latent_shape = (self.unet.in_channels, size // self.movq.factor, size // self.movq.factor)

    @classmethod
    def stated(cls, place: Callable[..., Path]) -> dict:
        return {"schedules": tuple(Diffusion.from_json(place("scheduler", source)) for source in (PRIOR, DECODER))}

    # ------------------------------------------------------------------------------------------------ conditions

    def encode_text(self, prompts: list[str]) -> Cond:
        """What the prior reads: text_states (B, 77, E) after CLIP's last norm, text_embeds (B, E) pooled and projected,
        text_mask bool (B, 77). The tower itself is given no mask. Each distinct prompt is encoded once."""

        def encode(distinct: list[str]) -> Cond:
            device = self.weight("text_encoder").device
            ids, mask = (tensor.to(device) for tensor in self.tokenizer(distinct, length=self.prior.num_embeddings))
            states = self.text_encoder.features(ids)
            return {"text_states": states.last, "text_embeds": states.embeds, "text_mask": mask}

        return self.each_once(prompts, encode)

    # -------------------------------------------------------------------------------------------------- training

    def frozen(self, stage: str) -> dict[str, tuple[str, Callable]]:
        def encode(images: Tensor) -> dict[str, Tensor]:
            latents = {} if stage == "prior" else {"latents": self.movq.encode(images.to(self.weight("movq")))}
            return latents | {"image_embeds": self.image_encoder.embed(images)}

        if not self.uses_text(stage):
            return {}
        if stage == "prior":
            return {"image": ("image_encoder", encode), "text": ("text_encoder", self.encode_text)}
        return {"image": ("image_encoder movq", encode)}

    def forward(self, batch: dict, stage: str, step: int) -> dict[str, Tensor]:
        """The prior's loss is on x_0, the standardised embedding; the decoder's on the noise in MoVQ's latents, with
        its second half of channels left alone.

        `batch` holds "image" and "prompt", or what `frozen` makes of them. Where a prompt was dropped, the decoder sees
        the embedding of no image.
        """
        for kind, raw, made in (("image", "image", "image_embeds"), ("text", "prompt", "text_states")):
            if made not in batch and kind in self.frozen(stage):
                fields = self.frozen(stage)[kind][1](batch[raw])
                batch = batch | {name: tensor.to(self.device) for name, tensor in fields.items()}
        embeds = batch["image_embeds"].float()
        if stage == "prior":
            (cond,) = shortest(batch)
            x0 = self.prior.standardised(embeds).detach()
            noising = self.diffusion if self.released else self.prior_diffusion
            predict = partial(self._predict, self.prior, cond)
            return {"loss": self.denoising_loss(predict, x0, says=self.prior_diffusion, noising=noising)}
        if "prompt" in batch:
            if self.nothing is None:  # every process asks in the same step: the tower may be in shares
                self.nothing = self.image_encoder.embed_nothing().detach()
            dropped = torch.tensor([prompt == "" for prompt in batch["prompt"]]).to(embeds.device)
            embeds = torch.where(dropped[:, None], self.nothing.to(embeds), embeds)
        predict = partial(self._predict, self.unet, {"image_embeds": embeds.to(self.dtype)})
        return {"loss": self.denoising_loss(predict, batch["latents"].float())}

    def _predict(self, network: Callable, cond: Cond, x: Tensor, t: Tensor) -> Tensor:
        """Of as many channels as x has: a learned variance is left alone."""
        return network(x.to(self.dtype), t, **cond)[:, : x.shape[1]]

    def trainable(self, stage: str) -> dict[str, torch.nn.Parameter]:
        if not self.shapes and not lora.adapted(self.get_submodule(self.stages[stage][0])):
            raise UsageError(f"--rank 0: stage {stage} trains adapters on the published weights; choose a rank")
        self.nothing = None  # the tower may have changed
        return super().trainable(stage)

    def example(self, stage: str, batch: int, device: torch.device) -> dict:
        if not self.uses_text(stage):
            return super().example(stage, batch, device)
        width, length, side = self.prior.embedding_dim, self.prior.num_embeddings, self.size // self.movq.factor
        shapes = {"image_embeds": (width,), "latents": (self.unet.in_channels, side, side)}
        if stage == "prior":
            shapes = {"image_embeds": (width,), "text_states": (length, width), "text_embeds": (width,)}
        made = {name: torch.randn(batch, *shape, device=device) for name, shape in shapes.items()}
        return made | ({"text_mask": torch.ones(batch, length, device=device) > 0} if stage == "prior" else {})

    # -------------------------------------------------------------------------------------------------- sampling

    def sample(self, prompts: list[str], noise: Noise, steps: int | None = None, guidance: float | None = None,
               negative_prompts: list[str] | None = None, height: int | None = None, width: int | None = None,
               prior_steps: int | None = None, prior_guidance: float | None = None) -> Tensor:  # fmt: skip
        """Draw one image for each prompt: (B, 3, height, width) in [0, 1], the sides rounded up to multiples of 64.

        `noise.randn` is asked by the prior for (1, E), or (2, E) with negative prompts, and then by the decoder for
        latents: of each the first draw, then one a step.
        """
        first = self.prior_guidance if prior_guidance is None else prior_guidance
        second = self.guidance if guidance is None else guidance
        embeds = self.imagine(prompts, noise, prior_steps or self.prior_steps, first, negative_prompts)
        latents = self.draw(*embeds, noise, steps or self.steps, second, height or self.size, width or self.size)
        return self.to_unit(self.decode(latents))

    def imagine(self, prompts: list[str], noise: Noise, steps: int, guidance: float,
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

    def draw(self, embeds: Tensor, null: Tensor, noise: Noise, steps: int, guidance: float, height: int,
             width: int) -> Tensor:  # fmt: skip
        """The decoder: latents (B, 4, h, w) of images that have the embeddings (B, E), guided away from `null`."""
        factor, channels = self.movq.factor, self.unet.in_channels
        height, width = (-(-side // factor**2) * factor for side in (height, width))
        whole = guided(self.unet, {"image_embeds": embeds}, {"image_embeds": null}, guidance, channels)
        learned = self.diffusion.variance == "learned_range"
        x = noise.randn(channels, height, width).to(self.dtype)
        denoise = whole if learned else lambda x, t: whole(x, t)[:, :channels]
        return samplers.ddpm(denoise, self.diffusion, x, steps, noise)

    def adapter_folder(self, part: str) -> str:
        return {"unet": "decoder"}.get(part, part)
