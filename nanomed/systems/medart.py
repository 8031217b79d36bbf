"""Med-Art (Guo et al. 2025): PixArt-alpha fine-tuned on medical images with adapters on the transformer and on T5, and
with HLDF, a loss on the colours of finished images.

    loss = |noise - predicted noise|^2                                    in every step (eq. 3, pixart.py)
         + 1/M [colours of an image drawn in M steps - colours of data]^2   in every N-th step (eq. 4 and 5, hldf.py)

Stage "adapters" is the paper. `medart-tiny` has two stages before it that make what the paper finds published, an
autoencoder and a base model, from scratch and from the same images, in minutes on a CPU.
"""

import string
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanomed.data import grammar
from nanomed.diffusion import hldf
from nanomed.diffusion.process import Cond
from nanomed.systems.arithmetic import held
from nanomed.systems.assembly import Found, read_config
from nanomed.systems.base import Reading, System, Weighting
from nanomed.systems.pixart import PixArt
from nanomed.text.unigram import T5Tokenizer, train_unigram

TINY = dict(
    transformer=dict(num_attention_heads=4, attention_head_dim=32, in_channels=4, out_channels=8, num_layers=4,
                     sample_size=8, patch_size=1, caption_channels=128, interpolation_scale=1.0),
    text_encoder=dict(vocab_size=512, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4),
    vae=dict(block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8),
    scheduler=dict(prediction_type="sample"),  # text takes hold sooner than with the noise: see msdm.py
    length=64, steps=16, guidance=3.0, hldf_every=10, hldf_steps=8,
)  # fmt: skip
# What the constructor takes, and what train.py does with it. The released commands' numbers.
PRESETS = {
    "medart": dict(hldf_every=500),  # Kvasir
    "medart-skin": dict(hldf_every=1500),  # eight kinds of skin lesions
    "medart-tiny": TINY,
}
_RELEASED = {
    "": dict(batch=1, precision="bf16", rank=8, augment=True, views=4, valid=0.02, score_images=0),
    "adapters": dict(lr=1e-4, weight_decay=1e-2, clip=1.0, ema=0.0, save_every=2000),
}
RECIPES = {
    "medart": {**_RELEASED, "adapters": dict(**_RELEASED["adapters"], epochs=15)},
    "medart-skin": {**_RELEASED, "adapters": dict(**_RELEASED["adapters"], epochs=10)},
    "medart-tiny": {
        "": dict(data="toy:2000", augment=False, views=1),
        "vae": dict(steps=900, batch=32, lr=3e-3, schedule="cosine", warmup=20, ema=0.0, clip=1.0, save_every=450),
        "base": dict(steps=1500, batch=32, lr=2e-3, schedule="cosine", warmup=50, ema=0.99, clip=1.0, dropout=0.1,
                     places=0.3, places_first=300, save_every=500),
        "adapters": dict(steps=200, batch=8, lr=3e-4, weight_decay=1e-2, ema=0.0, clip=1.0, rank=8, save_every=100),
    },
}  # fmt: skip


@dataclass
class Options:
    """options of Med-Art"""

    hldf_every: Annotated[int, ">= 0"] = 500  # steps from one colour loss to the next; 0 = never
    hldf_keep: Annotated[int, ">= 0"] = 0  # solver steps that keep their activations in it, for speed where memory is
    hldf_last: Annotated[int | None, ">= 1"] = None  # back-propagate it through the last solver steps alone; empty: all
    text_adapter: Annotated[str, " | none | lora | rslora | dora | rsdora"] = ""  # kind of T5's adapter, where not as
    # --adapter; none: T5 is left alone


OPTIONS = (Options, Weighting, Reading)  # of train.py for these presets


class LearnsVAE(System):
    """A system whose KL autoencoder has a stage of its own, "vae", in which it learns from nothing."""

    def reconstruction_loss(self, images: Tensor) -> dict[str, Tensor]:
        """MSE and L1 of an autoencoder's images, and 1e-6 of the KL divergence of its latents (Rombach et al. 2022)."""
        mean, logvar = self.vae.moments(images).chunk(2, dim=1)
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        out = self.vae.decode(z * self.vae.scale)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()
        l1 = F.l1_loss(out, images)
        return {"loss": F.mse_loss(out, images) + l1 + 1e-6 * kl, "l1": l1.detach(), "kl": kl.detach()}

    def finish(self, stage: str, image_batches: Iterable[Tensor]) -> dict[str, float]:
        """After the autoencoder: measure the standard deviation of its latents and scale them to 1 from now on."""
        if stage != "vae":
            return {}
        means = torch.cat([self.vae.moments(images).chunk(2, dim=1)[0] for images in image_batches])
        deviation = means.double().std().item()
        self.scale_latents(1 / deviation)
        return {"latent_std": deviation}

    def scale_latents(self, factor: float) -> None:
        self.vae.scale = self.shapes["vae"]["scaling_factor"] = factor

    def resume(self, stage: str, folder: str | Path) -> None:
        super().resume(stage, folder)
        if stage == "vae":
            self.scale_latents(read_config(folder)["vae"]["scaling_factor"])


