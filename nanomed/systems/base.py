"""What every system is: stages that train some of its parts, four verbs, and what most share, noise in latents.

A system's own file says what its paper says: presets, loss, sampling.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from nanomed.adapters import formats, lora
from nanomed.autoencoders.tiles import decode_tiles
from nanomed.data import buckets
from nanomed.data.prompts import CLASSES, WORDS
from nanomed.data.table import Table
from nanomed.diffusion.process import Cond, Denoise, Diffusion
from nanomed.run.flags import UsageError
from nanomed.run.pictures import Picture, drawn
from nanomed.systems.assembly import Assembled, read_config
from nanomed.text.lengths import judge, too_long


@dataclass
class Reading:
    """options of models that learn to read from nothing"""

    join: Annotated[int, "1 .. 1000"] = 1  # up to this many prompts of an image in one, drawn anew every time
    places: Annotated[float, "0 .. 1"] = 0.0  # share of samples whose prompt says where something is, beyond chance
    places_first: Annotated[int, ">= 0"] = 0  # steps at the start, in which that share is all of them
    flips: bool = True  # flip images whose prompt is dropped, as the paper; False: none is flipped


@dataclass
class Shapes:
    """options of training images"""

    buckets: bool = False  # images keep their shapes, one a batch


@dataclass
class Weighting(Shapes):
    """options of training images and of the loss on noise"""

    snr_gamma: Annotated[float, ">= 0"] = 0.0  # min-SNR weighting; 0 = off


def each_once(encode: Callable[["System", list[str]], Cond]) -> Callable[["System", list[str]], Cond]:
    """Of a system's method from prompts to their conditions one that encodes every distinct prompt once. The rows come
    in the order of the prompts, on the system's device (a text encoder may live elsewhere)."""

    @wraps(encode)
    def encoded(self: "System", prompts: list[str]) -> Cond:
        distinct = list(dict.fromkeys(prompts))
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts]).to(self.device)
        return {name: tensor.to(self.device)[rows] for name, tensor in encode(self, distinct).items()}

    return encoded


