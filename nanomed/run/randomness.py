"""Random numbers that can be repeated: every one of a training step is a function of (seed, stage, step, rank), every
one of an image a function of (seed, row)."""

import hashlib
import random
from collections.abc import Sequence

import torch
from torch import Tensor


def seed_of(*key: int | str) -> int:
    """A 63-bit seed from a key, the same on every machine and version."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_all(*key: int | str) -> None:
    """Seed PyTorch and Python from a key: all the randomness of a pass. What only the host decides comes from Python's
    `random`, for asking a tensor would wait for the device."""
    torch.manual_seed(seed_of(*key))
    random.seed(seed_of(*key))


class ImageNoise:
    """Noise that belongs to images: one generator for each, keyed by (seed, row), on the CPU; `seed` is one for all, or
    one for each.

    An image's first draw and every later one come from its own generator, so neither the batch it is drawn in nor
    the ranks or a restart change it.
    """

    def __init__(self, seed: int | Sequence[int], rows: Sequence[int], device: torch.device | str = "cpu"):
        self.device = device
        seeds = [seed] * len(rows) if isinstance(seed, int) else seed
        self.generators = [torch.Generator().manual_seed(seed_of("image", s, row)) for s, row in zip(seeds, rows)]

    def randn(self, *shape: int) -> Tensor:
        """Standard normals (B, *shape) in float32."""
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators]).to(self.device)
