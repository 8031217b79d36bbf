"""Images of several shapes: which shapes there are, which one an image goes to, and the least that is cut off.

    shapes(1024, 64)           (1024, 1024), (960, 1088), (896, 1152), ..., (1408, 704): height x width, one area
    nearest(table, 720, 576)   the place of the shape that keeps most of an image of 720 x 576 pixels
    frame(720, 576, table[i])  how it is scaled until it covers that shape, and which part is taken
    Turns(buckets, 32, seed)   which sample comes when, where the 32 of a step are of one shape

Aspect-ratio buckets as SDXL was trained on (Podell et al. 2023, section 2.3 and appendix I).
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from nanomed.run.randomness import seed_of

Shape = tuple[int, int]  # height x width in pixels


def shapes(size: int, unit: int, most: float = 2.0) -> tuple[Shape, ...]:
    """Heights and widths of images of about size^2 pixels and never more, whose sides are at most `most` to one: the
    square first, then every other one lying and standing.

    Sides are multiples of `unit`, and of about a sixteenth of `size`: 64 for 1,024 pixels, as SDXL's are.
    """
    step = max(unit, size // 16 // unit * unit)
    found: list[Shape] = [(size, size)]
    for height in range((size - 1) // step * step, 0, -step):
        width = int(min(size * size // height, most * height)) // step * step
        if width > height and width / height > found[-1][1] / found[-1][0]:  # else it is a smaller one of that shape
            found.append((height, width))
    return tuple(shape for lying in found for shape in dict.fromkeys((lying, lying[::-1])))


def nearest(table: Sequence[Shape], width: int, height: int) -> int:
    """The place in a table of the shape that an image loses least of its area to; the first of equals."""
    return min(range(len(table)), key=lambda i: lost(table[i], width, height))


def lost(shape: Shape, width: int, height: int) -> float:
    """The share of an image's area that is cut off where it is scaled to cover a shape."""
    ratio = width * shape[0] / (height * shape[1])
    return 1 - min(ratio, 1 / ratio)


class Frame(NamedTuple):
    """The part of an image that is taken: the image is scaled to `rows` x `columns`, and of that the `height` x `width`
    from (top, left) on is kept. `original` is the height and width that it has in its file."""

    original: Shape
    rows: int
    columns: int
    top: int
    left: int
    height: int
    width: int

    def flipped(self, horizontal: bool, vertical: bool) -> "Frame":
        """The same part of the image in a mirror."""
        left = self.columns - self.left - self.width if horizontal else self.left
        return self._replace(left=left, top=self.rows - self.top - self.height if vertical else self.top)

    @property
    def sizes(self) -> tuple[int, ...]:
        """What SDXL is told of an image, in pixels: height and width of the original, top and left of the part, its
        height and width."""
        return (*self.original, self.top, self.left, self.height, self.width)


def frame(width: int, height: int, shape: Shape, rng: np.random.Generator | None = None) -> Frame:
    """The middle of an image of width x height that is scaled until it just covers a shape; with `rng` a random part.
    Something is cut off along one side at most."""
    scale = max(shape[0] / height, shape[1] / width)
    rows, columns = max(shape[0], round(height * scale)), max(shape[1], round(width * scale))
    spare = rows - shape[0], columns - shape[1]
    top, left = (room // 2 if rng is None else int(rng.integers(room + 1)) for room in spare)
    return Frame((height, width), rows, columns, top, left, *shape)


def taken(image: Image.Image, part: Frame) -> Image.Image:
    """The part of an image that a frame says, scaled and cut in one pass."""
    across, down = image.width / part.columns, image.height / part.rows
    box = (part.left * across, part.top * down, (part.left + part.width) * across, (part.top + part.height) * down)
    box = (*box[:2], min(box[2], image.width), min(box[3], image.height))  # not beyond it by rounding
    return image.resize((part.width, part.height), Image.Resampling.BILINEAR, box=box)


class Turns:
    """Which sample comes at a position of training, where the `together` samples of a step are of one bucket.

    buckets   samples by number, of each shape; a shape may have none
    together  samples of one step, of all processes and passes: they can be divided among any number of either

    A bucket is an endless row of passes over its samples, in an order drawn anew for each pass, and gives `together` of
    them in its turn. After e epochs it has had floor(e * samples / together) turns. So what is left of a pass waits for
    the next epoch: nothing is dropped, every sample is seen as often as any other, and a shape of fewer images than a
    step has samples has its turn in some epochs only.
    """

    def __init__(self, buckets: Sequence[Sequence[int]], together: int, seed: int):
        self.buckets, self.together, self.seed = [list(bucket) for bucket in buckets], together, seed
        self._turns, self._pass = lru_cache(maxsize=2)(self._turns), lru_cache(maxsize=64)(self._pass)

    def __getitem__(self, position: int) -> int:
        step, place = divmod(position, self.together)
        which, turn = self.turn(step)
        through, place = divmod(turn * self.together + place, len(self.buckets[which]))
        return self.buckets[which][self._pass(which, through)[place]]

    def turn(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and how many turns it has had before."""
        low, high = 0, 1  # an epoch that begins at this step or before it, and one that begins after it
        while self._begin(high) <= step:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._begin(middle) <= step else (low, middle)
        return self._turns(low)[step - self._begin(low)]

    def _had(self, which: int, epoch: int) -> int:
        return epoch * len(self.buckets[which]) // self.together

    def _begin(self, epoch: int) -> int:
        """The first step of an epoch."""
        return sum(self._had(which, epoch) for which in range(len(self.buckets)))

    def _turns(self, epoch: int) -> list[tuple[int, int]]:
        turns = [(which, turn) for which in range(len(self.buckets))
                 for turn in range(self._had(which, epoch), self._had(which, epoch + 1))]  # fmt: skip
        mixed = np.random.default_rng(seed_of("order", self.seed, epoch)).permutation(len(turns))
        return [turns[i] for i in mixed]

    def _pass(self, which: int, through: int) -> np.ndarray:
        key = seed_of("order", self.seed, through, which)
        return np.random.default_rng(key).permutation(len(self.buckets[which]))
