"""Med-Art (Guo et al. 2025): PixArt-alpha fine-tuned on medical images with adapters on the transformer and on T5, and
with HLDF, a loss on the colours of finished images.

    loss = |noise - predicted noise|^2                                    in every step (eq. 3, base.py)
         + 1/M [colours of an image drawn in M steps - colours of data]^2   in every N-th step (eq. 4 and 5, hldf.py)

miniatures/medart.py makes what the paper finds published, an autoencoder and a base model, in minutes on a CPU.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from nanomed.diffusion import hldf
from nanomed.systems.assembly import Found
from nanomed.systems.base import Weighting
from nanomed.systems.pixart import PixArt

# What the constructor takes, and what train.py does with it. The released commands' numbers.
PRESETS = {
    "medart": dict(hldf_every=500),  # Kvasir
    "medart-skin": dict(hldf_every=1500),  # eight kinds of skin lesions
}
_RELEASED = {
    "": dict(batch=1, precision="bf16", rank=8, augment=True, views=4, valid=0.02, score_images=0),
    "adapters": dict(lr=1e-4, weight_decay=1e-2, clip=1.0, ema=0.0, save_every=2000),
}
RECIPES = {
    "medart": {**_RELEASED, "adapters": dict(**_RELEASED["adapters"], epochs=15)},
    "medart-skin": {**_RELEASED, "adapters": dict(**_RELEASED["adapters"], epochs=10)},
}


@dataclass
class Options:
    """options of Med-Art"""

    hldf_every: Annotated[int, ">= 0"] = 500  # steps from one colour loss to the next; 0 = never
    hldf_steps: Annotated[int, ">= 1"] = 20  # solver steps of the image that is drawn for it: the paper's M
    hldf_keep: Annotated[int, ">= 0"] = 0  # solver steps that keep their activations in it, for speed where memory is
    hldf_last: Annotated[int | None, ">= 1"] = None  # back-propagate it through the last solver steps alone; empty: all
    text_adapter: Annotated[str, " | none | lora | rslora | dora | rsdora"] = ""  # kind of T5's adapter, where not as
    # --adapter; none: T5 is left alone


OPTIONS = (Options, Weighting)  # of train.py for these presets


class MedArt(PixArt):
    """PixArt whose adapters learn from images' colours, too.

    hldf_every     N: the colour loss is added in every N-th step, the first included; 0 = never
    hldf_steps     M: solver steps of an image that is drawn for it
    hldf_last      back-propagate through the last so many of them alone; None: all
    hldf_keep      hold the activations of so many of them, for speed (hldf.py)
    hldf_channels  "sum" (the paper) or "mean" (the released code, a third of it)
    text_adapter   kind of T5's adapter where it is not the transformer's, as "dora"; "none" leaves T5 as it is
    """

    defaults = dict(hldf_every=500, hldf_steps=20, hldf_last=None, hldf_keep=0, hldf_channels="sum", text_adapter="")
    name = "medart"
    # The released script also names proj_in and T5's wi, which nothing is called: what is listed is what takes effect.
    adapters = PixArt.adapters | {"text_encoder": ("q", "k", "v", "o", "wo")}
    jitter = False

    def __init__(self, found: Found, **settings: Any):
        super().__init__(found, **settings)
        tuned = ("transformer",) if self.text_adapter == "none" else ("transformer", "text_encoder")
        self.stages = {"adapters": tuned}
        self.colour: Tensor | None = None  # the last colour loss, for the log

    # ------------------------------------------------------------------------------------------------ training

    def forward(self, batch: dict, stage: str, step: int) -> dict[str, Tensor]:
        """The loss of a stage. Under no_grad, as in validation, it is without the colours.

        `batch` is PixArt's. With cached "moments" comes "colours", and "prompt" is always there.
        """
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
        calls = hldf.Calls(self.hldf_steps, self.hldf_keep, self.hldf_last)
        denoise = hldf.recomputed(self.transformer, cond, null, self.guidance, params, calls)
        noise = torch.randn(len(prompts), *self.latent_shape, device=self.device)
        images = self.decode(self.draw(denoise, noise, self.hldf_steps))
        targets = batch["colours"] if "colours" in batch else hldf.colours(batch["image"])
        return hldf.colour_loss(images, targets, self.hldf_channels)

    def image_moments(self, images: Tensor) -> dict[str, Tensor]:
        return super().image_moments(images) | {"colours": hldf.colours(images)}

    def example(self, stage: str, batch: int, device: torch.device) -> dict:
        return super().example(stage, batch, device) | {"colours": torch.rand(batch, 6, device=device)}

    def kinds(self, stage: str) -> dict[str, dict]:
        """With HLDF and without. As many solver steps as hold activations and two that do not are what the memory needs
        (hldf.py)."""
        if stage != "adapters" or not self.hldf_every:
            return super().kinds(stage)
        few = min(self.hldf_steps, self.hldf_keep + 2)
        return {"a step": dict(hldf_every=0), "a step with HLDF": dict(hldf_every=1, hldf_steps=few)}
