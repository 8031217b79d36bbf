"""How LLaVA-NeXT cuts an image ("anyres", Liu et al. 2024): the whole image small, then tiles of it large.

    tiles = Tiles.of(folder, said)
    pixels = tiles.cut(image)         # (1 + rows * columns, 3, side, side); the whole image first
    tiles.kept(image.size)            # which of the tiles' patches show image and which the black border

The image is fitted, aspect kept, into one of a few canvases (`grids`, multiples of the tower's side), the one in which
most of its pixels survive; among equals the one that wastes least, then the first in the list.

LLaVA's own code takes a pair of the list for (width, height), transformers for (height, width). The published list is
symmetric, so the two differ only in ties: of a square image of 336 pixels or less, the first pair wins, an upright
canvas there and a lying one here. The layout of the files decides (`wide`): `lmms-lab` is LLaVA's, `-hf` transformers'.
LLaVA's code also cuts the size without border to whole patches as it is, transformers after rounding to 7 digits.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nanomed import weights
from nanomed.text.clip_vision import MEAN, STD
from nanomed.weights import WeightsError

GRIDS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


class Narrow(ValueError):
    """An image of which nothing is left when its longer side fits into the tiles."""

    def __init__(self, size: tuple[int, int]):
        super().__init__(f"an image of {size[0]} x {size[1]} pixels is too narrow to be cut into tiles")


def described(folder: str | Path) -> tuple[Path, dict]:
    """(the file of a folder that says how images are cut, what it says): config.json and nothing where there is none.
    Raises WeightsError."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (file := Path(folder, name)).is_file():
            stated = weights.settings(file, "how images are cut")
            return file, stated.get("image_processor", stated)
    return Path(folder, "config.json"), {}


def normalised(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """An RGB image -> float32 (3, H, W), channels less `mean` over `std`."""
    pixels = (np.asarray(image).astype(np.float64) * (1 / 255)).astype(np.float32)
    return torch.from_numpy((pixels - np.float32(mean)) / np.float32(std)).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Tiles:
    """Sizes in pixels; the defaults are those of the published models in transformers' layout."""

    side: int = 336  # of a tile, and of what the tower looks at
    patch: int = 14
    grids: tuple[tuple[int, int], ...] = GRIDS
    wide: bool = False  # a pair of `grids` is (width, height), as in LLaVA's code; else (height, width)
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    @classmethod
    def of(cls, folder: str | Path, said: dict, side: int, patch: int, wide: bool) -> "Tiles":
        """As a folder describes them: its `preprocessor_config.json` or `processor_config.json`, else what its
        `config.json` said, for a tower of `side` and `patch` pixels. Raises WeightsError where they do not agree."""
        file, stated = described(folder)
        try:
            grids = stated.get("image_grid_pinpoints") or said.get("image_grid_pinpoints") or GRIDS
            grids = json.loads(grids.replace("(", "[").replace(")", "]")) if isinstance(grids, str) else grids
            grids = tuple((int(a), int(b)) for a, b in grids)
            for size in (stated.get("crop_size"), stated.get("size")):
                size = size if isinstance(size, dict) else {"is": size or side}
                if odd := [value for value in size.values() if value not in (side, None)]:
                    raise ValueError(f"tiles of {odd[0]} pixels for a tower that looks at {side}")
            if odd := [pair for pair in grids if min(pair) < side or pair[0] % side or pair[1] % side]:
                raise ValueError(f"a canvas of {odd[0]} is not made of tiles of {side} pixels")
            mean, std = (tuple(map(float, stated.get(f"image_{n}") or d)) for n, d in (("mean", MEAN), ("std", STD)))
        except (ValueError, TypeError, AttributeError) as error:
            raise WeightsError(f"{file}: {error}") from error
        return cls(side, patch, grids, wide, mean, std)

    def canvas(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) of the canvas for an image of `size` (width, height). Raises Narrow."""
        width, height = size
        best, chosen = (0, 0.0), None
        for pair in self.grids:
            across, down = pair if self.wide else pair[::-1]
            scale = min(across / width, down / height)
            shown = min(int(width * scale) * int(height * scale), width * height)  # pixels of the image that survive
            if (shown, shown - across * down) > best and shown:
                best, chosen = (shown, shown - across * down), (across, down)
        if chosen is None:
            raise Narrow(size)
        return chosen

    def cut(self, image: Image.Image) -> Tensor:
        """An RGB image -> float32 (1 + tiles, 3, side, side): first the whole image with its aspect broken, then its
        tiles row by row, resized by Pillow's bicubic and centred on black; CLIP's mean and deviation for all."""
        side, (width, height) = self.side, image.size
        across, down = self.canvas(image.size)
        if across / width < down / height:
            fitted = across, min(math.ceil(height * (across / width)), down)
        else:
            fitted = min(math.ceil(width * (down / height)), across), down
        canvas = Image.new("RGB", (across, down))
        canvas.paste(image.resize(fitted, Image.Resampling.BICUBIC),
                     ((across - fitted[0]) // 2, (down - fitted[1]) // 2))  # fmt: skip
        parts = [image.resize((side, side), Image.Resampling.BICUBIC)]
        parts += [canvas.crop((x, y, x + side, y + side)) for y in range(0, down, side) for x in range(0, across, side)]
        return torch.stack([normalised(part, self.mean, self.std) for part in parts])

    def kept(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """(columns of tiles, rows of tiles, patches cut off left and right, patches cut off above and below): what of
        the canvas' patches is black border of an image of `size` (width, height)."""
        width, height = size
        across, down = self.canvas(size)
        per_tile = self.side // self.patch
        columns, rows = across // self.side, down // self.side
        across, down = columns * per_tile, rows * per_tile  # in patches
        left = above = 0
        if width / height > across / down:
            above = (down - self._whole(height * (across / width))) // 2
        else:
            left = (across - self._whole(width * (down / height))) // 2
        return columns, rows, left, above

    def _whole(self, length: float) -> int:
        return int(length if self.wide else round(length, 7))

    def tokens(self, size: tuple[int, int]) -> int:
        """The places that an image of `size` (width, height) takes in the text."""
        per_tile = self.side // self.patch
        columns, rows, left, above = self.kept(size)
        return per_tile**2 + (rows * per_tile - 2 * above) * (columns * per_tile - 2 * left + 1)
