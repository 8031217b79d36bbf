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
import weakref
from collections.abc import Iterable, Iterator
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
    """Counts `total` units of `what`, of which `done` are there already; without a total it tells how long it takes.

    A thread tells, so that one long unit is not silent either.
    """

    def __init__(self, total: int, what: str, unit: str = "", done: int = 0, shown: bool = True):
        self.total, self.what, self.unit, self.done, self.notes = total, what, unit, done, ""
        self.begun, self.start = done, time.monotonic()
        self.bar: tqdm | None = None
        self.ended = threading.Event()
        if not (shown and speaks()):
            return
        if rewrites():
            form = None if total else "{desc} ... {elapsed}"
            self.bar = tqdm(total=total, initial=done, desc=what, unit=unit or "it", bar_format=form, delay=QUIET,
                            leave=None)  # fmt: skip
        weakref.finalize(self, self.ended.set)  # one that an error has left open falls silent with it
        tell = weakref.WeakMethod(self.tell)
        threading.Thread(target=_repeat, args=(tell, self.ended, 1.0 if self.bar else BETWEEN), daemon=True).start()

    def update(self, count: int = 1, **notes: object) -> None:
        """`count` units more are done; `notes` stand behind the numbers."""
        self.done += count
        if notes:
            self.notes = "".join(f", {name}={value}" for name, value in notes.items())
        if self.bar is not None:
            if notes:
                self.bar.set_postfix(notes, refresh=False)
            self.bar.update(count)

    def tell(self) -> None:
        """Say where it stands."""
        if self.bar is None:
            say(self.line(time.monotonic()))
        else:
            self.bar.delay = 0  # or closing it would take it for one that was never seen
            self.bar.refresh()

    def line(self, now: float) -> str:
        """Where it stands, in words."""
        if not self.total:
            return f"{self.what} ... {duration(now - self.start)}"
        pace = (self.done - self.begun) / max(now - self.start, 1e-9)
        left = f", {duration((self.total - self.done) / pace)} left" if pace and self.done < self.total else ""
        return f"{self.what}: {self.done:,} of {self.total:,}{plural(self.unit)}{left}{self.notes}"

    def close(self) -> None:
        """End the bar, and the thread that tells of long waits."""
        self.ended.set()
        if self.bar is not None:
            self.bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


def _repeat(tell: weakref.WeakMethod, ended: threading.Event, between: float) -> None:
    """Tell after two seconds, and then again and again, until it has ended."""
    wait = QUIET
    while not ended.wait(wait):
        wait = between
        if method := tell():
            method()


def progress(
    items: Iterable[T], what: str, unit: str = "", total: int | None = None, shown: bool = True
) -> Iterator[T]:
    """The items, counted as they are done."""
    with Progress(len(items) if total is None else total, what, unit, shown=shown) as bar:  # type: ignore[arg-type]
        for item in items:
            yield item
            bar.update()


def plural(unit: str) -> str:
    """Several of a unit, behind a number: images, batches, MB."""
    if not unit or unit.isupper():
        return f" {unit}" if unit else ""
    return f" {unit}es" if unit.endswith("ch") else f" {unit}s"


def working(what: str) -> Progress:
    """`with working("reading a file"):` says what goes on, where there is nothing to count."""
    return Progress(0, what)


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
