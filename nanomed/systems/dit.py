"""DiT (Peebles & Xie 2023) as fast-DiT trains it: latents of Stable Diffusion's VAE from a class. Med-Art's is S/8.

    class --one row of a table--> (B, D) --shifts, scales and gates of all blocks--+
                                                                                   v
    noise (B, 4, 64, 64) --250 ancestral steps with a learned variance, guidance 4--> latents --VAE--> (B, 3, 512, 512)

A prompt is a class: its name, or a sentence with the name in it; "" is none. Training takes the classes from the data:
class folders, a column label, or, where images have no class, every sentence that is said of them (the toy world).
`nanomed.load("dit-s8", weights="0400000.pt")` reads checkpoints of both repositories, whose classes are numbers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from torch import Tensor

from nanomed import weights
from nanomed.autoencoders.kl import AutoencoderKL, KLConfig, load_kl
from nanomed.data.prompts import CLASSES, WORDS
from nanomed.data.readers.classes import class_of, named
from nanomed.data.table import Table
from nanomed.denoisers.dit import PUBLISHED_GUIDED_CHANNELS, DiT, DiTConfig, load_dit
from nanomed.diffusion import samplers
from nanomed.diffusion.guidance import guided
from nanomed.diffusion.process import Cond, Diffusion
from nanomed.diffusion.variational import hybrid_loss
from nanomed.systems.assembly import Found, Part
from nanomed.systems.base import Shapes, System

VAE = "stabilityai/sd-vae-ft-ema"
KVASIR = ("dyed lifted polyps", "dyed resection margins", "esophagitis", "normal cecum", "normal pylorus",
          "normal z line", "polyps", "ulcerative colitis")  # fmt: skip
PRESETS = {
    "dit-s8": dict(transformer={}),  # fresh, of the family's member `dit`; the VAE is published
    "dit-tiny": dict(
        transformer=dict(depth=4, hidden_size=128, num_heads=4, patch_size=1, input_size=8), size=32, steps=25,
        vae=dict(block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8), guidance=3.0,
    ),
}  # fmt: skip
RECIPES = {
    "dit-s8": {  # of fast-DiT's train.py: no decay, no clipping, no warm-up
        "": dict(batch=256, lr=1e-4, augment=False, views=1),
        "transformer": dict(epochs=1400.0, weight_decay=0.0, clip=0.0, ema=0.9999, save_every=5_000),
    },
    "dit-tiny": {
        "": dict(data="toy:2000", batch=32, augment=False, views=1, schedule="cosine"),
        "vae": dict(steps=900, lr=3e-3, warmup=20, ema=0.0, save_every=450),
        "transformer": dict(steps=1500, lr=2e-3, warmup=50, ema=0.99, save_every=500),
    },
}


@dataclass
class Options(Shapes):
    """options of DiT"""

    dit: Annotated[str, "S/2 | S/4 | S/8 | B/2 | B/4 | B/8 | L/2 | L/4 | L/8 | XL/2 | XL/4 | XL/8"] = "S/8"  # which one
    three_channels: bool = False  # guide three of four latent channels, as the published sampler, a habit from pixels


OPTIONS = (Options,)  # of train.py for these presets


class ClassDiT(System):
    """DiT + VAE. `classes` are names in the order of the label embedding, `dit` is the member of the family."""

    defaults = dict(size=512, classes=KVASIR, dit="S/8", three_channels=False, steps=250, guidance=4.0)
    name = "dit-s8"
    parts = {
        "transformer": Part(lambda **c: DiT(DiTConfig(**c))),
        "vae": Part(lambda **c: AutoencoderKL(KLConfig(**c)), load_kl, source=VAE, folder=""),
    }
    denoiser = "transformer"
    stages = {"transformer": ("transformer",)}
    adapters = {"transformer": ("qkv", "attn.proj", "fc1", "fc2")}
    text_fields, columns = ("labels",), (*CLASSES, *WORDS)
    dropout = 0.1  # of classes, for guidance

    def __init__(self, found: Found, **settings: Any):
        super().__init__(found, **settings)
        self.classes, self.latent_shape = tuple(self.classes), self.latent_size(self.size, self.size)
        self.diffusion = Diffusion(spacing="unclip", variance="learned_range")
        if "vae" in self.shapes:
            self.stages = {"vae": ("vae",), **self.stages}

    @classmethod
    def complete(cls, shapes: dict[str, dict], tokenizers: dict[str, Any], settings: dict) -> dict[str, dict]:
        said = cls.settings() | settings
        family = vars(DiTConfig.named(said["dit"], num_classes=len(said["classes"]), input_size=said["size"] // 8))
        return shapes | {"transformer": family | shapes["transformer"]}

    @classmethod
    def published(cls, weights_folder: str | Path | None = None, dtype: torch.dtype | None = None, **settings) -> Self:
        """A .pt file, or a folder with `config.json`, and the VAE beside it or where published files lie."""
        if weights_folder is None:
            raise weights.WeightsNotFound("no DiT-S/8 is published: say which checkpoint, --weights FILE.pt")
        network = load_dit(weights_folder, dtype)
        parts = {"transformer": network, "vae": load_kl(weights.find(VAE, Path(weights_folder).parent), dtype)}
        c = network.config
        said = dict(size=c.input_size * 8, classes=tuple(map(str, range(c.num_classes)))) | settings
        return cls(Found(parts, {}, {"transformer": dict(vars(c))}, VAE), **said).eval()

    def adopt(self, table: Table) -> Table:
        table, classes = named(table)
        if classes != self.classes:
            self.classes, self.shapes["transformer"]["num_classes"] = classes, len(classes)
            self.transformer.relabel(len(classes))
        return table

    def check_prompts(self, prompts: list[str]) -> None:
        for prompt in dict.fromkeys(prompts):
            class_of(prompt, self.classes)

    def encode_text(self, prompts: list[str]) -> Cond:
        """{"labels": int64 (B,)}, the last one for "": no class."""
        found = [class_of(prompt, self.classes) for prompt in prompts]
        return {"labels": torch.tensor([len(self.classes) if i is None else i for i in found], device=self.device)}

    def forward(self, batch: dict, stage: str, step: int) -> dict[str, Tensor]:
        """The VAE's loss; or the noise's MSE and the bound's term for the variance (variational.py). `batch` holds
        "image" or its cached "moments", and "prompt" or "labels"."""
        if stage == "vae":
            return self.vae.loss(batch["image"])
        x0 = self.latents(batch)
        t, noise = torch.randint(self.diffusion.length, (len(x0),), device=x0.device), torch.randn_like(x0)
        xt = self.diffusion.noised(x0, t, noise)
        output = self.transformer(xt.to(self.dtype), t, **self.text(batch)).float()
        losses = {name: each.mean() for name, each in hybrid_loss(self.diffusion, output, x0, xt, t, noise).items()}
        return {name: loss if name == "loss" else loss.detach() for name, loss in losses.items()}

    def example(self, stage: str, batch: int, device: torch.device) -> dict:
        return super().example(stage, batch, device) | ({"prompt": [""] * batch} if self.uses_text(stage) else {})

    def sample(self, prompts: list[str], noise: samplers.Noise, steps: int | None = None, guidance: float | None = None,
               negative_prompts: list[str] | None = None, height: int | None = None,
               width: int | None = None) -> Tensor:  # fmt: skip
        """Draw one image for each class: (B, 3, height, width) in [0, 1]. `noise.randn` is asked for the initial
        latents and once a step. Guidance leads away from no class, or from those of `negative_prompts`."""
        x = noise.randn(*self.latent_size(height or self.size, width or self.size)).to(self.device)
        cond, null = (self.encode_text(several) for several in (prompts, negative_prompts or [""] * len(prompts)))
        channels = PUBLISHED_GUIDED_CHANNELS if self.three_channels else len(x[0])
        scale = self.guidance if guidance is None else guidance
        denoise = guided(self.transformer, cond, null, scale, channels)
        x = samplers.ddpm(lambda x, t: denoise(x.to(self.dtype), t).to(x.dtype), self.diffusion, x,
                          steps or self.steps, noise)  # fmt: skip
        return self.to_unit(self.decode(x))
