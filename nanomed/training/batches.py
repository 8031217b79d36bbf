"""Batches for training: which image, which prompt and which crop come at which step.

Everything is a pure function of (seed, position), where position counts the samples drawn since step 0 over all
ranks. So a restart at step n goes on with exactly the samples that would have come, and data order needs no state.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from nanomed.data import images
from nanomed.data.table import Row
from nanomed.run.cache import Columns
from nanomed.run.randomness import seed_of

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
    image = images.open_rgb(row.file)
    image = images.padded(image) if row.pad else image
    if augment:
        rng = np.random.default_rng(seed_of("view", seed, row.file.name, view.number))
        array = images.msdm_train(image, size, rng) if jitter else np.asarray(images.random_square(image, size, rng))
    else:
        array = images.msdm_valid(image, size)
    horizontal, vertical = view.flip
    return np.ascontiguousarray(array[:: -1 if vertical else 1, :: -1 if horizontal else 1])


class Batches:
    """Training batches of a table.

    An item is an (image, prompt) pair with `pairs`, else an image. What a batch holds: "prompt" (list of str, "" where
    the context is dropped) and the image as "image" (B, 3, size, size) in [-1, 1], or, with `columns`, the cached
    fields of `columns[row * len(views) + view]`, likewise for the fields of prompts with `texts`.

    `strategy` says how paraphrases are used (Chaichuk & Tutubalina 2024, section 3): "" not at all, "add" as pairs of
    their own, "replace" with probability `replace` in place of the prompt.

    With `join` > 1 a sample's prompt is followed by 0 to join - 1 other prompts of the same image: one sentence says
    one thing, so a small model that trains its own text encoder learns the words several times faster from three.
    `places` is the share of samples whose first prompt is one that says where something is, if the image has any, and
    in the first `places_first` micro-steps all samples have such a prompt: a sixth of all prompts are, they take the
    most samples to learn, and a text encoder that has first learned to tell yes from no hardly learns them after.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        size: int,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        pairs: bool = True,
        dropout: float = 0.0,
        augment: bool = True,
        view_count: int = 0,
        columns: Columns | None = None,
        texts: tuple[dict[str, int], Columns] | None = None,
        replace: float = 0.0,
        join: int = 1,
        places: float = 0.0,
        places_first: int = 0,
        jitter: bool = True,
    ):
        self.rows, self.size, self.batch, self.seed, self.rank, self.world = rows, size, batch, seed, rank, world
        self.dropout, self.augment, self.columns, self.texts, self.replace = dropout, augment, columns, texts, replace
        self.views, self.join, self.jitter = views(view_count, flips=dropout > 0), join, jitter
        self.view_count, self.places = view_count, places
        self.placed = places_first * batch * world  # samples, of all processes together
        if pairs:
            self.items = [(i, j) for i, row in enumerate(rows) for j in range(len(row.prompts))]
        else:
            self.items = [(i, 0) for i in range(len(rows))]
        if not self.items:
            raise ValueError("no training images: the table is empty")
        self._pool = ThreadPoolExecutor(max_workers=4)
        self._ahead: tuple[int, list[Future]] | None = None
        self._order = lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng(seed_of("order", self.seed, epoch)).permutation(len(self.items))

    def __getitem__(self, step: int) -> dict[str, Tensor | list[str]]:
        """The batch of micro-step `step` (counted from 0 over the whole stage) on this rank; the next one is prepared
        meanwhile."""
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = step, self._start(step)
        samples = [future.result() for future in self._ahead[1]]
        self._ahead = step + 1, self._start(step + 1)
        batch: dict[str, Tensor | list[str]] = {"prompt": [prompt for _, prompt in samples]}
        if self.columns is not None:
            batch |= self.columns[[image for image, _ in samples]]
        else:
            batch["image"] = torch.stack([image for image, _ in samples])
        if self.texts is not None:
            index, columns = self.texts
            batch |= columns[[index[prompt] for _, prompt in samples]]
        return batch

    def _start(self, step: int) -> list[Future]:
        first = (step * self.world + self.rank) * self.batch
        return [self._pool.submit(self._sample, first + i) for i in range(self.batch)]

    def _sample(self, position: int) -> tuple[Tensor | int, str]:
        """The image (or its row in `columns`) and the prompt at a position."""
        epoch, place = divmod(position, len(self.items))
        index, which = self.items[self._order(epoch)[place]]
        row = self.rows[index]
        rng = np.random.default_rng(seed_of("sample", self.seed, position))
        dropped, flip, view, swap = rng.random(), rng.integers(4), rng.integers(1 << 62), rng.random()
        if position < self.placed or (self.places and rng.random() < self.places):
            named = [i for i, prompt in enumerate(row.prompts) if " located in " in prompt]
            which = named[rng.integers(len(named))] if named else which
        prompt = row.prompts[which] if row.prompts else ""
        if row.paraphrases and swap < self.replace:
            prompt = row.paraphrases[which]
        if self.join > 1 and row.prompts:
            others = rng.permutation([i for i in range(len(row.prompts)) if i != which])[: rng.integers(self.join)]
            prompt = " ".join([prompt, *(row.prompts[i] for i in others)])
        is_dropped = dropped < self.dropout
        if self.columns is not None:
            number = self.view_count + flip if is_dropped else view % self.view_count
            image = index * len(self.views) + int(number)
        else:
            chosen = View(int(view), FLIPS[flip] if is_dropped else FLIPS[0])
            image = images.to_unit(pixels(row, self.size, self.seed, chosen, self.augment, self.jitter))
        return image, "" if is_dropped else prompt

    def close(self) -> None:
        """Stop the threads that prepare batches."""
        self._pool.shutdown(wait=True, cancel_futures=True)
