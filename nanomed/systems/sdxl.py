"""SDXL (Podell et al. 2023): Stable Diffusion with two text encoders, and images' sizes among the conditions.

    prompt --CLIP ViT-L/14 and OpenCLIP bigG, before their last layers--> states (B, 77, 768 + 1280)
           --bigG, pooled and projected--> (B, 1280) --+
    original size, crop and size asked for (B, 6) ------+--> added to the timestep

    system = nanomed.load("sdxl", weights="weights/stabilityai/stable-diffusion-xl-base-1.0", dtype=torch.bfloat16)

Its two tokenizers pad differently. Its VAE overflows in float16, so it is never run in it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanomed import weights
from nanomed.adapters import lora
from nanomed.autoencoders.kl import AutoencoderKL, load_kl
from nanomed.denoisers.stable_diffusion import StableDiffusionConfig, StableDiffusionUNet
from nanomed.diffusion.process import Cond
from nanomed.systems import sd
from nanomed.systems.assembly import TRANSFORMERS, Found, Part
from nanomed.systems.base import each_once
from nanomed.systems.sd import StableDiffusion
from nanomed.text import clip
from nanomed.text.clip import ClipText, ClipTextConfig, load_clip_text
from nanomed.text.tokenizers import ClipTokenizer

PRESETS = {"sdxl": {}}
RECIPES = {"sdxl": sd.LORA}  # of diffusers' script for SDXL, too
OPTIONS = sd.OPTIONS
SCHEDULER = sd.SCHEDULER | dict(_class_name="EulerDiscreteScheduler")
# The published shapes, where no file says them.
UNET = dict(
    sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
    down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 2), transformer_layers_per_block=(1, 2, 10),
    up_block_types=(*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"), use_linear_projection=True,
    addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
)  # fmt: skip


def _load_vae(path: Path, dtype: torch.dtype | None = None) -> AutoencoderKL:
    """In float32 where float16 is asked for, or is what the file holds."""
    vae = load_kl(path, torch.float32 if dtype == torch.float16 else dtype)
    return vae.float() if vae.quant_conv.weight.dtype == torch.float16 else vae


class SDXL(StableDiffusion):
    """U-Net + VAE + two CLIPs.

    zero_null   without negative prompts, guidance leads away from zeros; else from the states of "". The folder's
                model_index.json says so. Training drops prompts to "" in either case, as the published scripts do
    """

    defaults = dict(scheduler=SCHEDULER, guidance=5.0, zero_null=True)
    name = "sdxl"
    parts = {
        "unet": Part(lambda **c: StableDiffusionUNet(StableDiffusionConfig(**c or UNET)),
                     StableDiffusion.parts["unet"].read),
        "vae": Part(lambda **c: AutoencoderKL(sd.KLConfig(**c or dict(scaling_factor=0.13025))), _load_vae),
        "text_encoder": StableDiffusion.parts["text_encoder"],
        "text_encoder_2": Part(lambda **c: ClipText(ClipTextConfig(**c) if c else clip.BIG_G, projection=True),
                               partial(load_clip_text, projection=True), TRANSFORMERS),
    }  # fmt: skip
    tokenizers = dict.fromkeys(["tokenizer", "tokenizer_2"], (ClipTokenizer.from_folder, ""))
    repository = "stabilityai/stable-diffusion-xl-base-1.0"
    adapters = {"unet": lora.ATTENTION, "text_encoder": sd.TEXT, "text_encoder_2": sd.TEXT}
    texts = ("text_encoder", "text_encoder_2")
    text_fields = ("prompt_embeds", "text_embeds")

    def __init__(self, found: Found, **settings: Any):
        super().__init__(found, **settings)
        c, pooled = self.unet.config, self.text_encoder_2.config.projection_dim
        needs, made = c.projection_class_embeddings_input_dim, pooled + 6 * (c.addition_time_embed_dim or 0)
        if made != needs:
            raise weights.WeightsError(f"a U-Net for {needs} channels of pooled text and sizes beside a CLIP that "
                                       f"makes {made}")  # fmt: skip

    @classmethod
    def stated(cls, place: Callable[[str], Path]) -> dict:
        index = weights.settings(place("model_index.json"), "a pipeline")
        return super().stated(place) | {"zero_null": bool(index.get("force_zeros_for_empty_prompt", True))}

    def text_width(self) -> int:
        return self.text_encoder.config.hidden_size + self.text_encoder_2.config.hidden_size

    @each_once
    def encode_text(self, prompts: list[str]) -> Cond:
        """{"prompt_embeds": (B, 77, 2048), both CLIPs' states before their last layers, "text_embeds": (B, 1280), the
        second one's pooled text}."""
        seen = []
        for tokenizer, name in ((self.tokenizer, "text_encoder"), (self.tokenizer_2, "text_encoder_2")):
            ids, _ = tokenizer(prompts, length=self.text_shape[0])
            seen.append(self.get_submodule(name).features(ids.to(self.weight(name).device)))
        states = torch.cat([s.penultimate.to(self.device) for s in seen], dim=-1)
        return {"prompt_embeds": states, "text_embeds": seen[1].embeds}

    def no_text(self, prompts: list[str]) -> Cond:
        null = super().no_text(prompts)
        return {name: torch.zeros_like(value) for name, value in null.items()} if self.zero_null else null

    def text(self, batch: dict) -> Cond:
        """With what the images of a batch were, before they were scaled and cut (`--buckets`)."""
        return super().text(batch) | {name: batch[name] for name in ("sizes",) if name in batch}

    def read(self, text: Cond, height: int, width: int) -> Cond:
        """Images are said to be of the size that they have, and not cropped, where `text` has no "sizes" (B, 6)."""
        states, pooled = (text[name].to(self.dtype) for name in self.text_fields)
        whole = torch.tensor([[height, width, 0, 0, height, width]] * len(states), device=states.device)
        return self.unet.read_text(states, pooled, text.get("sizes", whole).to(states.device))

    def frozen(self, stage: str) -> dict[str, tuple[str, Callable]]:
        found = super().frozen(stage)
        return found | ({"text": (" ".join(self.texts), self.states)} if "text" in found else {})

    def example(self, stage: str, batch: int, device: torch.device) -> dict:
        pooled = torch.randn(batch, self.text_encoder_2.config.projection_dim, device=device)
        return super().example(stage, batch, device) | {"text_embeds": pooled}

    def image_moments(self, images: Tensor) -> dict[str, Tensor]:
        with self._whole_range():
            return super().image_moments(images)

    def decode(self, latents: Tensor) -> Tensor:
        with self._whole_range():
            return super().decode(latents)

    def _whole_range(self) -> AbstractContextManager:
        """No autocast to float16 around the VAE."""
        kind = self.device.type
        narrow = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        return torch.autocast(kind, enabled=False) if narrow else nullcontext()
