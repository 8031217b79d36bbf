"""Images that are asked for, batch by batch: the one place where sample.py, a run's end and a notebook draw, so that
the same seed gives the same pixels in all of them.

A picture's noise depends on its own seed and number alone. Batches are cut from the pictures that a system can draw
together, in their order, and a short one is computed at full size, so neither a stop, nor the number of ranks, nor
what surrounds an image in its batch changes a byte of it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from nanomed.run import files
from nanomed.run.cache import Remembered
from nanomed.run.hardware import autocast
from nanomed.run.progress import Progress
from nanomed.run.randomness import ImageNoise


@dataclass(frozen=True)
class Picture:
    """One image to be drawn. None: the system's own."""

    prompt: str
    seed: int = 0
    number: int = 0  # of the image among those of its seed
    negative: str = ""  # what to guide away from, in place of the empty prompt
    steps: int | None = None
    guidance: float | None = None
    size: int | None = None
    pieces: int = 1  # in which its texts are read


def batches(pictures: Sequence[Picture], batch: int) -> list[list[int]]:
    """Rows that are drawn together, at most `batch` of them, in the order of the first of each."""
    alike: dict[tuple, list[int]] = {}
    for row, p in enumerate(pictures):
        alike.setdefault((p.steps, p.guidance, p.size, bool(p.negative), p.pieces), []).append(row)
    cut = [rows[start : start + batch] for rows in alike.values() for start in range(0, len(rows), batch)]
    return sorted(cut)


@torch.inference_mode()
def images(system: Any, pictures: Sequence[Picture], batch: int, precision: str = "fp32", **options: Any) -> Tensor:
    """One batch, uint8 (n, H, W, 3): at most `batch` pictures that `batches` has put together. `options` are more of
    what this system's `sample` takes."""
    padded = [*pictures, *[pictures[-1]] * (batch - len(pictures))]
    first, device = pictures[0], system.device
    noise = ImageNoise([p.seed for p in padded], [p.number for p in padded], device)
    system.pieces = first.pieces
    with autocast(precision, device):
        made = system.sample(
            [p.prompt for p in padded], noise, first.steps, first.guidance,
            negative_prompts=[p.negative for p in padded] if first.negative else None,
            height=first.size, width=first.size, **options,
        )  # fmt: skip
    return files.to_bytes(made[: len(pictures)])


def drawn(system: Any, pictures: Sequence[Picture], batch: int) -> list[Image.Image]:
    """All of some pictures, in their order, under a bar."""
    found: dict[int, Image.Image] = {}
    with remembering(system), Progress(len(pictures), "drawing", "image") as bar:
        for rows in batches(pictures, batch):
            for row, image in zip(rows, images(system, [pictures[row] for row in rows], batch)):
                found[row] = Image.fromarray(image.numpy())
            bar.update(len(rows))
    return [found[row] for row in range(len(pictures))]


@contextmanager
def remembering(system: Any) -> Iterator[None]:
    """Every distinct prompt is encoded once, inside the `with`; once for each number of pieces."""
    encode = system.encode_text
    own, pieces = "encode_text" in vars(system), system.pieces
    known: dict[int, Remembered] = {}
    system.encode_text = lambda prompts: known.setdefault(system.pieces, Remembered(encode))(prompts)
    try:
        yield
    finally:
        system.pieces = pieces
        if own:
            system.encode_text = encode
        else:
            del system.encode_text
