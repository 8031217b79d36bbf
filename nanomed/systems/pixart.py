"""PixArt-alpha (Chen et al. 2023): a transformer on the latents of Stable Diffusion's VAE that reads T5's text.

    prompt --T5 encoder, 120 tokens--> states (B, 120, 4096) --keys and values of all blocks--+
                                                                                              v
    noise (B, 4, 64, 64) --20 steps of DPM-Solver++, guidance 4.5--> latents --VAE--> image (B, 3, 512, 512)

    system = nanomed.load("pixart", weights="weights/PixArt-alpha/PixArt-XL-2-512x512", dtype=torch.bfloat16)
    images = system.sample(["An endoscopic image of a polyp."], noise)

Every shape and the noise schedule are read from the folder's own files, so that the 1024-MS version and miniatures
load alike. Med-Art (medart.py) is a fine-tuning recipe of this system.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanomed import weights
from nanomed.autoencoders.kl import AutoencoderKL, KLConfig, load_kl
from nanomed.data import buckets
from nanomed.denoisers.pixart import PixArtConfig, PixArtTransformer, load_pixart
from nanomed.diffusion import samplers
from nanomed.diffusion.guidance import guided
from nanomed.diffusion.process import Cond, Denoise, Diffusion
from nanomed.systems.assembly import TRANSFORMERS, Found, Part
from nanomed.systems.base import System, Weighting, each_once
from nanomed.systems.sizes import SIDES, binned, cropped, trained
from nanomed.text.t5 import T5Config, T5Encoder, load_t5
from nanomed.text.unigram import T5Tokenizer, train_unigram
from nanomed.weights import WeightsError

REPOSITORY = "PixArt-alpha/PixArt-XL-2-512x512"
PRESETS = {"pixart": {}}  # all in the files
RECIPES = {
    "pixart": {  # diffusers' LoRA script for PixArt; the official fine-tuning trains all weights at 2e-5
        "": dict(batch=1, precision="bf16", augment=False, views=1),
        "transformer": dict(steps=10_000, lr=1e-4, weight_decay=1e-2, clip=1.0, ema=0.0, rank=16),
    },
}  # fmt: skip
SOLVER = "DPMSolverMultistepScheduler"
OPTIONS = (Weighting,)  # of train.py for these presets


class PixArt(System):
    """Transformer + T5 + VAE. Trained by MSE between the noise and the first half of the channels (base.py; eq. 3 of
    Med-Art).

    scheduler  settings of its DPM-Solver++ where they are not PixArt's, in the words of a scheduler_config.json
    size       side of the images that it trains on and draws; None: the side that its positions are made for
    length     tokens of a prompt, </s> included
    snr_gamma  min-SNR weighting of the training loss; 0 = none
    """

    defaults = dict(scheduler={}, size=None, length=120, steps=20, guidance=4.5, snr_gamma=0.0)
    name = "pixart"
    parts = {
        "transformer": Part(lambda **shape: PixArtTransformer(PixArtConfig(**shape)), load_pixart),
        "text_encoder": Part(lambda **shape: T5Encoder(T5Config(**shape)), load_t5, TRANSFORMERS),
        "vae": Part(lambda **shape: AutoencoderKL(KLConfig(**shape)), load_kl),
    }
    tokenizers = {"tokenizer": (T5Tokenizer.from_folder, "")}
    repository, denoiser = REPOSITORY, "transformer"
    trimmed = ("attention_mask", "prompt_embeds")
    stages = {"transformer": ("transformer",)}
    adapters = {"transformer": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj", "proj_out",
                                "linear", "linear_1", "linear_2")}  # fmt: skip  # of diffusers' and Med-Art's scripts

    def __init__(self, found: Found, **settings: Any):
        super().__init__(found, **settings)
        c, text, vae = self.transformer.config, self.text_encoder.config, self.vae.config
        if (c.caption_channels, c.in_channels) != (text.d_model, vae.latent_channels):
            raise WeightsError(f"a transformer for text and latents of {(c.caption_channels, c.in_channels)} channels "
                               f"beside T5 and VAE of {(text.d_model, vae.latent_channels)}")  # fmt: skip
        self.diffusion = Diffusion.from_settings({"_class_name": SOLVER} | self.scheduler, "scheduler")
        self.size = self.size or c.sample_size * self.vae.factor
        self.unit = 1 if c.sample_size in SIDES else self.vae.factor * c.patch_size
        self.latent_shape, self.text_shape = self.latent_size(self.size, self.size), (self.length, c.caption_channels)

    @classmethod
    def stated(cls, place: Callable[[str], Path]) -> dict:
        return {"scheduler": read_scheduler(place("scheduler"))}

    @classmethod
    def new_tokenizers(cls, shapes: dict[str, dict], weights_folder: str | Path | None) -> dict[str, Any]:
        return {"tokenizer": train_unigram(["An endoscopic image of a polyp."], 100)}

    def bucket_shapes(self) -> tuple[buckets.Shape, ...]:
        """At the published sizes those of the published training, of up to four to one; else as everywhere."""
        c = self.transformer.config
        if c.sample_size in SIDES and self.size == c.sample_size * self.vae.factor:
            return trained(c.sample_size)
        return buckets.shapes(self.size, self.vae.factor * c.patch_size)

    # ------------------------------------------------------------------------------------------------ text

    def encode_text(self, prompts: list[str]) -> Cond:
        """T5's states of the prompts as they are drawn from: lower-cased and stripped, as the published pipeline does.

        {"prompt_embeds": (B, 120, D), zero at padding, "attention_mask": bool (B, 120)}. The null condition is that of
        "". The time is that of the longest prompt, and each distinct one is encoded once.
        """
        return self.states([prompt.lower().strip() for prompt in prompts])

    def lengths(self, prompts: list[str]) -> list[int]:
        return self.tokenizer.lengths([prompt.lower().strip() for prompt in prompts])

    @each_once
    def states(self, prompts: list[str]) -> Cond:
        """As `encode_text`, of the prompts word for word: so they are in training, in the published scripts too."""
        ids, mask = self.tokenizer(prompts, length=self.length)
        return {"prompt_embeds": self.text_encoder.trimmed(ids, mask), "attention_mask": mask}  # (B, 120, D)

    def read(self, text: Cond, height: int, width: int) -> Cond:
        """What the transformer is called with for images of a size in pixels: keys and values of all blocks, and the
        micro-conditions of the 1024-MS version. Once for a prompt, not for a step; differentiable."""
        states, mask = text["prompt_embeds"].to(self.dtype), text["attention_mask"]
        cond = self.transformer.read_text(states, mask)
        if self.transformer.config.conditioned_on_size:
            rows = len(mask)
            cond["resolution"] = torch.tensor([[float(height), float(width)]] * rows, device=mask.device)
            cond["aspect_ratio"] = torch.tensor([[height / width]] * rows, device=mask.device)
        return cond

    # ------------------------------------------------------------------------------------------------ sampling

    def sample(
        self,
        prompts: list[str],
        noise: samplers.Noise,
        steps: int | None = None,
        guidance: float | None = None,
        negative_prompts: list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        binning: bool = True,
    ) -> Tensor:
        """Draw one image for each prompt: (B, 3, height, width) in [0, 1].

        `noise.randn` is asked once, for the initial latents. With `binning`, other sizes than `size` are drawn at the
        published size of the nearest shape, and scaled and cropped: any height and width will do. Without, they must
        be multiples of a patch's pixels.
        """
        height, width = height or self.size, width or self.size
        drawn = height, width
        if binning and drawn != (self.size, self.size):
            drawn = binned(height, width, self.transformer.config.sample_size)
        x = noise.randn(*self.latent_size(*drawn))
        cond, null = self.conditions(prompts, negative_prompts, *drawn)
        denoise = guided(self.transformer, cond, null, self.guidance if guidance is None else guidance)
        images = self.decode(self.draw(denoise, x, steps or self.steps))
        return self.to_unit(cropped(images, height, width))

    def draw(self, denoise: Denoise, x: Tensor, steps: int) -> Tensor:
        """Latents from initial noise (B, 4, H, W), by DPM-Solver++ 2M. `denoise` is the transformer under guidance,
        with all its channels: `guided` or, to be differentiated in little memory, hldf.py's `recomputed`."""
        return samplers.dpmpp_2m(self.noise_of(denoise), self.diffusion, x, steps)


def read_scheduler(folder: str | Path) -> dict:
    """What a folder's scheduler_config.json says about the noise.

    Raises WeightsError where it is missing or damaged, or asks for another sampler than DPM-Solver++ 2M.
    """
    path = Path(folder) / "scheduler_config.json"
    stated = weights.settings(path, "a scheduler")
    Diffusion.from_settings(stated, str(path))
    if stated["_class_name"] != SOLVER:
        raise WeightsError(f"{path}: PixArt is sampled by {SOLVER}, not by {stated['_class_name']}")
    kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "timestep_spacing",
            "steps_offset")  # fmt: skip
    return {name: stated[name] for name in kept if name in stated}
