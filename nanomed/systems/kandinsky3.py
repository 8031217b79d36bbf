"""Kandinsky 3 (Arkhipkin et al. 2023), and the MMCP team's LoRA on its U-Net (2024, section 4.1).

    prompt --FLAN-UL2's encoder, 128 tokens--> states (B, L, 4096), L that of the longest prompt + 1
    noise (B, 4, 32, 32) --150 steps of the U-Net on them, guidance 4--> latents --MoVQ--> (B, 3, 256, 256)

    system = nanomed.load("kandinsky3", weights="weights/kandinsky-community/kandinsky-3")

Two things are unlike the other systems, and as published. No text is not "" but zeros behind an empty mask. And the
U-Net averages over all L places of a text, so an image depends on how long the longest prompt of its batch is.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from nanomed.adapters import lora
from nanomed.autoencoders.movq import MoVQ, load_movq
from nanomed.denoisers.kandinsky3 import Kandinsky3Config, Kandinsky3UNet, load_kandinsky3, places
from nanomed.diffusion.process import Cond
from nanomed.systems.assembly import TRANSFORMERS, Found, Part
from nanomed.systems.base import Weighting, each_once
from nanomed.systems.scheduled import Scheduled
from nanomed.text.t5 import FLAN_UL2, T5Config, T5Encoder, load_t5
from nanomed.text.unigram import T5Tokenizer, train_unigram
from nanomed.weights import WeightsError

PRESETS = {"kandinsky3": {}}
RECIPES = {
    "kandinsky3": {  # of the released script, as for Kandinsky 2.2; the paper also tried --eps from 1e-15 to 1e-10
        "": dict(data="toy", augment=False, views=1, epochs=100.0, batch=64, lr=1e-4, clip=1.0, ema=0.0, rank=128),
    },
}
SCHEDULER = dict(_class_name="DDPMScheduler", beta_schedule="squaredcos_cap_v2", steps_offset=1)  # no file says it
OPTIONS = (Weighting,)  # of train.py for these presets


class Kandinsky3(Scheduled):
    """U-Net, MoVQ and FLAN-UL2. Trained by MSE on the noise (base.py).

    length      tokens of a prompt, </s> included
    guidance    on the standard scale; published as 3, which is (3 + 1) text - 3 null
    pad         images that are not square are padded with black, instead of cropped
    """

    defaults = dict(scheduler=SCHEDULER, size=256, length=128, steps=150, guidance=4.0, snr_gamma=5.0, pad=True)
    name = "kandinsky3"
    parts = {
        "unet": Part(lambda **shape: Kandinsky3UNet(Kandinsky3Config(**shape)), load_kandinsky3),
        "movq": Part(lambda **shape: MoVQ(**shape or dict(block_out_channels=(256, 512, 512, 1024))), load_movq),
        "text_encoder": Part(lambda **shape: T5Encoder(T5Config(**shape) if shape else FLAN_UL2), load_t5,
                             TRANSFORMERS),
    }  # fmt: skip
    tokenizers = {"tokenizer": (T5Tokenizer.from_folder, "")}
    repository = "kandinsky-community/kandinsky-3"
    autoencoder, image_field = "movq", "latents"
    stages = {"unet": ("unet",)}
    adapters = {"unet": lora.ATTENTION}
    trimmed = ("attention_mask", "prompt_embeds")

    def __init__(self, found: Found, **settings: Any):
        super().__init__(found, **settings)
        needs = self.unet.config.encoder_hid_dim, self.unet.config.in_channels
        has = self.text_encoder.config.d_model, self.movq.latent_channels
        if needs != has:
            raise WeightsError(f"a U-Net for text and latents of {needs} channels beside T5 and MoVQ of {has}")
        self.unit = 8 * self.movq.factor
        self.latent_shape, self.text_shape = self.latent_size(self.size, self.size), (self.length, needs[0])

    @classmethod
    def new_tokenizers(cls, shapes: dict[str, dict], weights_folder: str | Path | None) -> dict[str, Any]:
        return {"tokenizer": train_unigram(["An endoscopic image of a polyp."], 100)}

    @each_once
    def encode_text(self, prompts: list[str]) -> Cond:
        """{"prompt_embeds": (B, 128, 4096), zero at padding, "attention_mask": bool (B, 128)}. Each distinct prompt is
        encoded once."""
        ids, mask = self.tokenizer(prompts, length=self.length)
        return {"prompt_embeds": self.text_encoder.trimmed(ids, mask), "attention_mask": mask}

    def states(self, prompts: list[str]) -> Cond:
        """In training a dropped prompt is what guidance will lead away from."""
        text, said = self.encode_text(prompts), torch.tensor([prompt != "" for prompt in prompts]).to(self.device)
        return {name: value * said.view(-1, *[1] * (value.ndim - 1)) for name, value in text.items()}

    def text(self, batch: dict) -> Cond:
        text = super().text(batch)
        return self.cut(text, self.places(text))

    def read(self, text: Cond, height: int, width: int) -> Cond:
        return self.unet.read_text(text["prompt_embeds"].to(self.dtype), text["attention_mask"])

    def places(self, text: Cond) -> int:
        """Those that texts are cut to, which are read together."""
        return places(text["attention_mask"], self.length)

    def cut(self, text: Cond, count: int) -> Cond:
        """So many places of a text, with padding behind them where there are more."""
        behind = count - text["attention_mask"].shape[1]  # of less than none, `pad` cuts
        return {"prompt_embeds": F.pad(text["prompt_embeds"], (0, 0, 0, behind)),
                "attention_mask": F.pad(text["attention_mask"], (0, behind))}  # fmt: skip

    def conditions(
        self, prompts: list[str], negative_prompts: list[str] | None, height: int, width: int
    ) -> tuple[Cond, Cond]:
        """Negative prompts are cut where the prompts are."""
        text = self.encode_text(prompts)
        nothing = {name: torch.zeros_like(value) for name, value in text.items()}
        away = self.encode_text(negative_prompts) if negative_prompts else nothing
        cond, null = (self.read(self.cut(each, self.places(text)), height, width) for each in (text, away))
        return cond, null

    def latent_size(self, height: int, width: int) -> tuple[int, int, int]:
        """(4, height / 8, width / 8) of a size in pixels, the latents' sides rounded up to the U-Net's multiples of 8.
        """
        rows, columns = (-(-side // (8 * self.movq.factor)) * 8 for side in (height, width))
        return self.unet.config.in_channels, rows, columns
