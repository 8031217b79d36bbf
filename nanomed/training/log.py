"""The curve of a stage: a bar on the terminal and lines in log.jsonl."""

import time

import torch
from torch import Tensor

from nanomed.run.hardware import peak_memory
from nanomed.run.progress import Progress
from nanomed.run.runs import Run
from nanomed.training import page


class Log:
    """Writes a line every `every` steps, and only then asks the device for values.

    images   of one step, on all processes together
    """

    def __init__(self, run: Run, stage: str, steps: tuple[int, int], every: int, images: int):
        self.run, self.stage, self.every, self.images = run, stage, every, images
        first, self.last = steps
        self.bar = Progress(self.last, stage, "step", done=first)
        run.update(plan=run.state.get("plan", {}) | {stage: {"steps": self.last, "images": images}})
        self.paused(first)

    def due(self, step: int) -> bool:
        """Whether a step is logged, and with it all that waits for the device or for other processes."""
        return step % self.every == 0 or step == self.last

    def resting(self, step: int) -> None:
        """The clock of images per second starts anew: after looking at checkpoints and saving them."""
        self.since, self.seen = time.monotonic(), step

    def paused(self, step: int) -> None:
        """A checkpoint is saved: the run's page shows it, and the clock starts anew."""
        page.keep(self.run)
        self.resting(step)

    def write(self, step: int, losses: dict[str, Tensor], norm: Tensor, **more: float) -> None:
        """A line: losses and the gradients' norm where they are finite, and what else is known."""
        values = torch.stack([value.detach().float() for value in (*losses.values(), norm.to(losses["loss"].device))])
        finite = [round(value, 6) if abs(value) < float("inf") else None for value in values.tolist()]
        shown = {name: value for name, value in zip(losses, finite) if value is not None or name == "loss"}
        pace = (step - self.seen) / max(time.monotonic() - self.since, 1e-9)
        self.bar.update(0, loss=shown["loss"])
        self.run.log(stage=self.stage, step=step, **shown, grad_norm=finite[-1], **more,
                     images_per_second=round(pace * self.images, 2),
                     memory_gb=round(peak_memory(self.run.ranks.device) / 1e9, 3))  # fmt: skip
        self.resting(step)

    def close(self) -> None:
        """End the bar."""
        self.bar.close()
