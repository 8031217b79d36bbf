"""A miniature of Med-Art that needs no published weights: two stages before the paper's "adapters" make what the paper
finds published, an autoencoder and a base model that reads, from nothing and from the same images.
"""

import string
from pathlib import Path
from typing import Any

from nanomed.data import grammar
from nanomed.diffusion.process import Cond
from nanomed.systems import medart
from nanomed.systems.assembly import Found
from nanomed.systems.base import Reading
from nanomed.systems.medart import MedArt
from nanomed.text.unigram import T5Tokenizer, train_unigram

PRESETS = {
    "medart-tiny": dict(
        transformer=dict(num_attention_heads=4, attention_head_dim=32, in_channels=4, out_channels=8, num_layers=4,
                         sample_size=8, patch_size=1, caption_channels=128, interpolation_scale=1.0),
        text_encoder=dict(vocab_size=512, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4),
        vae=dict(block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8),
        scheduler=dict(prediction_type="sample"),  # text takes hold sooner than with the noise: see msdm.py
        length=64, steps=16, guidance=3.0, hldf_every=10, hldf_steps=8,
    ),
}  # fmt: skip
RECIPES = {
    "medart-tiny": {
        "": dict(data="toy:2000", augment=False, views=1),
        "vae": dict(steps=900, batch=32, lr=3e-3, schedule="cosine", warmup=20, ema=0.0, clip=1.0, save_every=450),
        "base": dict(steps=1500, batch=32, lr=2e-3, schedule="cosine", warmup=50, ema=0.99, clip=1.0, dropout=0.1,
                     places=0.3, places_first=300, save_every=500),
        "adapters": dict(steps=200, batch=8, lr=3e-4, weight_decay=1e-2, ema=0.0, clip=1.0, rank=8, save_every=100),
    },
}  # fmt: skip
OPTIONS = (*medart.OPTIONS, Reading)  # of train.py for this preset


class MedArtTiny(MedArt):
    """Med-Art in small, all its parts fresh."""

    name = "medart-tiny"

    def __init__(self, found: Found, **settings: Any):
        super().__init__(found, **settings)
        self.stages = {"vae": ("vae",), "base": ("transformer", "text_encoder")} | self.stages

    @classmethod
    def new_tokenizers(cls, shapes: dict[str, dict], weights_folder: str | Path | None) -> dict[str, Any]:
        return {"tokenizer": tiny_tokenizer(shapes["text_encoder"].get("vocab_size", 512))}

    def states(self, prompts: list[str]) -> Cond:
        """In small letters: what learns to read here learns it as it is asked in `encode_text`."""
        return super().states([prompt.lower() for prompt in prompts])


def tiny_tokenizer(pieces: int) -> T5Tokenizer:
    """The words of the toy world's prompts in small letters, and every letter for other words."""
    return train_unigram([*(prompt.lower() for prompt in grammar.all_prompts()), *string.printable], pieces - 100)
