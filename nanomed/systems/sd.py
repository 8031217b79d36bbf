"""Stable Diffusion 1.4 and 1.5 (Rombach et al. 2022): a U-Net on a KL autoencoder's latents that reads CLIP's text.

    prompt --CLIP ViT-L/14, 77 tokens--> states (B, 77, 768) --keys and values of all blocks--+
                                                                                              v
    noise (B, 4, 64, 64) --50 steps of PNDM, guidance 7.5--> latents --VAE--> image (B, 3, 512, 512)

    system = nanomed.load("sd15", weights="weights/stable-diffusion-v1-5/stable-diffusion-v1-5")
    images = system.sample(["An endoscopic image of a polyp."], noise, sampler="dpmpp_2m", steps=20)

Every shape, the noise and the sampler are read from the folder's own files. SDXL (sdxl.py) is this with more text.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from nanomed.adapters import lora
from nanomed.autoencoders.kl import AutoencoderKL, KLConfig, load_kl
from nanomed.denoisers.stable_diffusion import StableDiffusionConfig, StableDiffusionUNet, load_stable_diffusion
from nanomed.diffusion.process import Cond
from nanomed.systems.assembly import TRANSFORMERS, Found, Part
from nanomed.systems.base import Weighting, each_once
from nanomed.systems.scheduled import Scheduled
from nanomed.text.clip import ClipText, ClipTextConfig, load_clip_text
from nanomed.text.tokenizers import ClipTokenizer, train_bpe
from nanomed.weights import WeightsError

PRESETS = {"sd14": {}, "sd15": {}}  # all in the files
LORA = {  # diffusers' text-to-image LoRA script, as its README runs it
    "": dict(batch=1, precision="bf16", augment=False, views=1),
    "unet": dict(steps=15_000, accumulate=4, lr=1e-4, schedule="cosine", weight_decay=1e-2, clip=1.0, ema=0.0, rank=4),
}  # fmt: skip
RECIPES = {"sd14": LORA, "sd15": LORA}
# Where no file says it. Also SDXL's, but for the class.
SCHEDULER = dict(_class_name="PNDMScheduler", beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                 timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False, skip_prk_steps=True,
                 clip_sample=False)  # fmt: skip
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj")  # of CLIP, that an adapter takes hold of


@dataclass
class Options:
    """options of Stable Diffusion"""

    text_adapter: Annotated[str, " | none | lora | rslora | dora | rsdora"] = "none"  # kind of adapter on the text
    # encoders; empty: as --adapter; none: they do not train


OPTIONS = (Options, Weighting)  # of train.py for these presets


class StableDiffusion(Scheduled):
    """U-Net + VAE + CLIP. Trained by MSE on the noise, or on v (base.py).

    size          side of the images that it trains on and draws; None: the side that the U-Net is made for
    text_adapter  kind of the text encoders' adapters; "" as the U-Net's, "none": they do not train
    """

    defaults = dict(scheduler=SCHEDULER, size=None, steps=50, guidance=7.5, text_adapter="none")
    name = "sd15"
    parts = {
        "unet": Part(lambda **shape: StableDiffusionUNet(StableDiffusionConfig(**shape)), load_stable_diffusion),
        "vae": Part(lambda **shape: AutoencoderKL(KLConfig(**shape)), load_kl),
        "text_encoder": Part(lambda **shape: ClipText(ClipTextConfig(**shape)), load_clip_text, TRANSFORMERS),
    }
    tokenizers: dict[str, tuple[Callable[[Path], Any], str]] = {"tokenizer": (ClipTokenizer.from_folder, "")}
    repository = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    adapters = {"unet": lora.ATTENTION, "text_encoder": TEXT}
    texts: tuple[str, ...] = ("text_encoder",)
    text_fields: tuple[str, ...] = ("prompt_embeds",)

    def __init__(self, found: Found, **settings: Any):
        super().__init__(found, **settings)
        c, vae = self.unet.config, self.vae.config
        needs, has = (c.cross_attention_dim, c.in_channels), (self.text_width(), vae.latent_channels)
        if needs != has or c.in_channels != c.out_channels:
            raise WeightsError(f"a U-Net for text and latents of {needs} channels beside CLIP and VAE of {has}")
        self.size, self.unit = self.size or c.sample_size * self.vae.factor, self.vae.factor
        self.stages = {"unet": ("unet",) if self.text_adapter == "none" else ("unet", *self.texts)}
        self.latent_shape = self.latent_size(self.size, self.size)
        self.text_shape = (self.text_encoder.config.max_position_embeddings, c.cross_attention_dim)

    @classmethod
    def new_tokenizers(cls, shapes: dict[str, dict], weights_folder: str | Path | None) -> dict[str, Any]:
        return {name: train_bpe(["An endoscopic image of a polyp."], 100) for name in cls.tokenizers}

    def text_width(self) -> int:
        """Channels of the states that the U-Net is given."""
        return self.text_encoder.config.hidden_size

    @each_once
    def encode_text(self, prompts: list[str]) -> Cond:
        """{"prompt_embeds": (B, 77, D)} after CLIP's last norm; rows of padding are read, too. Each distinct prompt is
        encoded once."""
        ids, _ = self.tokenizer(prompts, length=self.text_shape[0])
        return {"prompt_embeds": self.text_encoder(ids.to(self.weight("text_encoder").device))}

    def no_text(self, prompts: list[str]) -> Cond:
        """What guidance leads away from where nothing is said: "", as often as there are prompts."""
        return self.encode_text([""] * len(prompts))

    def read(self, text: Cond, height: int, width: int) -> Cond:
        """What the U-Net is called with for images of a size in pixels. Once for a prompt, not for a step."""
        return self.unet.read_text(text["prompt_embeds"].to(self.dtype))

    def conditions(
        self, prompts: list[str], negative_prompts: list[str] | None, height: int, width: int
    ) -> tuple[Cond, Cond]:
        away = self.encode_text(negative_prompts) if negative_prompts else self.no_text(prompts)
        return self.read(self.encode_text(prompts), height, width), self.read(away, height, width)


class StableDiffusion14(StableDiffusion):
    """The same shapes with other weights."""

    name, repository = "sd14", "CompVis/stable-diffusion-v1-4"