class System(Assembled):
    """A text-to-image system, in the latents of an autoencoder.

    size        the side of its images in pixels
    unit        other sizes that it draws are multiples of it; 0: it draws no other
    dropout     the share of training prompts replaced by ""
    jitter      whether the random crops that it trains on have their colours changed, too
    pad         whether images that are not square get a black border, in place of being cropped
    own_sampler whether it has one sampler, its paper's; else `sample` takes the name of another as `sampler`
    in_order    whether a stage builds on what the ones before it have trained
    latent_shape of the latents of its images, (C, h, w)
    text_shape  of a prompt's states, (L, D)
    text_fields what `encode_text` gives, by name
    trimmed     those of them that a batch may have cut behind its longest text, the mask first
    diffusion   the noise that it trains on
    snr_gamma   min-SNR weighting of the training loss; 0 = none
    chunks      whether a text may be read in several pieces, whose states are joined
    pieces      how many, now
    autoencoder name of the part that makes latents of images and images of latents
    image_field what is kept of a training image: the "moments" that latents are drawn from, or the "latents", of MoVQ
    columns     of a file of prompts, the first that is there
    tile        larger images are decoded one by one in tiles of so many pixels a side; None: in one piece
    text_adapter kind of the text encoders' adapters, where they have one; "": as the other parts'
    """

    size: int
    unit: int = 0
    dropout: float = 0.0
    jitter: bool = True
    pad: bool = False
    own_sampler: bool = True
    in_order: bool = True
    latent_shape: tuple[int, int, int]
    text_shape: tuple[int, int]
    text_fields: tuple[str, ...] = ("prompt_embeds", "attention_mask")
    trimmed: tuple[str, ...] = ()
    diffusion: Diffusion
    snr_gamma: float = 0.0
    autoencoder: str = "vae"
    image_field: str = "moments"
    chunks: bool = False
    pieces: int = 1
    columns: tuple[str, ...] = (*WORDS, *CLASSES)
    text_adapter: str = ""
    tile: int | None = None

    # ----------------------------------------------------------------------------------------------- the four verbs

    def encode_text(self, prompts: list[str]) -> Cond:
        """Prompts to the conditions of the denoiser, batch first."""
        raise NotImplementedError

    def forward(self, batch: dict, stage: str, step: int) -> dict[str, Tensor]:
        """The training loss of a stage: {"loss": scalar, and whatever is worth a column in the log}. Asks no tensor for
        its value: a step does not wait for the device.

        Where a system says nothing else: of stage "vae" the autoencoder's, of another MSE between what the denoiser is
        to predict and the first of its channels. `batch` holds "image" or its cached `image_field`, and "prompt" or
        its cached `text_fields`.
        """
        if not self.uses_text(stage):
            return self.vae.loss(batch["image"])
        x0, factor = self.latents(batch), self.get_submodule(self.autoencoder).factor
        cond = self.read(self.text(batch), *(side * factor for side in x0.shape[2:]))
        predict = self.noise_of(partial(self.get_submodule(self.denoiser), **cond))
        return {"loss": self.denoising_loss(predict, x0)}

    def sample(self, prompts: list[str], noise, steps: int | None = None, guidance: float | None = None, **options):
        """Images (B, 3, H, W) in [0, 1]; every random number comes from `noise`, in drawing order."""
        raise NotImplementedError

    def check(self, steps: int | None = None, size: int | None = None) -> None:
        """Raise UsageError for a number of steps or a size that `sample` cannot draw: asked before a file is made."""
        if size and size != self.size and (not self.unit or size % self.unit):
            others = f" or a multiple of {self.unit}" if self.unit else ""
            raise UsageError(f"--size {size}: {self.name} draws {self.size}{others}")
        for diffusion in self.sampled():
            try:
                possible = not steps or len(set(diffusion.timesteps(steps))) == steps
            except ValueError:
                possible = False
            if not possible:
                raise UsageError(f"--steps {steps}: {self.name} draws in 1 to {diffusion.most_steps()} steps")

    def bucket_shapes(self) -> tuple[buckets.Shape, ...]:
        """Heights and widths in pixels of the images that `--buckets` trains on, all of about `size`^2 pixels; of a
        system that draws no other, `size` alone."""
        return buckets.shapes(self.size, self.unit) if self.unit else ((self.size, self.size),)

    def sampled(self) -> tuple[Diffusion, ...]:
        """The noise that `sample` removes in as many steps as it is told."""
        return (self.diffusion,)

    # ------------------------------------------------------------------------------------------------- in a notebook

    def __call__(self, given: dict | list[str] | str, /, *args, **options):
        """`system(prompts, seed=0, ...)` are images, as `pictures` says; `system(batch, stage, step)` is the loss.

        PyTorch calls a module to train it, DDP around it too, and people who know diffusers call what they have loaded
        to draw. A batch is a dict and prompts are none, so both get what they mean.
        """
        if isinstance(given, dict):
            return super().__call__(given, *args, **options)
        return self.pictures(given, *args, **options)

    def pictures(
        self,
        prompts: list[str] | str,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        negative: str = "",
        size: int | None = None,
        batch: int = 16,
    ) -> list[Image.Image]:
        """Draw one PIL image for each prompt: the pixels of sample.py with the same seed, settings and batch. No
        gradients, and a bar. `sample` is for those who bring their own noise, or want tensors."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        wanted = [Picture(prompt, seed, i, negative, steps, guidance, size) for i, prompt in enumerate(prompts)]
        self.eval().to(memory_format=torch.channels_last)
        return drawn(self, wanted, batch)

    # ------------------------------------------------------------------------------------- latents, text and the loss

    def image_moments(self, images: Tensor) -> dict[str, Tensor]:
        """What the frozen autoencoder makes of images (B, 3, H, W) in [-1, 1]: `image_field`."""
        part, images = self.get_submodule(self.autoencoder), images.to(self.weight(self.autoencoder))
        made = part.moments(images) if self.image_field == "moments" else part.encode(images)
        return {self.image_field: made.float()}

    def latents(self, batch: dict) -> Tensor:
        """x_0 of a training batch, which holds "image" or its cached `image_field`: of moments a fresh draw in every
        step."""
        made = batch if self.image_field in batch else self.image_moments(batch["image"])
        moments = made[self.image_field].to(self.device)
        if self.image_field == "latents":
            return moments
        return self.vae.latents(moments, torch.randn(moments.chunk(2, 1)[0].shape, device=moments.device))

    def text(self, batch: dict) -> Cond:
        """The conditions of a training batch, which holds "prompt" or the fields cached of it."""
        if self.text_fields[0] in batch:
            return {name: batch[name] for name in self.text_fields}
        return self.states(batch["prompt"])

    def states(self, prompts: list[str]) -> Cond:
        """The conditions of prompts in training, where a system reads them otherwise than in `encode_text`."""
        return self.encode_text(prompts)

    def lengths(self, prompts: list[str]) -> list[int]:
        """The tokens that each prompt needs, special ones included."""
        return self.tokenizer.lengths(prompts)

    def judge_lengths(self, told: Mapping[str, str], how: str, source: str) -> tuple[list[str], dict[str, int]]:
        """Which prompts are longer than what is read of one, as text/lengths.py says it: lines, and in how many pieces
        each of them is read. Raises UsageError where `how` refuses, and where this system reads no pieces."""
        limit = getattr(self, "text_shape", (0, 0))[0]
        long = too_long(told, limit, self.lengths) if limit and "tokenizer" in self.tokenizers else {}
        if long and how == "chunk" and not self.chunks:
            raise UsageError(
                f"--long_prompts chunk: {self.name} reads one piece of text, and {len(long)} of {len(told)} distinct "
                f"prompts of {source} have more than its {limit} tokens; choose cut or refuse"
            )
        return judge(long, told, how, source, limit) if long else ([], {})

    def denoising_loss(
        self,
        predict: Denoise,
        x0: Tensor,
        distance: Callable = F.mse_loss,
        says: Diffusion | None = None,
        noising: Diffusion | None = None,
    ) -> Tensor:
        """The distance between what `predict` says of x_t and what it should, at uniform timesteps; a scalar.

        says      what kind of prediction it is; noising: under which noise and weights. Both are the system's diffusion
        """
        says, noising = says or self.diffusion, noising or self.diffusion
        t = torch.randint(noising.length, (len(x0),), device=x0.device)
        noise = torch.randn(x0.shape, device=x0.device)
        prediction = predict(noising.noised(x0, t, noise), t).float()
        loss = distance(prediction, says.target(x0, t, noise), reduction="none").flatten(1).mean(1)  # (B,)
        if self.snr_gamma:
            loss = loss * noising.min_snr_weight(t, self.snr_gamma)
        return loss.mean()

    def frozen(self, stage: str) -> dict[str, tuple[str, Callable]]:
        """What may be computed once in a stage: {"image": (part, images -> fields), "text": (part, prompts -> fields)}.

        The fields are entries of a training batch that `forward` takes in place of "image" or "prompt". A part that
        trains is never here.
        """
        if not self.uses_text(stage):
            return {}
        fields = {"image": (self.autoencoder, self.image_moments)}
        readers = [part for part in self.parts if part.startswith("text_encoder")]
        if readers and not {*readers} & {*self.stages[stage]}:
            fields["text"] = (" ".join(readers), self.states)
        return fields

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images (B, 3, H, W) in float32, nominally in [-1, 1] and not clamped."""
        part, latents = self.get_submodule(self.autoencoder), latents.to(self.weight(self.autoencoder))
        if self.tile:
            factor = self.size // self.latent_shape[1]
            if max(latents.shape[2:]) * factor > self.tile:
                return decode_tiles(part.decode, latents, self.tile // factor, factor).float().to(self.device)
        return part.decode(latents).float().to(self.device)

    def to_unit(self, images: Tensor) -> Tensor:
        """Decoded images to [0, 1]."""
        return (images / 2 + 0.5).clamp(0, 1)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] through the autoencoder and back, by the mean of their latents."""
        return self.decode(self.get_submodule(self.autoencoder).encode(images))

    # --------------------------------------------------------------------------------- what a system may say besides

    def uses_text(self, stage: str) -> bool:
        """Whether a stage trains on (image, prompt) pairs and can be sampled; an autoencoder's sees images alone."""
        return stage != "vae"

    def adopt(self, table: Table) -> Table:
        """Learn from the data what must be known before training, as the names of its classes; returns what to train
        on."""
        return table

    def check_prompts(self, prompts: list[str]) -> None:
        """Raises DataError for a prompt that `encode_text` could not read."""

    def example(self, stage: str, batch: int, device: torch.device) -> dict:
        """A training batch of random numbers in the right shapes, for dry runs and benchmarks."""
        if not self.uses_text(stage):
            return {"image": torch.rand(batch, 3, self.size, self.size, device=device) * 2 - 1}
        prompts = {"prompt": [f"An endoscopic image of a polyp, {i}." for i in range(batch)]}  # none is encoded twice
        channels, *sides = self.latent_shape
        channels *= 2 if self.image_field == "moments" else 1
        made = prompts | {self.image_field: torch.randn(batch, channels, *sides, device=device)}
        if "text" not in self.frozen(stage):
            return made
        states, mask = torch.randn(batch, *self.text_shape, device=device), torch.ones(batch, self.text_shape[0]) > 0
        return made | {"prompt_embeds": states, "attention_mask": mask.to(device)}

    def load_optional(self, stage: str, folder: str | None) -> str:
        """Look for files that a stage can use and can do without; returns a line that says what is left out, or ""."""
        return ""

    def kinds(self, stage: str) -> dict[str, dict]:
        """The kinds of steps that a stage has, {name: attributes of the system under which a step is of that kind}: of
        each a dry run makes one."""
        return {"a step": {}}

    def finish(self, stage: str, image_batches: Iterable[Tensor]) -> dict[str, float]:
        """Called once when a stage has ended, with batches of training images; returns what it measured. After that of
        a KL autoencoder its latents are scaled to unit deviation."""
        if stage != "vae":
            return {}
        deviation = self.vae.standardise(image_batches)
        self.shapes["vae"]["scaling_factor"] = self.vae.scale
        return {"latent_std": deviation}

    def resume(self, stage: str, folder: str | Path) -> None:
        """Take over what a finished stage left in `folder`: the parts it trained and what `finish` measured."""
        self.read_parts(folder, parts=self.stages[stage])
        scale = (read_config(folder).get("vae") or {}).get("scaling_factor")
        if stage == "vae" and scale:
            self.vae.scale = self.shapes["vae"]["scaling_factor"] = scale

    def weight(self, part: str) -> Tensor:
        """A weight of a part, for `tensor.to`: where it lives, and its dtype."""
        return next(self.get_submodule(part).parameters())

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return self.weight(self.denoiser).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the denoiser's weights."""
        return self.weight(self.denoiser).dtype

    # ------------------------------------------- for a denoiser of latents with `config` and `read_text` of a prompt

    def read(self, text: Cond, height: int, width: int) -> Cond:
        """What the denoiser is called with for images of a size in pixels, of what `encode_text` gives: all that is the
        same in every step. Once for a prompt; differentiable."""
        raise NotImplementedError

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

    def noise_of(self, denoise: Denoise) -> Denoise:
        """As many channels as x has, which is the prediction; the rest is a variance that the sampler does not use. The
        network sees x in its own dtype, the sampler computes in that of x."""
        return lambda x, t: denoise(x.to(self.dtype), t)[:, : x.shape[1]].to(x.dtype)

    def latent_size(self, height: int, width: int) -> tuple[int, int, int]:
        """(4, height / 8, width / 8) of a size in pixels."""
        c, factor = self.get_submodule(self.denoiser).config, self.get_submodule(self.autoencoder).factor
        patch = factor * getattr(c, "patch_size", 1)
        if height % patch or width % patch:
            raise UsageError(f"{height} x {width}: sides must be multiples of {patch}")
        return c.in_channels, height // factor, width // factor

    # ------------------------------------------------------------------------------------------------------ training

    def adapt(self, stage: str, rank: int, alpha: float | None = None, kind: str = "lora") -> None:
        """Put a fresh adapter on every part of a stage that has none; from now on `trainable` means the adapters of
        these parts."""
        for part in self.bare(stage):
            if part not in self.adapters:
                raise UsageError(f"--rank {rank}: the {part} of stage {stage} has no layers named for adapters")
            mine = self.text_adapter if self.text_adapter and part.startswith("text_encoder") else kind
            lora.inject(self.get_submodule(part), rank, alpha, self.adapters[part], mine)

    def bare(self, stage: str) -> list[str]:
        """The parts of a stage that have no adapter."""
        return [part for part in self.stages[stage] if not lora.adapted(self.get_submodule(part))]

    def start_from(self, stage: str, folder: Path) -> None:
        """Put the adapters in `folder`/PART on the parts of a stage, to be trained further."""
        for part in self.stages[stage]:
            if (folder / part).is_dir():
                formats.load_peft(folder / part, self.get_submodule(part))

    def trainable(self, stage: str) -> dict[str, nn.Parameter]:
        """Freeze everything but the stage's parts, or the adapters on them; return by name what trains."""
        self.requires_grad_(False).eval()
        for part in self.stages[stage]:
            module = self.get_submodule(part).train()
            for param in lora.parameters(module) if lora.adapted(module) else module.parameters():
                param.requires_grad_(True)
        named = {f"{part}.{name}": param for part in self.stages[stage]
                 for name, param in self.get_submodule(part).named_parameters()}  # fmt: skip
        return {name: param for name, param in named.items() if param.requires_grad}

    def fold(self) -> None:
        """Take all adapters into the weights for good: nothing to pay for them when drawing."""
        for part in self.adapters:
            if lora.adapted(self.get_submodule(part)):
                lora.fold(self.get_submodule(part))
