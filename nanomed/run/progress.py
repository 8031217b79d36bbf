"""How far something is: nothing for the first two seconds; then a bar on a terminal or in a notebook, and elsewhere, as
in SLURM's files, a line every half minute. Of several processes the first speaks.

    for rows in progress(batches, "drawing", "batch"): ...
    with Progress(total, "unet", "step") as bar: bar.update()
    with working("reading model.safetensors"): ...             what has no steps to count

May import nothing of nanomed.
"""

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

QUIET, BETWEEN = 2.0, 30.0  # seconds before the first sign, and from one line to the next
T = TypeVar("T")


def speaks() -> bool:
    """Whether this process is the one that tells: torchrun numbers them."""
    return os.environ.get("RANK", "0") == "0"


def rewrites() -> bool:
    """Whether a line can be written anew: on a terminal, and in a notebook, which does not call itself one."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


class Progress:
    """Counts `total` units of `what`, of which `done` are there already."""

    def __init__(self, total: int, what: str, unit: str = "", done: int = 0, shown: bool = True):
        self.total, self.what, self.unit, self.done, self.notes = total, what, unit, done, ""
        self.shown, self.bar = shown and speaks(), None
        self.begun, self.start = done, time.monotonic()
        self.next = self.start + QUIET
        if self.shown and rewrites():
            self.bar = tqdm(total=total, initial=done, desc=what, unit=unit or "it", delay=QUIET, leave=None)

    def update(self, count: int = 1, **notes: object) -> None:
        """`count` units more are done; `notes` stand behind the numbers."""
        self.done += count
        if notes:
            self.notes = "".join(f", {name}={value}" for name, value in notes.items())
        if self.bar is not None:
            if notes:
                self.bar.set_postfix(notes, refresh=False)
            self.bar.update(count)
        elif self.shown and (now := time.monotonic()) >= self.next:
            self.next = now + BETWEEN
            say(self.line(now))

    def line(self, now: float) -> str:
        """Where it stands, in words."""
        pace = (self.done - self.begun) / max(now - self.start, 1e-9)
        left = f", {duration((self.total - self.done) / pace)} left" if pace and self.done < self.total else ""
        units = f" {self.unit}s" if self.unit else ""
        return f"{self.what}: {self.done:,} of {self.total:,}{units}{left}{self.notes}"

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


def progress(
    items: Iterable[T], what: str, unit: str = "", total: int | None = None, shown: bool = True
) -> Iterator[T]:
    """The items, counted as they are done."""
    with Progress(len(items) if total is None else total, what, unit, shown=shown) as bar:  # type: ignore[arg-type]
        for item in items:
            yield item
            bar.update()


@contextmanager
def working(what: str) -> Iterator[None]:
    """Say what goes on, where it takes longer than two seconds, and every half minute that it still does."""
    ended, start = threading.Event(), time.monotonic()

    def tell() -> None:
        wait = QUIET
        while not ended.wait(wait):
            wait = BETWEEN
            say(f"{what} ... {duration(time.monotonic() - start)}")

    if not speaks():
        yield
        return
    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def say(line: str, file: Any = None) -> None:
    """A line above any bar, on standard error or to `file`."""
    tqdm.write(line, file=file or sys.stderr)


def duration(seconds: float) -> str:
    """Seconds, in the unit that a reader would take."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
