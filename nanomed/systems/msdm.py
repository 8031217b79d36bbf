"""MSDM: the MMCP team's own text-to-image model (Chaichuk & Tutubalina, ImageCLEFmed MEDVQA-GI 2024, section 4.2).

    prompt --CLIP text encoder--> states (B, 64, 768) --+
                                                        v
    noise (B, 8, 32, 32) --150 steps of the U-Net, guidance 4.5--> latents --VAE decoder--> image (B, 3, 256, 256)

Stage "vae" trains the autoencoder on images, stage "unet" the denoiser on its frozen latents. Where the released code
and the paper part, this is the paper done right; README.md beside this file lists every such place.
"""

import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanomed import weights
from nanomed.autoencoders.losses import VGGDistance, load_vgg
from nanomed.autoencoders.msdm import MSDMVAE
from nanomed.denoisers.msdm import MSDMUNet
from nanomed.diffusion import samplers
from nanomed.diffusion.guidance import guided, self_conditioned
from nanomed.diffusion.process import Cond, Diffusion
from nanomed.run.flags import UsageError
from nanomed.systems.assembly import TRANSFORMERS, Found, Part, read_config
from nanomed.systems.base import Reading, System, Weighting, each_once
from nanomed.text.clip import ClipText, ClipTextConfig, load_clip_text
from nanomed.text.tokenizers import ClipTokenizer

CLIP_L = "openai/clip-vit-large-patch14"
# What the constructor takes, and what train.py does with it stage by stage. The comment is what it must reach.
PRESETS = {"msdm": dict(vae={}, unet={})}  # paper: FID 35 on the development set after 100,000 steps
RECIPES = {
    "msdm": {  # facts of the released scripts: Adam for the VAE, AdamW without decay for the U-Net
        "": dict(data="toy", augment=True),
        "vae": dict(steps=20_000, batch=64, lr=1e-4, clip=0.0, ema=0.0),
        "unet": dict(steps=100_000, batch=64, lr=1e-4, clip=1.0, ema=0.9999, views=8),
    },
}
SAMPLERS = {"msdm": ("msdm", samplers.ddim), "ddim": ("msdm", samplers.ddim), "dpmpp": ("linspace", samplers.dpmpp_2m)}
DISTANCES = {"l1": F.l1_loss, "mse": F.mse_loss}
OPTIONS = (Weighting, Reading)  # of train.py for these presets


