"""PixArt-alpha (Chen et al. 2023): a transformer on the latents of Stable Diffusion's VAE that reads T5's text.

    prompt --T5 encoder, 120 tokens--> states (B, 120, 4096) --keys and values of all blocks--+
                                                                                              v
    noise (B, 4, 64, 64) --20 steps of DPM-Solver++, guidance 4.5--> latents --VAE--> image (B, 3, 512, 512)

    system = nanomed.load("pixart", weights="weights/PixArt-alpha/PixArt-XL-2-512x512", dtype=torch.bfloat16)
    images = system.sample(["An endoscopic image of a polyp."], noise)

Every shape and the noise schedule are read from the folder's own files, so that the 1024-MS version and miniatures
load alike. Med-Art (medart.py) is a fine-tuning recipe of this system.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nanomed import weights
from nanomed.autoencoders.kl import AutoencoderKL, KLConfig, load_kl
from nanomed.denoisers.pixart import PixArtConfig, PixArtTransformer, load_pixart
from nanomed.diffusion import samplers
from nanomed.diffusion.guidance import guided
from nanomed.diffusion.process import Cond, Denoise, Diffusion
from nanomed.systems.base import System, read_config
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
FLAGS = ("size", "snr_gamma")  # of train.py, that are settings of the constructor

PARTS = {"transformer": "diffusion_pytorch_model", "text_encoder": "model", "vae": "diffusion_pytorch_model"}

# The sizes PixArt was trained on, height x width in sixteenths of the square's side, by rising height / width.
BINS = """8x32 8x29 9x28 9x27 9x26 10x25 10x24 11x23 11x22 11x21 12x21 12x20 13x19 13x18 14x18 14x17 15x17 15x16 16x16
16x15 17x15 17x14 18x14 18x13 19x13 20x12 21x12 22x11 23x11 24x10 25x10 27x9 32x8"""


class PixArt(System):
    """Transformer + T5 + VAE.

    scheduler  settings of its DPM-Solver++, in the words of a scheduler_config.json; None: PixArt's
    size       side of the images that it trains on and draws; None: the side that its positions are made for
    length     tokens of a prompt, </s> included
    snr_gamma  min-SNR weighting of the training loss; 0 = none
    base       the repository (or folder) whose parts these are; "" for a system that has none, which is saved whole
    """

    stages = {"transformer": ("transformer",)}
    adapters = {"transformer": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj", "proj_out",
                                "linear", "linear_1", "linear_2")}  # fmt: skip  # of diffusers' and Med-Art's scripts

    def __init__(
        self,
        tokenizer: T5Tokenizer,
        transformer: PixArtTransformer,
        text_encoder: T5Encoder,
        vae: AutoencoderKL,
        scheduler: dict | None = None,
        size: int | None = None,
        length: int = 120,
        steps: int = 20,
        guidance: float = 4.5,
        snr_gamma: float = 0.0,
        base: str = "",
    ):
        super().__init__()
        self.tokenizer, self.base, self.scheduler = tokenizer, base, scheduler or {}
        self.transformer, self.text_encoder, self.vae = transformer, text_encoder, vae
        wanted = transformer.config.caption_channels, transformer.config.in_channels
        given = text_encoder.config.d_model, vae.config.latent_channels
        if wanted != given:
            raise WeightsError(f"a transformer for text and latents of {wanted} channels beside T5 and VAE of {given}")
        self.diffusion = Diffusion.from_settings({"_class_name": SOLVER} | self.scheduler, "scheduler")
        self.size = size or transformer.config.sample_size * vae.factor
        self.length, self.steps, self.guidance, self.snr_gamma = length, steps, guidance, snr_gamma
        self.latent_shape = self.latent_size(self.size, self.size)

    @classmethod
    def published(cls, folder: str | Path, dtype: torch.dtype | None = None, **options) -> "PixArt":
        """From a folder in the published layout: transformer/, text_encoder/, vae/, tokenizer/, scheduler/.

        dtype      of the weights; None keeps the files'
        options    of the constructor

        Raises WeightsError where a file is missing, damaged or of another system.
        """
        folder = Path(folder)
        return cls(
            T5Tokenizer.from_folder(folder / "tokenizer"),
            load_pixart(folder / "transformer", dtype),
            load_t5(folder / "text_encoder", dtype),
            load_kl(folder / "vae", dtype),
            **{"scheduler": read_scheduler(folder / "scheduler")} | options,
        ).eval()

    @classmethod
    def fresh(cls, tokenizer: T5Tokenizer, transformer: dict, text_encoder: dict, vae: dict, **options) -> "PixArt":
        """With random weights, from the settings of the parts' configurations."""
        return cls(tokenizer, *_parts(transformer, text_encoder, vae), **options)

    # ------------------------------------------------------------------------------------------------ text

    def encode_text(self, prompts: list[str]) -> Cond:
        """T5's states of the prompts as they are drawn from: lower-cased and stripped, as the published pipeline does.

        {"prompt_embeds": (B, 120, D), zero at padding, "attention_mask": bool (B, 120)}. The null condition is that of
        "". The time is that of the longest prompt, and each distinct one is encoded once.
        """
        return self.states([prompt.lower().strip() for prompt in prompts])

    def states(self, prompts: list[str]) -> Cond:
        """As `encode_text`, of the prompts word for word: so they are in training, in the published scripts too."""
        distinct = list(dict.fromkeys(prompts))
        device = next(self.text_encoder.parameters()).device
        ids, mask = (tensor.to(device) for tensor in self.tokenizer(distinct, length=self.length))
        states = self.text_encoder.trimmed(ids, mask)  # (distinct, 120, D)
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=device)
        return {"prompt_embeds": states[rows], "attention_mask": mask[rows]}

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

    def conditions(
        self, prompts: list[str], negative_prompts: list[str] | None, height: int, width: int
    ) -> tuple[Cond, Cond]:
        """The two conditions of guidance, for `guided` or hldf.py's `recomputed`: of the prompts, and of the negative
        prompts (None: ""). They are read together, so that they are cut at the same length."""
        negative = negative_prompts or [""] * len(prompts)
        if len(negative) != len(prompts):
            raise ValueError(f"{len(negative)} negative prompts for {len(prompts)} prompts")
        both = self.read(self.encode_text([*negative, *prompts]), height, width)
        null = {name: value[: len(prompts)] for name, value in both.items()}
        return {name: value[len(prompts) :] for name, value in both.items()}, null

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.proj_out.weight.dtype

    # ------------------------------------------------------------------------------------------------ training

    def forward(self, batch: dict, stage: str, step: int) -> dict[str, Tensor]:
        """MSE between the noise and the first half of the transformer's channels, at a uniform timestep.

        `batch` holds "image" or its cached "moments", and "prompt" or its cached "prompt_embeds", "attention_mask".
        """
        return {"loss": self.noise_loss(self.latents(batch), self.text(batch))}

    def latents(self, batch: dict) -> Tensor:
        """x_0: a fresh draw of the images' posterior in every step."""
        moments = batch["moments"] if "moments" in batch else self.image_moments(batch["image"])["moments"]
        return self.vae.latents(moments, torch.randn(moments.chunk(2, 1)[0].shape, device=moments.device))

    def text(self, batch: dict) -> Cond:
        """The states of a batch's prompts, cached or computed."""
        if "prompt_embeds" in batch:
            return {name: batch[name] for name in ("prompt_embeds", "attention_mask")}
        return self.states(batch["prompt"])

    def noise_loss(self, x0: Tensor, text: Cond) -> Tensor:
        """Of latents x_0 (B, 4, H, W), with text as `states` gives it (eq. 3 of Med-Art)."""
        t = torch.randint(self.diffusion.length, (len(x0),), device=x0.device)
        noise = torch.randn(x0.shape, device=x0.device)
        cond = self.read(text, *(side * self.vae.factor for side in x0.shape[2:]))
        predict = self.noise_of(partial(self.transformer, **cond))
        prediction = predict(self.diffusion.noised(x0, t, noise), t)
        loss = F.mse_loss(prediction, self.diffusion.target(x0, t, noise), reduction="none").flatten(1).mean(1)  # (B,)
        if self.snr_gamma:
            loss = loss * self.diffusion.min_snr_weight(t, self.snr_gamma)
        return loss.mean()

    def image_moments(self, images: Tensor) -> dict[str, Tensor]:
        """What the frozen VAE makes of images (B, 3, H, W) in [-1, 1]."""
        return {"moments": self.vae.moments(images.to(self.vae.quant_conv.weight.dtype)).float()}

    def frozen(self, stage: str) -> dict[str, tuple[str, Callable]]:
        fields = {"image": ("vae", self.image_moments)}
        if "text_encoder" not in self.stages[stage]:
            fields["text"] = ("text_encoder", self.states)
        return fields

    def example(self, stage: str, batch: int, device: torch.device) -> dict:
        channels, height, width = self.latent_shape
        moments = torch.randn(batch, 2 * channels, height, width, device=device)
        if "text_encoder" in self.stages[stage]:
            return {"moments": moments, "prompt": ["An endoscopic image of a polyp."] * batch}
        states = torch.randn(batch, self.length, self.transformer.config.caption_channels, device=device)
        mask = torch.ones(batch, self.length, dtype=torch.bool, device=device)
        return {"moments": moments, "prompt_embeds": states, "attention_mask": mask}

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
        return (cropped(images, height, width) / 2 + 0.5).clamp(0, 1)

    def draw(self, denoise: Denoise, x: Tensor, steps: int) -> Tensor:
        """Latents from initial noise (B, 4, H, W), by DPM-Solver++ 2M. `denoise` is the transformer under guidance,
        with all its channels: `guided` or, to be differentiated in little memory, hldf.py's `recomputed`."""
        return samplers.dpmpp_2m(self.noise_of(denoise), self.diffusion, x, steps)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images (B, 3, H, W) in float32, nominally in [-1, 1] and not clamped."""
        return self.vae.decode(latents.to(self.vae.quant_conv.weight.dtype)).float()

    def noise_of(self, denoise: Denoise) -> Denoise:
        """The first half of the channels, which is the noise; the rest is a variance that the samplers do not use. The
        network sees x in its own dtype, the sampler computes in that of x."""
        channels = self.latent_shape[0]
        return lambda x, t: denoise(x.to(self.dtype), t)[:, :channels].to(x.dtype)

    def latent_size(self, height: int, width: int) -> tuple[int, int, int]:
        """(4, height / 8, width / 8) of a size in pixels."""
        factor, c = self.vae.factor, self.transformer.config
        if height % (factor * c.patch_size) or width % (factor * c.patch_size):
            raise ValueError(f"{height} x {width}: sides must be multiples of {factor * c.patch_size}")
        return c.in_channels, height // factor, width // factor

    # ------------------------------------------------------------------------------------------------- folders

    def config(self) -> dict:
        shapes = {} if self.base else {part: asdict(self.get_submodule(part).config) for part in PARTS}
        return {"system": "pixart", "base": self.base, **shapes, "scheduler": self.scheduler, "size": self.size,
                "length": self.length, "steps": self.steps, "guidance": self.guidance}  # fmt: skip

    def saved_parts(self) -> dict[str, str]:
        trained = {part for parts in self.stages.values() for part in parts}
        return {part: stem for part, stem in PARTS.items() if not self.base or part in trained}

    def save(self, folder: str | Path, parts: Iterable[str] = ()) -> None:
        if not self.base:
            self.tokenizer.save(Path(folder) / "tokenizer")
        super().save(folder, parts)

    @classmethod
    def saved(cls, folder: str | Path, weights_folder: str | None = None, dtype: torch.dtype | None = None) -> "PixArt":
        """Read what `save` wrote, on the published parts where it has a base; adapters are folded into the weights."""
        settings = {name: value for name, value in read_config(folder).items() if name != "system"}
        if settings["base"]:
            system = cls.published(published_folder(settings["base"], weights_folder), dtype, **settings)
        else:
            tokenizer = T5Tokenizer.from_folder(Path(folder) / "tokenizer")
            parts = weights.build(_parts, **{part: settings.pop(part) for part in PARTS})
            system = cls(tokenizer, *parts, **settings)
        system.read_parts(folder, dtype)
        system.fold()
        return system.eval()


def _parts(transformer: dict, text_encoder: dict, vae: dict) -> tuple[PixArtTransformer, T5Encoder, AutoencoderKL]:
    return (
        PixArtTransformer(PixArtConfig(**transformer)),
        T5Encoder(T5Config(**text_encoder)),
        AutoencoderKL(KLConfig(**vae)),
    )


# --------------------------------------------------------------------------------------------------------- sizes, files


def binned(height: int, width: int, sample_size: int) -> tuple[int, int]:
    """The trained size, in pixels, whose shape is nearest to height / width (as rounded to two decimals). Networks of
    other sides than the published ones (256, 512, 1024 pixels) have no such table: the size as it is."""
    if sample_size not in (32, 64, 128):
        return height, width
    sizes = [tuple(int(side) for side in size.split("x")) for size in BINS.split()]
    rows, columns = min(sizes, key=lambda size: abs(round(size[0] / size[1], 2) - height / width))
    unit = sample_size * 8 // 16
    return rows * unit, columns * unit


def cropped(images: Tensor, height: int, width: int) -> Tensor:
    """Images scaled until they cover height x width, and their middle cut out."""
    rows, columns = images.shape[2:]
    if (rows, columns) == (height, width):
        return images
    ratio = max(height / rows, width / columns)
    rows, columns = int(rows * ratio), int(columns * ratio)
    images = F.interpolate(images, size=(rows, columns), mode="bilinear", align_corners=False)
    top, left = (rows - height) // 2, (columns - width) // 2
    return images[:, :, top : top + height, left : left + width]


SOLVER = "DPMSolverMultistepScheduler"


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


# ------------------------------------------------------------------------------------------------------------ the verbs


def published_folder(name: str = REPOSITORY, weights_folder: str | None = None) -> Path:
    """The folder of a published PixArt: `weights_folder` where that is one, else where `weights.find` finds `name`."""
    if weights_folder and (Path(weights_folder) / "transformer" / "config.json").is_file():
        return Path(weights_folder)
    return weights.find(name, weights_folder)


def load_published(weights_folder: str | None = None, dtype: torch.dtype | None = None) -> PixArt:
    """PixArt-XL-2-512x512, or whichever version's folder `weights_folder` is."""
    folder = published_folder(REPOSITORY, weights_folder)
    return PixArt.published(folder, dtype, base=base_of(folder))