class MedArt(LearnsVAE, PixArt):
    """PixArt whose adapters learn from images' colours, too.

    hldf_every     N: the colour loss is added in every N-th step, the first included; 0 = never
    hldf_steps     M: solver steps of an image that is drawn for it
    hldf_last      back-propagate through the last so many of them alone; None: all
    hldf_keep      hold the activations of so many of them, for speed (hldf.py)
    hldf_channels  "sum" (the paper) or "mean" (the released code, a third of it)
    text_adapter   kind of T5's adapter where it is not the transformer's, as "dora"; "none" leaves T5 as it is
    """

    name = "medart"
    # The released script also names proj_in and T5's wi, which nothing is called: what is listed is what takes effect.
    adapters = PixArt.adapters | {"text_encoder": ("q", "k", "v", "o", "wo")}
    jitter = False

    def __init__(
        self,
        found: Found,
        *,
        hldf_every: int = 500,
        hldf_steps: int = 20,
        hldf_last: int | None = None,
        hldf_keep: int = 0,
        hldf_channels: str = "sum",
        text_adapter: str = "",
        **settings: Any,
    ):
        super().__init__(found, **settings)
        self.hldf_every, self.hldf_steps, self.hldf_last, self.hldf_keep = hldf_every, hldf_steps, hldf_last, hldf_keep
        self.hldf_channels, self.text_adapter = hldf_channels, text_adapter
        self.stages = {"adapters": ("transformer",) if text_adapter == "none" else ("transformer", "text_encoder")}
        if self.shapes:
            self.stages = {"vae": ("vae",), "base": ("transformer", "text_encoder")} | self.stages
        self.colour: Tensor | None = None  # the last colour loss, for the log

    @classmethod
    def new_tokenizers(cls, shapes: dict[str, dict], weights_folder: str | Path | None) -> dict[str, Any]:
        return {"tokenizer": tiny_tokenizer(shapes.get("text_encoder", {}).get("vocab_size", 512))}

    # ------------------------------------------------------------------------------------------------ training

    def forward(self, batch: dict, stage: str, step: int) -> dict[str, Tensor]:
        """The loss of a stage. Under no_grad, as in validation, it is without the colours.

        `batch` is PixArt's. With cached "moments" comes "colours", and "prompt" is always there.
        """
        if stage == "vae":
            return self.reconstruction_loss(batch["image"])
        losses = super().forward(batch, stage, step)
        every = self.hldf_every if stage == "adapters" and torch.is_grad_enabled() else 0
        if every and step % every == 0:
            colour = self.colour_loss(batch)
            losses["loss"] = losses["loss"] + colour / self.hldf_steps
            self.colour = colour.detach()
        return losses if self.colour is None else losses | {"colour": self.colour}

    def colour_loss(self, batch: dict) -> Tensor:
        """Draw an image for every prompt of the batch, as `sample` would, and compare its colours with the data's.

        Differentiable into all that trains, of both branches of guidance, through every step and the decoder.
        """
        prompts = batch["prompt"]
        cond, null = self.conditions(prompts, None, self.size, self.size)
        params = [param for param in self.transformer.parameters() if param.requires_grad]
        denoise = hldf.recomputed(
            self.transformer, cond, null, self.guidance, params, self.hldf_steps, self.hldf_keep, self.hldf_last
        )
        noise = torch.randn(len(prompts), *self.latent_shape, device=self.device)
        images = self.decode(self.draw(denoise, noise, self.hldf_steps))
        targets = batch["colours"] if "colours" in batch else hldf.colours(batch["image"])
        return hldf.colour_loss(images, targets, self.hldf_channels)

    def image_moments(self, images: Tensor) -> dict[str, Tensor]:
        return super().image_moments(images) | {"colours": hldf.colours(images)}

    def example(self, stage: str, batch: int, device: torch.device) -> dict:
        colours = {} if stage == "vae" else {"colours": torch.rand(batch, 6, device=device)}
        return super().example(stage, batch, device) | colours

    def states(self, prompts: list[str]) -> Cond:
        if self.shapes:  # what learns to read here learns it as it is asked in `encode_text`
            prompts = [prompt.lower() for prompt in prompts]
        return super().states(prompts)

    def activations(self, stage: str, batch: int) -> dict[str, float]:
        """In a step with HLDF the graph of the noise loss is there, those of the texts of both branches, and one of the
        decoder's and of one branch of one solver step, whichever is larger (hldf.py)."""
        if stage != "adapters":
            return super().activations(stage, batch)
        texts, net, decoder = self.passes(batch)
        tuned = "text_encoder" in self.stages[stage]
        step = net + (texts if tuned else 0)
        event = step + (2 * texts if tuned else 0) + max(decoder, net) + 2 * self.hldf_keep * net
        return {"a step": step} | ({"a step with HLDF": event} if self.hldf_every else {})

    def passes(self, batch: int) -> tuple[float, float, float]:
        """Bytes that autograd holds for T5 (full texts), for one branch of the transformer, and for the decoder."""
        c = self.transformer.config
        ids, mask = torch.zeros(batch, self.length, dtype=torch.int64), torch.ones(batch, self.length) > 0

        def like(*shape: int) -> Tensor:
            return torch.empty(batch, *shape, dtype=self.dtype).requires_grad_()

        return held(
            self,
            lambda: self.text_encoder(ids, mask),
            lambda: self.transformer(like(*self.latent_shape), ids[:, 0], attention_mask=mask,
                                     kv=like(c.num_layers, 2, self.length, c.dim)),
            lambda: self.vae.decode(like(*self.latent_shape)),
        )  # fmt: skip


def tiny_tokenizer(pieces: int) -> T5Tokenizer:
    """The words of the toy world's prompts in small letters, and every letter for other words."""
    return train_unigram([*(prompt.lower() for prompt in grammar.all_prompts()), *string.printable], pieces - 100)