class MSDM(System):
    """VAE + U-Net + CLIP text encoder; the last is the published ViT-L/14, frozen, or a small one that trains along.

    sampler   "msdm" (the paper's: DDIM with eta 1), "ddim" (eta 0) or "dpmpp" (DPM-Solver++ 2M)
    guidance  on the standard scale, 1 = none; the paper writes 3.5 for what is 4.5 here
    minmax    stretch every image to its own minimum and maximum, as the released code does before its metrics; the
              default maps [-1, 1] to [0, 1] and clamps
    """

    defaults = dict(size=256, text_length=64, latent_scale=1.0, self_conditioning=True, prediction="epsilon",
                    loss="l1", snr_gamma=0.0, sampler="msdm", steps=150, guidance=4.5, minmax=False)  # fmt: skip
    name = "msdm"
    parts = {
        "text_encoder": Part(lambda **c: ClipText(ClipTextConfig(**c)), load_clip_text, TRANSFORMERS, CLIP_L, ""),
        "vae": Part(MSDMVAE),
        "unet": Part(MSDMUNet),
    }
    tokenizers = {"tokenizer": (ClipTokenizer.from_folder, CLIP_L)}
    denoiser = "unet"
    chunks = True
    dropout = 0.2  # "context dropout", drawn for each sample by the data loader

    def __init__(self, found: Found, **settings: Any):
        super().__init__(found, **settings)
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler {self.sampler!r}: choose one of {', '.join(SAMPLERS)}")
        self.unit = 4 << len(self.vae.encoders)
        if self.size % self.unit:
            raise UsageError(f"--size {self.size}: a multiple of {self.unit} for {self.name}")
        side = self.size >> len(self.vae.encoders)
        self.text_shape = self.text_length, self.text_encoder.config.hidden_size
        self.latent_shape = (self.vae.inc_dec.block_seq[0].conv_res.in_channels, side, side)
        learns = "text_encoder" in self.shapes
        self.stages = {"vae": ("vae",), "unet": ("unet", "text_encoder") if learns else ("unet",)}
        self.diffusion = Diffusion(0.002, 0.02, "scaled_linear", self.prediction, spacing="msdm")
        self._perceptual: list[VGGDistance] = []  # one, where VGG16's file is at hand; in a list, so it is no part

    @property
    def latent_scale(self) -> float:
        """1 / standard deviation of the latents, once `finish` has measured it."""
        return self.vae.scale

    @latent_scale.setter
    def latent_scale(self, scale: float) -> None:
        self.vae.scale = scale

    @classmethod
    def new_tokenizers(cls, shapes: dict[str, dict], weights_folder: str | Path | None) -> dict[str, Any]:
        """The small vocabulary that is shipped."""
        return {"tokenizer": ClipTokenizer.from_folder(weights.find("msdm-tiny", weights_folder) / "tokenizer")}

    @classmethod
    def complete(cls, shapes: dict[str, dict], tokenizers: dict[str, Any], settings: dict) -> dict[str, dict]:
        text = shapes.get("text_encoder")
        if text is not None:
            shapes["text_encoder"] = text | {"vocab_size": len(tokenizers["tokenizer"])}
        latent = shapes["vae"].get("latent", 8)
        known = dict(latent=latent, text=(text or {}).get("hidden_size", 768),
                     self_conditioning=settings.get("self_conditioning", True))  # fmt: skip
        return shapes | {"unet": known | shapes["unet"]}

    @classmethod
    def understood(cls, settings: dict) -> dict:
        """Version 0.1 wrote `text`, and null for the paper's shapes."""
        text = settings.pop("text", None)
        return settings | {part: settings.get(part) or {} for part in ("vae", "unet")} | (
            {"text_encoder": text} if text else {}
        )

    # ------------------------------------------------------------------------------------------------ training

    @each_once
    def encode_text(self, prompts: list[str]) -> Cond:
        """CLIP's last hidden states of the prompts padded to 64 tokens; each distinct prompt is encoded once.

        The null condition is the same thing for "". The padding stays, because the U-Net's text pooling reads it.
        """
        device = self.weight("text_encoder").device
        if self.pieces == 1:
            ids, mask = (tensor.to(device) for tensor in self.tokenizer(prompts, length=self.text_length))
            return {"prompt_embeds": self.text_encoder(ids, mask), "attention_mask": mask}  # (B, 64, 768)
        pieces = self.tokenizer.in_pieces(prompts, self.text_length, self.pieces)
        ids, mask = (tensor.to(device) for tensor in pieces)  # (B, n, 64)
        states = self.text_encoder(ids.flatten(0, 1), mask.flatten(0, 1)).unflatten(0, mask.shape[:2])
        empty = mask.sum(2, keepdim=True) == 2  # behind the prompt's end: nothing is to be read there
        empty[:, 0] = False
        return {"prompt_embeds": states.flatten(1, 2), "attention_mask": (mask & ~empty).flatten(1, 2)}

    def forward(self, batch: dict, stage: str, step: int) -> dict[str, Tensor]:
        """The VAE's loss, or L1 between the noise and the U-Net's prediction of it (paper, section 4.2).

        `batch` holds "image" or its cached "moments", and "prompt" or its cached "prompt_embeds", "attention_mask".
        """
        if stage == "vae":
            images = batch["image"]
            noise = torch.randn(len(images), *self.latent_shape, device=images.device)
            return self.vae.loss(images, noise, *self._perceptual)
        x0, cond = self.latents(batch), self.unet.read_text(**self.text(batch))
        seen = random.random() < 0.5  # Chen et al. 2023: half the steps see an estimate

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            self_cond = torch.zeros_like(x0)
            if self.self_conditioning and seen:
                with torch.no_grad():
                    self_cond = self.diffusion.estimates(self.unet(x_t, t, **cond, self_cond=self_cond), x_t, t)[0]
            return self.unet(x_t, t, **cond, self_cond=self_cond)

        return {"loss": self.denoising_loss(predict, x0, DISTANCES[self.loss])}

    def load_optional(self, stage: str, folder: str | None) -> str:
        """VGG16 for the perceptual part of the VAE's loss."""
        if stage != "vae":
            return ""
        try:
            self._perceptual = [load_vgg(folder).to(self.device)]
        except FileNotFoundError:
            return "VAE loss without its perceptual part: put torchvision's vgg16-397923af.pth into weights/ to have it"
        return ""

    def finish(self, stage: str, image_batches: Iterable[Tensor]) -> dict[str, float]:
        """After the VAE: scale its latents to unit deviation from now on."""
        return {"latent_std": self.vae.standardise(image_batches)} if stage == "vae" else {}

    def resume(self, stage: str, folder: str | Path) -> None:
        super().resume(stage, folder)
        self.latent_scale = read_config(folder)["latent_scale"]

    # ------------------------------------------------------------------------------------------------ sampling

    def sample(self, prompts: list[str], noise: samplers.Noise, steps: int | None = None,
               guidance: float | None = None, negative_prompts: list[str] | None = None, height: int | None = None,
               width: int | None = None) -> Tensor:  # fmt: skip
        """Draw one image for each prompt: (B, 3, height, width) in [0, 1].

        `noise.randn` is asked for the initial latents and, by the stochastic sampler, once a step.
        """
        factor = 1 << len(self.vae.encoders)
        height, width = height or self.size, width or self.size
        if height % self.unit or width % self.unit:
            raise ValueError(f"{height} x {width}: sides must be multiples of {self.unit}")
        cond = self.unet.read_text(**self.encode_text(prompts))
        null = self.unet.read_text(**self.encode_text(negative_prompts or [""] * len(prompts)))
        denoise = guided(self.unet, cond, null, self.guidance if guidance is None else guidance)
        sampler, (diffusion,) = SAMPLERS[self.sampler][1], self.sampled()
        if self.self_conditioning:
            denoise = self_conditioned(denoise, diffusion)
        eta = {"eta": 1.0} if self.sampler == "msdm" else {}
        x = noise.randn(self.latent_shape[0], height // factor, width // factor)
        x = sampler(denoise, diffusion, x.to(self.dtype), steps or self.steps, noise, **eta)
        return self.to_unit(self.decode(x))

    def sampled(self) -> tuple[Diffusion, ...]:
        return (replace(self.diffusion, spacing=SAMPLERS[self.sampler][0]),)

    def to_unit(self, images: Tensor) -> Tensor:
        """Decoded images to [0, 1]."""
        if not self.minmax:
            return super().to_unit(images)
        flat = images.flatten(1)
        low, high = flat.amin(1).view(-1, 1, 1, 1), flat.amax(1).view(-1, 1, 1, 1)
        return (images - low) / (high - low).clamp(min=1e-8)
