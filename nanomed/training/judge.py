"""The judge of checkpoints: looks at a stage from outside, on images that it does not train on."""

import math
from contextlib import nullcontext

import torch
from torch import Tensor

from nanomed.data import only_toy
from nanomed.data.table import Table
from nanomed.run import files
from nanomed.run.hardware import autocast
from nanomed.run.progress import progress, working
from nanomed.run.randomness import ImageNoise, seed_all
from nanomed.run.runs import Run
from nanomed.training import caches
from nanomed.training.batches import Batches, Samples, View, pixels, to_device
from nanomed.training.optimizer import EMA
from nanomed.training.placement import Placement


class Judge:
    """Looks at a stage from outside: the loss on held-out images, a grid, and the number to choose the best by.

    That number is a Frechet distance between held-out images and images of fixed prompts and seeds where a feature
    network is at hand (`measure` says which), else the validation loss. `best` is {"step", "score", "by"} of the best
    checkpoint so far. Where no image is held out nothing is measured, and the last checkpoint is the best.

    split   the training images and those held out
    """

    def __init__(self, config, system, stage: str, run: Run, split: tuple[Table, Table], placement: Placement):
        self.config, self.system, self.stage, self.run = config, system, stage, run
        train, self.valid = split
        self.shown = self.valid if self.valid.rows else train  # whose prompts and images the grids show
        self.placement, self.ranks, self.device, self.best = placement, run.ranks, run.ranks.device, None
        self.draws = system.uses_text(stage)
        self.distance, self.measure = None, "validation loss"
        if self.draws and config.score_images and self.valid.rows:
            from nanomed.metrics.features import frechet_to

            with working(f"stage {stage}: features of what is held out"):
                arrays = [pixels(row, system.size, 0, View(0), augment=False) for row in self.valid.rows]
                self.distance, name = frechet_to(arrays, toy=only_toy(config.data), folder=config.weights or None)
            self.measure = name or self.measure
        self.prompts = self._grid_prompts() if self.draws else []
        if self.valid.rows:
            run.say(f"stage {stage}: the best checkpoint is the one of the lowest {self.measure}")
        else:
            self.measure = "nothing"
            run.say(f"stage {stage}: nothing is held out, so nothing is measured; the last checkpoint is kept")

    def _grid_prompts(self) -> list[str]:
        if self.config.grid_prompts:
            from nanomed.data.prompts import read_prompts

            return read_prompts(self.config.grid_prompts, self.system.columns)[: max(self.config.score_images, 16)]
        pairs = [prompt for row in self.shown.rows for prompt in row.prompts]
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(self.config.seed))
        return [pairs[i] for i in order[: max(self.config.score_images, 16)].tolist()]

    def look(self, step: int, average: EMA | None) -> None:
        """Judge the averaged weights of a step, and remember it if there was no better one."""
        score = self.score(step, average)
        if self.best is None or score is None or self.best["score"] is None or score < self.best["score"]:
            self.best = {"step": step, "score": score, "by": self.measure}

    @property
    def verdict(self) -> str:
        """Which checkpoint is kept, and why, in words."""
        if self.best["score"] is None:
            return f"keeping step {self.best['step']}, the last: nothing was held out to choose by"
        return f"keeping step {self.best['step']}, the lowest {self.measure} ({self.best['score']:.4f})"

    @torch.no_grad()
    def score(self, step: int, average: EMA | None) -> float | None:
        """Validate, draw the grid and return the score of the averaged weights; every rank gets the same number. None
        where nothing is held out."""
        with average.swapped() if average else nullcontext():
            self.system.eval()
            self.placement.whole()
            loss = self._loss() if self.valid.rows else None
            images = self._draw() if self.draws else self._reconstruct()
            if self.ranks.first and len(images):
                name = f"{self.stage}-step-{step:06d}.png"
                files.write_png(self.run.folder / "samples" / name, grid(images[:16]))
            with working(f"{self.stage}: judging what was drawn"):
                score = self.distance(images) if self.distance else loss
        if not all(math.isfinite(value) for value in (loss, score) if value is not None):
            raise FloatingPointError(f"{self.stage}: what is held out has no finite loss or score at step {step}: "
                                     f"lower --lr, or use --precision bf16 or fp32")  # fmt: skip
        self.system.trainable(self.stage)
        self.placement.apart()
        if loss is not None:
            self.run.log(
                stage=self.stage, step=step, valid_loss=round(loss, 6), score=round(score, 6), score_is=self.measure
            )
        return score

    def _loss(self) -> float:
        """The training loss on held-out samples at fixed noise and timesteps, the ranks sharing the batches."""
        batch = min(self.config.batch, 32)
        shapes = caches.shapes(self.config, self.system, self.stage)
        how = Samples(self.system.size, 0, pairs=self.draws, augment=False, shapes=shapes)
        held_out = Batches(self.valid.rows, how, batch)
        total = count = 0
        counts = self.ranks.share(range(min(8, -(-len(held_out.items) // batch))))
        for i in progress(counts, f"{self.stage}: validation", "batch"):
            seed_all("validation", i)
            total += self.system(to_device(held_out[i], self.device), self.stage, 0)["loss"].item()
            count += 1
        held_out.close()
        return self.ranks.mean(total / max(count, 1), count)

    def _draw(self) -> Tensor:
        """uint8 images (N, S, S, 3) of the fixed prompts, each from its own seed; the ranks share the work."""
        batch, drawn = 16, []
        starts = self.ranks.share(range(0, len(self.prompts), batch))
        for start in progress(starts, f"{self.stage}: drawing", "batch"):
            prompts = self.prompts[start : start + batch]
            noise = ImageNoise(self.config.seed, range(start, start + len(prompts)), self.device)
            with autocast(self.config.precision, self.device):
                drawn.append(self.system.sample(prompts, noise).float())
        mine = (
            files.to_bytes(torch.cat(drawn))
            if drawn
            else torch.empty(0, self.system.size, self.system.size, 3, dtype=torch.uint8)
        )
        return self.ranks.gather(mine, len(self.prompts), batch)

    def _reconstruct(self) -> Tensor:
        """Held-out images, or else training images, each followed by what the autoencoder makes of it."""
        images = next(caches.images_of(self.shown, self.system.size, self.device, batch=8))
        pairs = torch.stack([images, self.system.reconstruct(images)], dim=1).flatten(0, 1)
        return files.to_bytes(self.system.to_unit(pairs.float()))


def grid(images: Tensor) -> Tensor:
    """uint8 images (N, S, S, 3) side by side, as near to a square as N allows."""
    columns = max(d for d in range(1, int(len(images) ** 0.5) + 1) if len(images) % d == 0)
    columns = len(images) // columns
    rows = images.unflatten(0, (-1, columns))  # (R, C, S, S, 3)
    return rows.permute(0, 2, 1, 3, 4).flatten(0, 1).flatten(1, 2)
