"""Miniatures of Stable Diffusion and of Kandinsky 3 that need no published weights: they learn the toy world from
nothing, an autoencoder first, then a U-Net and the encoder of its texts together.

They depart from the big ones where minutes on a CPU ask for it: 32 x 32 pixels, latents of unit deviation, DPM-Solver,
and networks that predict x_0, with which text takes hold sooner than with the noise (msdm.py). Kandinsky 3's MoVQ
halves sides once in place of thrice: the outermost level of its U-Net has no attention, so that text meets latents of
half the side, and on 4 x 4 of them it does not find the place that it names.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanomed import weights
from nanomed.systems import sd
from nanomed.systems.assembly import Found
from nanomed.systems.base import Reading, Weighting
from nanomed.systems.kandinsky3 import Kandinsky3
from nanomed.systems.miniatures import TEST_PROMPTS
from nanomed.systems.miniatures.medart import tiny_tokenizer
from nanomed.systems.sd import StableDiffusion
from nanomed.text.tokenizers import ClipTokenizer

SCHEDULER = dict(_class_name="DPMSolverMultistepScheduler", prediction_type="sample")
PRESETS = {
    "sd-tiny": dict(
        scheduler=SCHEDULER, size=32, steps=16, guidance=3.0, dropout=0.1,
        unet=dict(sample_size=8, block_out_channels=(32, 128), down_block_types=["CrossAttnDownBlock2D"] * 2,
                  up_block_types=["CrossAttnUpBlock2D"] * 2, layers_per_block=1, attention_head_dim=4,
                  cross_attention_dim=128, norm_num_groups=8),
        vae=dict(block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8),
        text_encoder=dict(hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
                          max_position_embeddings=64),
    ),
    "kandinsky3-tiny": dict(
        scheduler=SCHEDULER, size=32, length=64, steps=16, guidance=3.0, dropout=0.1, snr_gamma=0.0, pad=False,
        unet=dict(time_embedding_dim=128, groups=8, attention_head_dim=32, layers_per_block=2,
                  block_out_channels=(32, 64, 96, 128), cross_attention_dim=128, encoder_hid_dim=128),
        movq=dict(block_out_channels=(32, 64), layers_per_block=1, num_vq_embeddings=1),
        text_encoder=dict(vocab_size=512, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4),
    ),
}  # fmt: skip
_ALL = dict(data="toy:2000", augment=False, views=1, test_prompts=TEST_PROMPTS)
_VAE = dict(batch=32, lr=3e-3, schedule="cosine", warmup=20, ema=0.0, clip=1.0)
_UNET = dict(batch=32, lr=1.5e-3, schedule="cosine", warmup=50, ema=0.99, clip=1.0, places=0.3, places_first=400,
             score_images=0)  # fmt: skip
RECIPES = {
    "sd-tiny": {
        "": _ALL | dict(text_adapter=""),
        "vae": _VAE | dict(steps=600, save_every=300),
        "unet": _UNET | dict(steps=1200, save_every=600),
    },
    "kandinsky3-tiny": {
        "": _ALL,
        "vae": _VAE | dict(steps=300, batch=16, lr=2e-3, save_every=150),
        "unet": _UNET | dict(steps=700, save_every=350),
    },
}
OPTIONS = (sd.Options, Weighting, Reading)  # of train.py for these presets


class SDTiny(StableDiffusion):
    """Stable Diffusion in small, all its parts fresh. Its words are those shipped with the tiny MSDM."""

    name = "sd-tiny"
    defaults = dict(text_adapter="")

    def __init__(self, found: Found, **settings: Any):
        super().__init__(found, **settings)
        self.stages = {"vae": ("vae",)} | self.stages

    @classmethod
    def new_tokenizers(cls, shapes: dict[str, dict], weights_folder: str | Path | None) -> dict[str, Any]:
        return {"tokenizer": ClipTokenizer.from_folder(weights.find("msdm-tiny", weights_folder) / "tokenizer")}

    @classmethod
    def complete(cls, shapes: dict[str, dict], tokenizers: dict[str, Any], settings: dict) -> dict[str, dict]:
        return shapes | {"text_encoder": shapes["text_encoder"] | {"vocab_size": len(tokenizers["tokenizer"])}}


class Kandinsky3Tiny(Kandinsky3):
    """Kandinsky 3 in small, all its parts fresh. It reads small letters."""

    name = "kandinsky3-tiny"
    stages = {"vae": ("movq",), "unet": ("unet", "text_encoder")}
    adapters = Kandinsky3.adapters | {"text_encoder": ("q", "k", "v", "o", "wo")}

    @classmethod
    def new_tokenizers(cls, shapes: dict[str, dict], weights_folder: str | Path | None) -> dict[str, Any]:
        return {"tokenizer": tiny_tokenizer(shapes["text_encoder"]["vocab_size"])}

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        return super().encode_text([prompt.lower() for prompt in prompts])

    def forward(self, batch: dict, stage: str, step: int) -> dict[str, Tensor]:
        if stage == "vae":
            return {"loss": F.l1_loss(self.reconstruct(batch["image"]), batch["image"])}
        return super().forward(batch, stage, step)

    def finish(self, stage: str, image_batches: Iterable[Tensor]) -> dict[str, float]:
        """After the autoencoder: bring its latents to unit deviation."""
        if stage != "vae":
            return {}
        deviation = torch.cat([self.movq.encode(images) for images in image_batches]).std()
        self.movq.divide_latents(deviation)
        return {"latent_std": deviation.item()}
