"""Kandinsky 2.2 (Razzhigaev et al. 2023), and the MMCP team's LoRA on both of its diffusion models (2024, section 4.1).

    prompt --CLIP bigG--> text states (B, 77, 1280) --25 steps of the prior, guidance 4--> image embedding (B, 1280)
    noise (B, 4, 32, 32) --150 steps of the U-Net on that embedding, guidance 4--> latents --MoVQ--> (B, 3, 256, 256)

    system = nanomed.load("kandinsky2", weights=DIR)      # DIR/kandinsky-2-2-prior and DIR/kandinsky-2-2-decoder
    images = system.sample(["Generate an image containing a polyp."], noise)

Stage "prior" learns which embeddings the images of a prompt have, stage "decoder" to draw images from theirs. Neither
needs the other, so the paper tunes them in turns: decoder, ranks of the prior, ranks of the decoder.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from nanomed.adapters import lora
from nanomed.denoisers.kandinsky2 import shortest
from nanomed.diffusion import samplers
from nanomed.diffusion.guidance import guided
from nanomed.diffusion.process import Cond, Diffusion
from nanomed.diffusion.samplers import Noise
from nanomed.run import files
from nanomed.run.flags import UsageError
from nanomed.systems import kandinsky2_parts
from nanomed.systems.base import System, read_config
from nanomed.systems.kandinsky2_parts import DECODER, PARTS, PRIOR
from nanomed.text.clip_vision import preprocess
from nanomed.text.tokenizers import ClipTokenizer

PRESETS = {"kandinsky2": dict(size=256)}
RECIPES = {
    "kandinsky2": {  # of the released scripts, and 100 epochs of each stage
        "": dict(data="toy", augment=False, views=1, epochs=100.0, batch=64, lr=1e-4, clip=1.0, ema=0.0, rank=128),
    },
}
FLAGS = ("size", "snr_gamma", "released")


class Kandinsky2(System):
    """Prior, decoder U-Net, MoVQ and the two towers of a CLIP.

    schedules   of the prior and of the decoder
    snr_gamma   min-SNR weighting of both losses; 0 = none
    released    train the prior as the released script does: on the decoder's noise schedule, with the weight of an
                epsilon-prediction for what is an x_0-prediction
    pad         images that are not square are padded with black, for CLIP's eye too, instead of cropped
    published   the parts are those of the published repositories: only adapters are trained and saved
    """

    stages = {"prior": ("prior",), "decoder": ("unet",)}
    adapters = {"prior": lora.ATTENTION, "unet": lora.ATTENTION}
    in_order = False

    def __init__(
        self,
        tokenizer: ClipTokenizer | None,
        parts: dict[str, torch.nn.Module],
        schedules: tuple[Diffusion, Diffusion],
        size: int = 256,
        steps: int = 150,
        prior_steps: int = 25,
        guidance: float = 4.0,
        prior_guidance: float = 4.0,
        snr_gamma: float = 5.0,
        released: bool = False,
        pad: bool = True,
        dropout: float = 0.0,
        published: bool = True,
    ):
        super().__init__()
        self._config = dict(size=size, steps=steps, prior_steps=prior_steps, guidance=guidance, snr_gamma=snr_gamma,
                            prior_guidance=prior_guidance, released=released, pad=pad, dropout=dropout)  # fmt: skip
        for name, value in (self._config | parts).items():
            setattr(self, name, value)
        self.tokenizer, self.published, self.base = tokenizer, published, f"{PRIOR}, {DECODER}" if published else ""
        self.prior_diffusion, self.diffusion = schedules

    # ------------------------------------------------------------------------------------------------ conditions

    def encode_text(self, prompts: list[str]) -> Cond:
        """What the prior reads: text_states (B, 77, E) after CLIP's last norm, text_embeds (B, E) pooled and projected,
        text_mask bool (B, 77). The tower itself is given no mask. Each distinct prompt is encoded once."""
        distinct = list(dict.fromkeys(prompts))
        device = next(self.text_encoder.parameters()).device
        ids, mask = (tensor.to(device) for tensor in self.tokenizer(distinct, length=self.prior.num_embeddings))
        states = self.text_encoder.features(ids)
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=device)
        return {"text_states": states.last[rows], "text_embeds": states.embeds[rows], "text_mask": mask[rows]}

    def embed(self, images: Tensor) -> Tensor:
        """CLIP image embeddings (B, E) of images (B, 3, H, W) in [-1, 1], preprocessed as CLIP has them."""
        side = self.image_encoder.config.image_size
        seen = [preprocess(Image.fromarray(array), side) for array in files.to_bytes(images / 2 + 0.5).numpy()]
        return self.image_encoder(torch.stack(seen).to(self.image_encoder.visual_projection.weight))

    def no_image(self) -> Tensor:
        """The embedding (1, E) that stands for no condition: that of zeros behind CLIP's normalisation, a grey."""
        weight, side = self.image_encoder.visual_projection.weight, self.image_encoder.config.image_size
        return self.image_encoder(weight.new_zeros(1, 3, side, side))

    # -------------------------------------------------------------------------------------------------- training

    def frozen(self, stage: str) -> dict[str, tuple[str, Callable]]:
        def encode(images: Tensor) -> dict[str, Tensor]:
            latents = {} if stage == "prior" else {"latents": self.movq.encode(images.to(self.dtype))}
            return latents | {"image_embeds": self.embed(images)}

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
                batch = batch | self.frozen(stage)[kind][1](batch[raw])
        embeds = batch["image_embeds"].float()
        if stage == "prior":
            (cond,) = shortest(batch)
            x0 = self.prior.standardised(embeds).detach()
            schedule = self.diffusion if self.released else self.prior_diffusion
            return {"loss": self._denoising(self.prior, x0, cond, self.prior_diffusion, schedule)}
        if "" in batch.get("prompt", ()):
            dropped = torch.tensor([prompt == "" for prompt in batch["prompt"]], device=embeds.device)
            embeds = torch.where(dropped[:, None], self.no_image().float(), embeds)
        cond = {"image_embeds": embeds.to(self.dtype)}
        return {"loss": self._denoising(self.unet, batch["latents"].float(), cond, self.diffusion, self.diffusion)}

    def _denoising(self, network: Callable, x0: Tensor, cond: Cond, says: Diffusion, schedule: Diffusion) -> Tensor:
        """Mean squared error of what the network `says` about x_t, under the noise and the weights of `schedule`."""
        t = torch.randint(schedule.length, (len(x0),), device=x0.device)
        noise = torch.randn_like(x0)
        out = network(schedule.noised(x0, t, noise).to(self.dtype), t, **cond)[:, : x0.shape[1]]
        loss = (out.float() - says.target(x0, t, noise)).square().flatten(1).mean(1)
        return (loss * schedule.min_snr_weight(t, self.snr_gamma)).mean() if self.snr_gamma else loss.mean()

    def trainable(self, stage: str) -> dict[str, torch.nn.Parameter]:
        if self.published and not lora.adapted(self.get_submodule(self.stages[stage][0])):
            raise UsageError(f"--rank 0: stage {stage} trains adapters on the published weights; choose a rank")
        return super().trainable(stage)

    def example(self, stage: str, batch: int, device: torch.device) -> dict:
        def draw(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, device=device)

        width, side = self.prior.embedding_dim, self.size // self.movq.factor
        if stage == "decoder":
            return {"image_embeds": draw(width), "latents": draw(self.unet.in_channels, side, side)}
        states = draw(self.prior.num_embeddings, width)
        text = {"text_states": states, "text_embeds": draw(width), "text_mask": states[..., 0] < 9}
        return {"image_embeds": draw(width), **text}

    # -------------------------------------------------------------------------------------------------- sampling

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    def sample(
        self,
        prompts: list[str],
        noise: Noise,
        steps: int | None = None,
        guidance: float | None = None,
        negative_prompts: list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        prior_steps: int | None = None,
        prior_guidance: float | None = None,
    ) -> Tensor:
        """Draw one image for each prompt: (B, 3, height, width) in [0, 1], the sides rounded up to multiples of 64.

        `noise.randn` is asked by the prior for (1, E), or (2, E) with negative prompts, and then by the decoder for
        latents: of each the first draw, then one a step.
        """
        first = self.prior_guidance if prior_guidance is None else prior_guidance
        second = self.guidance if guidance is None else guidance
        embeds = self.imagine(prompts, noise, prior_steps or self.prior_steps, first, negative_prompts)
        latents = self.draw(*embeds, noise, steps or self.steps, second, height or self.size, width or self.size)
        return (self.movq.decode(latents).float() / 2 + 0.5).clamp(0, 1)

    def imagine(
        self, prompts: list[str], noise: Noise, steps: int, guidance: float, negative_prompts: list[str] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The prior: embeddings (B, E) of prompts, and those to guide away from: imagined too, or that of no image."""
        pairs = list(zip(prompts, negative_prompts)) if negative_prompts else [(prompt,) for prompt in prompts]
        each = len(pairs[0])
        away = [pair[-1] if negative_prompts else "" for pair in pairs for _ in pair]
        texts = [text for pair in pairs for text in pair]
        cond, null = shortest(self.encode_text(texts), self.encode_text(away))
        rows = guided(self.prior, cond, null, guidance)  # of (B each, E)

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            return rows(x.flatten(0, 1), t.repeat_interleave(each)).unflatten(0, (-1, each))

        x = noise.randn(each, self.prior.embedding_dim).to(self.dtype)
        embeds = self.prior.embedding(samplers.unclip(denoise, self.prior_diffusion, x, steps, noise))
        return embeds[:, 0], embeds[:, 1] if negative_prompts else self.no_image().to(x.dtype).expand(len(prompts), -1)

    def draw(
        self, embeds: Tensor, null: Tensor, noise: Noise, steps: int, guidance: float, height: int, width: int
    ) -> Tensor:
        """The decoder: latents (B, 4, h, w) of images that have the embeddings (B, E), guided away from `null`."""
        factor, channels = self.movq.factor, self.unet.in_channels
        height, width = (-(-side // factor**2) * factor for side in (height, width))
        whole = guided(self.unet, {"image_embeds": embeds}, {"image_embeds": null}, guidance, channels)
        learned = self.diffusion.variance == "learned_range"
        x = noise.randn(channels, height, width).to(self.dtype)
        denoise = whole if learned else lambda x, t: whole(x, t)[:, :channels]
        return samplers.ddpm(denoise, self.diffusion, x, steps, noise)

    # --------------------------------------------------------------------------------------------------- folders

    def config(self) -> dict:
        return {"system": "kandinsky2", **self._config}

    def saved_parts(self) -> dict[str, str]:
        return {} if self.published else PARTS

    def adapter_folder(self, part: str) -> str:
        return {"unet": "decoder"}.get(part, part)


def load_published(weights_folder: str | None = None, dtype: torch.dtype | None = None, **options) -> Kandinsky2:
    """Kandinsky 2.2 from its two repositories, in `weights_folder` or the usual places; fp32 by default."""
    return Kandinsky2(*kandinsky2_parts.published(weights_folder, dtype or torch.float32), **options).eval()


def build(
    preset: str, weights_folder: str | None = None, random: bool = False, dtype: torch.dtype | None = None, **options
) -> Kandinsky2:
    """Kandinsky 2.2 to be tuned; `random` has the published shapes and zeros for weights (dry runs)."""
    settings = PRESETS[preset] | options
    if random:
        return Kandinsky2(*kandinsky2_parts.zeros(dtype or torch.float32), **settings)
    return load_published(weights_folder, dtype, **settings)


def load(folder: str | Path, weights_folder: str | None = None, dtype: torch.dtype | None = None) -> Kandinsky2:
    """Read the adapters that `Kandinsky2.save` wrote and fold them into the published weights."""
    settings = {name: value for name, value in read_config(folder).items() if name != "system"}
    system = load_published(weights_folder, dtype, **settings)
    system.read_parts(folder, dtype)
    system.fold()
    return system.eval()
