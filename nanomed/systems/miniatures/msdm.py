"""MSDM in small: the demo of the README, and the checkpoint in weights/. All parts of the checkpoint learned the toy
world from nothing, the encoder of texts together with the U-Net; the demo begins with the checkpoint's encoder.
"""

from pathlib import Path
from typing import Any, Self

import torch

from nanomed import weights
from nanomed.systems.miniatures import TEST_PROMPTS
from nanomed.systems.msdm import MSDM, OPTIONS

__all__ = ["MSDM", "OPTIONS", "PRESETS", "RECIPES", "MSDMTiny"]

TINY_TEXT = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
                 max_position_embeddings=64, hidden_act="quick_gelu")  # fmt: skip
TINY = dict(self_conditioning=False, prediction="sample", loss="mse", vae=dict(latent=4, channels=(16, 32, 64)),
            text_encoder=TINY_TEXT, text_length=32, sampler="dpmpp", steps=16, guidance=6.0)  # fmt: skip

PRESETS = {
    # Demo, nine minutes on two CPU cores. x_0 and MSE, because at the noise levels where the layout of an image is
    # decided the L1 loss on epsilon hardly notices x_0; groups of several channels, because groups of one erase what
    # the text adds to a channel; `places`, because without it no prompt's place was learned in 800 steps.
    # More guidance draws instruments where they are named, and after so few steps polyps beside those that are named.
    "msdm-tiny": TINY | dict(size=32, guidance=6.5,
                             unet=dict(channels=(32, 32, 128), dim=128, dropout=0.0, groups=8, places=8)),
    # The checkpoint in weights/msdm-tiny: the same with one level more, to reach 4 x 4 latents from 16 x 16.
    "msdm-tiny-64": TINY | dict(size=64, unet=dict(channels=(32, 32, 32, 112), dim=128, dropout=0.0, groups=8,
                                                   places=16)),
}  # fmt: skip
TINY_VAE = dict(steps=400, batch=32, lr=3e-3, schedule="cosine", warmup=20, ema=0.0, clip=1.0, save_every=200)
TINY_UNET = dict(batch=32, lr=1.5e-3, schedule="cosine", warmup=50, ema=0.99, clip=1.0, dropout=0.1, views=1,
                 places=0.3, score_images=0)  # fmt: skip
RECIPES = {
    # The best checkpoint by validation loss: between Frechet distances of 64 images chance decides. No flips: guidance
    # leads away from what is drawn without a prompt, and that, flipped, had two polyps an image where the data has one.
    "msdm-tiny": {
        "": dict(data="toy:2000", augment=False, test_prompts=TEST_PROMPTS),
        # Many small steps: after 400 of 32 images the decoder blurs one instrument in seven until it cannot be read.
        "vae": TINY_VAE | dict(steps=1000, batch=16, save_every=500),
        "unet": TINY_UNET | dict(steps=1500, save_every=750, places_first=400, places=0.4, flips=False),
    },
    "msdm-tiny-64": {  # about forty minutes on one CPU core
        "": dict(data="toy:4000", augment=False, test_prompts=TEST_PROMPTS),
        "vae": TINY_VAE,
        "unet": TINY_UNET | dict(steps=6000, save_every=1000, places_first=600),
    },
}  # fmt: skip


class MSDMTiny(MSDM):
    """The demo. As the paper's U-Net begins with a CLIP that can read, this one's begins with the small encoder that
    ships in weights/msdm-tiny, and tunes it. From nothing, which of several places a prompt names is what is learned
    last: that was right in three prompts of four after 1,900 steps.
    """

    @classmethod
    def build(cls, weights_folder: str | Path | None = None, random: bool = False,
              dtype: torch.dtype | None = None, **settings: Any) -> Self:  # fmt: skip
        system = super().build(weights_folder, random, dtype, **settings)
        if not random:
            system.read_parts(weights.find("msdm-tiny", weights_folder), dtype, ["text_encoder"])
        return system