def base_of(folder: Path) -> str:
    """What a saved system calls the published folder it stands on: the repository's name where the path ends in it,
    so that it is found on other machines too, else the path."""
    org, name = folder.absolute().parts[-2:]
    return f"{org}/{name}" if org == "PixArt-alpha" else str(folder.absolute())


def build(
    preset: str, weights_folder: str | None = None, random: bool = False, dtype: torch.dtype | None = None, **options
) -> PixArt:
    """PixArt with its published weights, to be fine-tuned. `random` leaves them untrained (dry runs, benchmarks)."""
    settings = PRESETS[preset] | options
    if random:
        return untrained(PixArt, dtype, **settings)
    folder = published_folder(REPOSITORY, weights_folder)
    return PixArt.published(folder, dtype, base=base_of(folder), **settings)


def untrained(cls: type[PixArt], dtype: torch.dtype | None = None, **settings) -> PixArt:
    """A system of XL/2's shapes without a file. T5-XXL's 4.8 billion weights are one zero, seen from everywhere: on
    the CPU they take no memory."""
    dtype = dtype or torch.float32
    t5, zero = weights.build(T5Encoder, T5Config()), torch.zeros((), dtype=dtype)
    weights.load(t5, {name: zero.expand(tensor.shape) for name, tensor in t5.state_dict().items()})
    tokenizer = train_unigram(["An endoscopic image of a polyp."], 100)
    return cls(tokenizer, PixArtTransformer().to(dtype), t5, AutoencoderKL().to(dtype), **settings)


def load(folder: str | Path, weights_folder: str | None = None, dtype: torch.dtype | None = None) -> PixArt:
    """Read what `PixArt.save` wrote: a finished run's `model` folder."""
    return PixArt.saved(folder, weights_folder, dtype)
