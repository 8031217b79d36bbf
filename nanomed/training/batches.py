"""Batches for training: which image, which prompt and which crop come at which step.

Everything is a pure function of (seed, position), where position counts the samples drawn since step 0 over all
ranks. So a restart at step n goes on with exactly the samples that would have come, and data order needs no state.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from nanomed.data import buckets, images
from nanomed.data.table import Row
from nanomed.run.cache import Columns
from nanomed.run.randomness import seed_of
from nanomed.run.ranks import ALONE, Ranks

FLIPS = ((False, False), (True, False), (False, True), (True, True))  # (left-right, top-bottom)


@dataclass
class View:
    """One way to look at an image: a seed for crop and jitter, and flips."""

    number: int
    flip: tuple[bool, bool] = (False, False)


def views(count: int, flips: bool = True) -> list[View]:
    """The views a cache holds: `count` crops as they are, then one for each of the four flips, which serve samples
    whose prompt is dropped (only then is an image flipped: "upper-left" must stay true)."""
    return [View(i) for i in range(count)] + [View(count + i, flip) for i, flip in enumerate(FLIPS) if flips]


def pixels(row: Row, size: int, seed: int, view: View, augment: bool, jitter: bool = True) -> np.ndarray:
    """A row's image as uint8 (size, size, 3). `augment` is the paper's training transform (random square crop and,
    with `jitter`, of colours too, seeded by the file's name and the view), else the centre crop."""
    image = images.open_rgb(row.file, row.range)
    image = images.padded(image) if row.pad else image
    if augment:
        rng = np.random.default_rng(seed_of("view", seed, row.file.name, view.number))
        array = images.msdm_train(image, size, rng) if jitter else np.asarray(images.random_square(image, size, rng))
    else:
        array = images.msdm_valid(image, size)
    return _flipped(array, view)


def framed(
    row: Row, shape: buckets.Shape, seed: int, view: View, augment: bool, jitter: bool = True
) -> tuple[np.ndarray, tuple[int, ...]]:
    """As `pixels`, of a shape: uint8 (*shape, 3), and what SDXL is told of its sizes. No border is added, and no more
    is cut off than the shape asks for: a random part with `augment`, else the middle."""
    image = images.open_rgb(row.file, row.range)
    rng = np.random.default_rng(seed_of("view", seed, row.file.name, view.number)) if augment else None
    frame = buckets.frame(*image.size, shape, rng)
    image = buckets.taken(image, frame)
    image = images.color_jitter(image, rng) if augment and jitter else image
    return _flipped(np.asarray(image), view), frame.flipped(*view.flip).sizes


def _flipped(array: np.ndarray, view: View) -> np.ndarray:
    horizontal, vertical = view.flip
    return np.ascontiguousarray(array[:: -1 if vertical else 1, :: -1 if horizontal else 1])


@dataclass(frozen=True)
class Samples:
    """How rows become samples.

    size         the side of images in pixels
    seed         of order, crops, dropped prompts and all other choices
    pairs        a sample is an (image, prompt) pair, else an image
    dropout      share of samples whose prompt is ""
    flips        they are flipped, and only they: the paper's augmentation. Guidance leads away from what they look
                 like, so in a small model's few steps a world that is never flipped is learned sooner without
    augment      random crops (and, with `jitter`, colours), else centre crops
    views        crops of an image that a cache holds; 0: a new one every time
    replace      probability that a paraphrase takes the place of a prompt (Chaichuk & Tutubalina 2024, section 3)
    join         a prompt is followed by 0 to join - 1 others of the same image: one sentence says one thing, so a small
                 model that trains its own text encoder learns the words several times faster from three
    places       the share of samples whose first prompt says where something is, if the image has such a prompt
    places_first and of so many micro-steps at the start all: a sixth of all prompts do, they take the most samples to
                 learn, and a text encoder that has first learned to tell yes from no hardly learns them after
    trimmed      fields of prompts that may be cut behind the longest text of a batch, the mask first
    shapes       heights and widths that images keep the nearest of, each step those of one; none: squares of `size`
    """

    size: int
    seed: int
    pairs: bool = True
    dropout: float = 0.0
    flips: bool = True
    augment: bool = True
    jitter: bool = True
    views: int = 0
    replace: float = 0.0
    join: int = 1
    places: float = 0.0
    places_first: int = 0
    trimmed: tuple[str, ...] = ()
    shapes: tuple[buckets.Shape, ...] = ()

    @property
    def looks(self) -> list[View]:
        """The views that a cache of these samples holds."""
        return views(self.views, self.flips and self.dropout > 0)

    def shaped(self, rows: Sequence[Row]) -> list[int]:
        """Of every row, which of the shapes its image goes to."""
        return [buckets.nearest(self.shapes, *images.size_of(row.file)) for row in rows]


class ByShape:
    """Columns of images of several shapes, told by the rows of the whole: those that are asked for together are of one
    shape."""

    def __init__(self, columns: Sequence[Columns], where: Sequence[tuple[int, int]]):
        self.columns, self.where = columns, where  # of every row, in which columns it is and which row of them

    def __getitem__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        return self.columns[self.where[rows[0]][0]][[self.where[row][1] for row in rows]]


@dataclass(frozen=True)
class Kept:
    """What frozen parts make of the data, from the cache: `images[row * views + view]`, and `texts[index[prompt]]`."""

    images: Columns | ByShape | None = None
    texts: Columns | None = None
    index: dict[str, int] = field(default_factory=dict)


NOTHING = Kept()


class Batches:
    """Training batches of rows.

    A batch holds "prompt" (list of str, "" where the context is dropped) and the image as "image" (B, 3, size, size) in
    [-1, 1]; or the fields that are kept of it, likewise of the prompts.

    With shapes the image's sides are those of one of them, and "sizes" (B, 6) says what SDXL is told: height and width
    of the original, top and left of the part that is taken, its height and width.

    ranks       share the samples, `batch` to each at a time
    accumulate  as many micro-steps make a step
    """

    def __init__(
        self,
        rows: Sequence[Row],
        how: Samples,
        batch: int,
        ranks: Ranks = ALONE,
        kept: Kept = NOTHING,
        accumulate: int = 1,
    ):
        self.rows, self.how, self.batch, self.ranks, self.kept = rows, how, batch, ranks, kept
        self.views = how.looks
        self.placed = how.places_first * batch * ranks.world  # samples, of all processes together
        if how.pairs:
            self.items = [(i, j) for i, row in enumerate(rows) for j in [*range(len(row.prompts))] * row.weight]
        else:
            self.items = [(i, 0) for i, row in enumerate(rows) for _ in range(row.weight)]
        if not self.items:
            raise ValueError("no training images: the table is empty")
        self.turns = None
        if how.shapes:
            self.places = how.shaped(rows)
            sorted_by = [[i for i, (row, _) in enumerate(self.items) if self.places[row] == place]
                         for place in range(len(how.shapes))]  # fmt: skip
            self.turns = buckets.Turns(sorted_by, batch * accumulate * ranks.world, how.seed)
        self._pool = ThreadPoolExecutor(max_workers=4)
        self._ahead: tuple[int, list[Future]] | None = None
        self._order = lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng(seed_of("order", self.how.seed, epoch)).permutation(len(self.items))

    def __getitem__(self, step: int) -> dict[str, Tensor | list[str]]:
        """The batch of micro-step `step` (counted from 0 over the whole stage) on this rank; the next one is prepared
        meanwhile."""
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = step, self._start(step)
        samples = [future.result() for future in self._ahead[1]]
        self._ahead = step + 1, self._start(step + 1)
        batch: dict[str, Tensor | list[str]] = {"prompt": [prompt for _, prompt in samples]}
        if self.kept.images is not None:
            batch |= self.kept.images[[image for image, _ in samples]]
        elif self.turns is not None:
            batch["image"] = torch.stack([image for (image, _), _ in samples])
            batch["sizes"] = torch.tensor([sizes for (_, sizes), _ in samples])
        else:
            batch["image"] = torch.stack([image for image, _ in samples])
        if self.kept.texts is not None:
            batch |= self.kept.texts[[self.kept.index[prompt] for _, prompt in samples]]
            batch |= self._cut(batch)
        return batch

    def _cut(self, batch: dict[str, Tensor], multiple: int = 8) -> dict[str, Tensor]:
        """The trimmed fields without what stands behind the longest text: asked here, before the device has them. The
        length is rounded up, so that few shapes occur."""
        if not self.how.trimmed:
            return {}
        seen = batch[self.how.trimmed[0]].numpy().any(0).nonzero()[0]
        last = -(-(int(seen[-1]) + 1 if len(seen) else 1) // multiple) * multiple
        return {name: batch[name][:, :last] for name in self.how.trimmed}

    def _start(self, step: int) -> list[Future]:
        first = (step * self.ranks.world + self.ranks.rank) * self.batch
        return [self._pool.submit(self._sample, first + i) for i in range(self.batch)]

    def _item(self, position: int) -> tuple[int, int]:
        if self.turns is not None:
            return self.items[self.turns[position]]
        epoch, place = divmod(position, len(self.items))
        return self.items[self._order(epoch)[place]]

    def _sample(self, position: int) -> tuple[Tensor | int | tuple, str]:
        """The image (with shapes, and its sizes; or the row of what is kept of it) and the prompt at a position."""
        how = self.how
        index, which = self._item(position)
        row = self.rows[index]
        rng = np.random.default_rng(seed_of("sample", self.how.seed, position))
        dropped, flip, view, swap = rng.random(), rng.integers(4), rng.integers(1 << 62), rng.random()
        if position < self.placed or (how.places and rng.random() < how.places):
            named = [i for i, prompt in enumerate(row.prompts) if " located in " in prompt]
            which = named[rng.integers(len(named))] if named else which
        prompt = row.prompts[which] if row.prompts else ""
        if row.paraphrases and swap < how.replace:
            prompt = row.paraphrases[which]
        if how.join > 1 and row.prompts:
            others = rng.permutation([i for i in range(len(row.prompts)) if i != which])[: rng.integers(how.join)]
            prompt = " ".join([prompt, *(row.prompts[i] for i in others)])
        is_dropped = dropped < how.dropout
        flipped = is_dropped and how.flips
        if self.kept.images is not None:
            number = how.views + flip if flipped else view % how.views
            image = index * len(self.views) + int(number)
        else:
            chosen = View(int(view), FLIPS[flip] if flipped else FLIPS[0])
            if self.turns is not None:
                shape = how.shapes[self.places[index]]
                array, sizes = framed(row, shape, how.seed, chosen, how.augment, how.jitter)
                return (images.to_unit(array), sizes), "" if is_dropped else prompt
            image = images.to_unit(pixels(row, how.size, how.seed, chosen, how.augment, how.jitter))
        return image, "" if is_dropped else prompt

    def close(self) -> None:
        """Stop the threads that prepare batches."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def to_device(batch: dict, device: torch.device) -> dict:
    """A batch with its tensors on the device; the host does not wait until they are there."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
