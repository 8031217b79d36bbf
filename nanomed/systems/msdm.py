"""MSDM: the MMCP team's own text-to-image model (Chaichuk & Tutubalina, ImageCLEFmed MEDVQA-GI 2024, section 4.2).

    prompt --CLIP text encoder--> states (B, 64, 768) --+
                                                        v
    noise (B, 8, 32, 32) --150 steps of the U-Net, guidance 4.5--> latents --VAE decoder--> image (B, 3, 256, 256)

Stage "vae" trains the autoencoder on images, stage "unet" the denoiser on its frozen latents. Where the released code
and the paper part, this is the paper done right; README.md lists every such place.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nanomed import weights
from nanomed.autoencoders.losses import VGGDistance
from nanomed.autoencoders.msdm import MSDMVAE
from nanomed.denoisers.msdm import MSDMUNet
from nanomed.diffusion import samplers
from nanomed.diffusion.guidance import guided, self_conditioned
from nanomed.diffusion.process import Cond, Diffusion
from nanomed.systems.base import System, read_config
from nanomed.text.clip import ClipText, ClipTextConfig
from nanomed.text.tokenizers import ClipTokenizer

CLIP_L = "openai/clip-vit-large-patch14"
TINY_TEXT = dict(vocab_size=0, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
                 max_position_embeddings=64, hidden_act="quick_gelu")  # fmt: skip  # vocab_size: the tokenizer's
TINY = dict(self_conditioning=False, prediction="sample", loss="mse", vae=dict(latent=4, channels=(16, 32, 64)),
            text=TINY_TEXT, text_length=32, sampler="dpmpp", steps=16, guidance=6.0)  # fmt: skip

# What the constructor takes, and what train.py does with it stage by stage. The comment is what it must reach.
PRESETS = {
    "msdm": dict(size=256, self_conditioning=True),  # paper: FID 35 on the development set after 100,000 steps
    # Demo, six minutes on two CPU cores. x_0 and MSE, because at the noise levels where the layout of an image is
    # decided the L1 loss on epsilon hardly notices x_0; groups of several channels, because groups of one erase what
    # the text adds to a channel; `places`, because without it no prompt's place was learned in 800 steps.
    "msdm-tiny": TINY | dict(size=32, unet=dict(channels=(32, 32, 128), dim=128, dropout=0.0, groups=8, places=8)),
    # The checkpoint in weights/msdm-tiny: the same with one level more, to reach 4 x 4 latents from 16 x 16.
    "msdm-tiny-64": TINY | dict(size=64, unet=dict(channels=(32, 32, 32, 112), dim=128, dropout=0.0, groups=8,
                                                   places=16)),
}  # fmt: skip
TINY_VAE = dict(steps=400, batch=32, lr=3e-3, schedule="cosine", warmup=20, ema=0.0, clip=1.0, save_every=200)
TINY_UNET = dict(batch=32, lr=1.5e-3, schedule="cosine", warmup=50, ema=0.99, clip=1.0, dropout=0.1, views=1,
                 places=0.3, score_images=0)  # fmt: skip
RECIPES = {
    "msdm": {  # facts of the released scripts: Adam for the VAE, AdamW without decay for the U-Net
        "": dict(data="toy", augment=True),
        "vae": dict(steps=20_000, batch=64, lr=1e-4, clip=0.0, ema=0.0),
        "unet": dict(steps=100_000, batch=64, lr=1e-4, clip=1.0, ema=0.9999, views=8),
    },
    # The best checkpoint by validation loss: between Frechet distances of 64 images chance decides.
    "msdm-tiny": {
        "": dict(data="toy:2000", augment=False, allocator=True, test_prompts="weights/msdm-tiny/test.csv"),
        "vae": TINY_VAE,
        "unet": TINY_UNET | dict(steps=1900, save_every=950, places_first=400),
    },
    "msdm-tiny-64": {  # about forty minutes on one CPU core
        "": dict(data="toy:4000", augment=False, allocator=True, test_prompts="weights/msdm-tiny/test.csv"),
        "vae": TINY_VAE,
        "unet": TINY_UNET | dict(steps=6000, save_every=1000, places_first=600),
    },
}  # fmt: skip
FLAGS = ("size", "snr_gamma")  # of train.py, that are settings of the constructor
SAMPLERS = {"msdm": ("msdm", samplers.ddim), "ddim": ("msdm", samplers.ddim), "dpmpp": ("linspace", samplers.dpmpp_2m)}


class MSDM(System):
    """VAE + U-Net + CLIP text encoder.

    text      None: the published CLIP ViT-L/14, frozen; else the configuration of a small CLIP text model that trains
              with the U-Net
    sampler   "msdm" (the paper's: DDIM with eta 1), "ddim" (eta 0) or "dpmpp" (DPM-Solver++ 2M)
    guidance  on the standard scale, 1 = none; the paper writes 3.5 for what is 4.5 here
    minmax    stretch every image to its own minimum and maximum, as the released code does before its metrics; the
              default maps [-1, 1] to [0, 1] and clamps
    """

    dropout = 0.2  # "context dropout", drawn for each sample by the data loader

    def __init__(
        self,
        tokenizer: ClipTokenizer,
        size: int = 256,
        vae: dict | None = None,
        unet: dict | None = None,
        text: dict | None = None,
        text_length: int = 64,
        latent_scale: float = 1.0,
        self_conditioning: bool = True,
        prediction: str = "epsilon",
        sampler: str = "msdm",
        steps: int = 150,
        guidance: float = 4.5,
        minmax: bool = False,
        snr_gamma: float = 0.0,
        loss: str = "l1",
    ):
        super().__init__()
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
        self._config = dict(size=size, vae=vae, unet=unet, text=text, text_length=text_length,
                            self_conditioning=self_conditioning, prediction=prediction, loss=loss,
                            sampler=sampler, steps=steps, guidance=guidance, minmax=minmax)  # fmt: skip
        self.size, self.sampler, self.steps, self.guidance, self.minmax = size, sampler, steps, guidance, minmax
        self.snr_gamma, self.loss, self.text_length = snr_gamma, loss, text_length
        self.tokenizer = tokenizer
        clip = ClipTextConfig(**text) if text else ClipTextConfig()
        self.text_encoder = ClipText(clip)
        self.vae = MSDMVAE(**vae or {})
        self.vae.scale = latent_scale
        latent = self.vae.inc_dec.block_seq[0].conv_res.in_channels
        self.unet = MSDMUNet(latent, text=clip.hidden_size, self_conditioning=self_conditioning, **unet or {})
        self.latent_shape = (latent, size >> len(self.vae.encoders), size >> len(self.vae.encoders))
        self.stages = {"vae": ("vae",), "unet": ("unet", "text_encoder") if text else ("unet",)}
        self.diffusion = Diffusion(0.002, 0.02, "scaled_linear", prediction, spacing="msdm")
        self._perceptual: list[VGGDistance] = []  # one, where VGG16's file is at hand; in a list, so it is no part

    # ------------------------------------------------------------------------------------------------ training

    def encode_text(self, prompts: list[str]) -> Cond:
        """CLIP's last hidden states of the prompts padded to 64 tokens; each distinct prompt is encoded once.

        The null condition is the same thing for "". The padding stays, because the U-Net's text pooling reads it.
        """
        distinct = list(dict.fromkeys(prompts))
        ids, mask = self.tokenizer(distinct, length=self.text_length)
        device = next(self.text_encoder.parameters()).device
        ids, mask = ids.to(device), mask.to(device)
        states = self.text_encoder(ids, mask)  # (distinct, 64, 768)
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=device)
        return {"prompt_embeds": states[rows], "attention_mask": mask[rows]}

    def forward(self, batch: dict, stage: str, step: int) -> dict[str, Tensor]:
        """The VAE's loss, or L1 between the noise and the U-Net's prediction of it (paper, section 4.2).

        `batch` holds "image" or its cached "moments", and "prompt" or its cached "prompt_embeds", "attention_mask".
        """
        if stage == "vae":
            images = batch["image"]
            noise = torch.randn(len(images), *self.latent_shape, device=images.device)
            return self.vae.loss(images, noise, *self._perceptual)
        moments = batch["moments"] if "moments" in batch else self.image_moments(batch["image"])["moments"]
        x0 = self.vae.latents(moments, torch.randn_like(moments.chunk(2, 1)[0]))  # a fresh draw every step
        if "prompt_embeds" in batch:
            cond = {name: batch[name] for name in ("prompt_embeds", "attention_mask")}
        else:
            cond = self.encode_text(batch["prompt"])
        return self.denoising_loss(x0, cond)

    def denoising_loss(self, x0: Tensor, cond: Cond) -> dict[str, Tensor]:
        t = torch.randint(len(self.diffusion.alphas_cumprod), (len(x0),), device=x0.device)
        noise = torch.randn_like(x0)
        x_t = self.diffusion.noised(x0, t, noise)
        cond = self.unet.read_text(**cond)
        self_cond = torch.zeros_like(x0)
        if self.unet.self_conditioning and torch.rand(()) < 0.5:  # Chen et al. 2023: half the steps see an estimate
            with torch.no_grad():
                self_cond = self.diffusion.estimates(self.unet(x_t, t, **cond, self_cond=self_cond), x_t, t)[0]
        prediction = self.unet(x_t, t, **cond, self_cond=self_cond)
        distance = {"l1": F.l1_loss, "mse": F.mse_loss}[self.loss]
        loss = distance(prediction.float(), self.diffusion.target(x0, t, noise), reduction="none").flatten(1).mean(1)
        if self.snr_gamma:
            loss = loss * self.diffusion.min_snr_weight(t, self.snr_gamma)
        return {"loss": loss.mean()}

    def image_moments(self, images: Tensor) -> dict[str, Tensor]:
        """What the frozen VAE makes of images: the moments, from which a latent is drawn fresh every step."""
        return {"moments": self.vae.moments(images)}

    def frozen(self, stage: str) -> dict[str, tuple[str, Callable]]:
        if stage == "vae":
            return {}
        fields = {"image": ("vae", self.image_moments)}
        if "text_encoder" not in self.stages["unet"]:
            fields["text"] = ("text_encoder", self.encode_text)
        return fields

    def example(self, stage: str, batch: int, device: torch.device) -> dict:
        side = self.size
        if stage == "vae":
            return {"image": torch.rand(batch, 3, side, side, device=device) * 2 - 1}
        channels, height, width = self.latent_shape
        states = torch.randn(batch, self.text_length, self.text_encoder.config.hidden_size, device=device)
        mask = torch.ones(batch, self.text_length, dtype=torch.bool, device=device)
        moments = torch.randn(batch, 2 * channels, height, width, device=device)
        return {"moments": moments, "prompt_embeds": states, "attention_mask": mask}

    def load_optional(self, stage: str, folder: str | None) -> str:
        """VGG16 for the perceptual part of the VAE's loss."""
        if stage != "vae":
            return ""
        try:
            found = weights.find("vgg16-397923af.pth", folder)
        except FileNotFoundError:
            return "VAE loss without its perceptual part: put torchvision's vgg16-397923af.pth into weights/ to have it"
        with torch.device("meta"):
            perceptual = VGGDistance()
        tensors = weights.read_pickle(found, prefix="features.")
        device = next(self.vae.parameters()).device
        self._perceptual = [weights.load(perceptual, tensors).to(device).requires_grad_(False)]
        return ""

    def finish(self, stage: str, image_batches: Iterable[Tensor]) -> dict[str, float]:
        """After the VAE: measure the standard deviation of its latents and scale them to 1 from now on."""
        if stage != "vae":
            return {}
        total = count = 0.0
        squares = 0.0
        for images in image_batches:
            mean, logvar = self.vae.moments(images).double().chunk(2, dim=1)
            total += mean.sum().item()
            squares += (mean**2 + logvar.exp()).sum().item()  # E z^2 of z ~ N(mean, var)
            count += mean.numel()
        deviation = (squares / count - (total / count) ** 2) ** 0.5
        self.vae.scale = 1 / deviation
        return {"latent_std": deviation}

    def resume(self, stage: str, folder: str | Path) -> None:
        super().resume(stage, folder)
        self.vae.scale = read_config(folder)["latent_scale"]

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
    ) -> Tensor:
        """Draw one image for each prompt: (B, 3, height, width) in [0, 1].

        `noise.randn` is asked for the initial latents and, by the stochastic sampler, once a step.
        """
        factor = 1 << len(self.vae.encoders)
        height, width = height or self.size, width or self.size
        if height % (factor * 4) or width % (factor * 4):
            raise ValueError(f"{height} x {width}: sides must be multiples of {factor * 4}")
        cond = self.unet.read_text(**self.encode_text(prompts))
        null = self.unet.read_text(**self.encode_text(negative_prompts or [""] * len(prompts)))
        denoise = guided(self.unet, cond, null, self.guidance if guidance is None else guidance)
        spacing, sampler = SAMPLERS[self.sampler]
        diffusion = replace(self.diffusion, spacing=spacing)
        if self.unet.self_conditioning:
            denoise = self_conditioned(denoise, diffusion)
        eta = {"eta": 1.0} if self.sampler == "msdm" else {}
        x = noise.randn(self.latent_shape[0], height // factor, width // factor)
        x = sampler(denoise, diffusion, x.to(self.unet.in_conv["conv"].weight.dtype), steps or self.steps, noise, **eta)
        return self.to_unit(self.vae.decode(x).float())

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] through the autoencoder and back, by the mean of their latents."""
        return self.vae.decode(self.vae.encode(images))

    def to_unit(self, images: Tensor) -> Tensor:
        """Decoded images to [0, 1]."""
        if not self.minmax:
            return (images / 2 + 0.5).clamp(0, 1)
        flat = images.flatten(1)
        low, high = flat.amin(1).view(-1, 1, 1, 1), flat.amax(1).view(-1, 1, 1, 1)
        return (images - low) / (high - low).clamp(min=1e-8)

    # ------------------------------------------------------------------------------------------------- folders

    def config(self) -> dict:
        return {"system": "msdm", **self._config, "latent_scale": self.vae.scale}

    def saved_parts(self) -> dict[str, str]:
        parts = {"vae": "diffusion_pytorch_model", "unet": "diffusion_pytorch_model"}
        return parts | ({"text_encoder": "model"} if self._config["text"] else {})

    def save(self, folder: str | Path, parts: Iterable[str] = ()) -> None:
        if self._config["text"]:
            self.tokenizer.save(Path(folder) / "tokenizer")
        super().save(folder, parts)


def build(preset: str, weights_folder: str | None = None, random: bool = False, **options) -> MSDM:
    """A new MSDM with fresh VAE and U-Net. `random` leaves CLIP untrained too (dry runs, benchmarks)."""
    settings = PRESETS[preset] | options
    if settings.get("text"):
        tokenizer = ClipTokenizer.from_folder(Path(weights.find("msdm-tiny", weights_folder)) / "tokenizer")
        settings = settings | {"text": settings["text"] | {"vocab_size": len(tokenizer)}}
        return MSDM(tokenizer, **settings)
    if random:
        return MSDM(None, **settings)
    folder = weights.find(CLIP_L, weights_folder)
    system = MSDM(ClipTokenizer.from_folder(folder), **settings)
    weights.load(system.text_encoder, weights.read(folder, "model", prefix="text_model."))
    return system


def load(folder: str | Path, weights_folder: str | None = None, dtype: torch.dtype | None = None) -> MSDM:
    """Read what `MSDM.save` wrote: a finished run's `model` folder, or `weights/msdm-tiny`."""
    settings = {name: value for name, value in read_config(folder).items() if name != "system"}
    published = None if settings["text"] else weights.find(CLIP_L, weights_folder)
    tokenizer = ClipTokenizer.from_folder(published or Path(folder) / "tokenizer")
    with torch.device("meta"):
        system = MSDM(tokenizer, **settings)
    system.read_parts(folder, dtype)
    if published:
        weights.load(system.text_encoder, weights.read(published, "model", prefix="text_model.", dtype=dtype))
    return system.eval()
