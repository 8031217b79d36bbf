"""--range: which values of images with more than 8 bits are black and white, the same for all of a data set.

auto       0 and the largest value of the smallest number of bits that holds all of the data set, 8 at least; floats in
           [0, 1] are taken as that. Decided once: a run writes it down, and goes on with it
BITS       0 and 2^BITS - 1: 10, 12 and 14 bits in files of 16, as scanners write them
LOW:HIGH   these two values; what lies beyond them is black or white. In DICOM files this window takes the place of
           their own, which auto and BITS leave as they are

Without it a file of 16 bits is divided by 257, and 12 bits come out nearly black: `dark` says so.
"""

import itertools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from nanomed.data.images import extremes, is_deep, limits, of_bits, open_rgb
from nanomed.data.table import DataError, Table
from nanomed.run.progress import progress

DARK = 64  # a quarter of all greys, which is what 14 bits in a file of 16 come to
HEADERS, LOOKS = 1000, 32  # images that are looked at for a warning


def judge(span: str) -> None:
    """Raise UsageError for a --range that there is not."""
    if span not in ("", "auto"):
        limits(span)


def deep(files: Sequence[Path], span: str = "") -> list[bool]:
    """Which of the files have more than 8 bits, or are DICOM that a window is chosen for, by their headers."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(is_deep, files, itertools.repeat(span)))


def decided(files: Sequence[Path], span: str) -> str:
    """A range for the files of one data set: in place of auto that of all their values, "" where none of them has more
    than 8 bits. Damaged ones are passed over. Raises DataError where the values do not tell what is black and white, or
    are not those of so many bits."""
    if not span or ":" in span:
        return span
    files = [file for file, is_one in zip(files, deep(files)) if is_one]
    found: dict[bool, tuple[float, Path]] = {}  # whether they are floats -> the largest value and its file
    with ThreadPoolExecutor(4) as pool:
        seen = progress(pool.map(_extremes, files), "values of deep images", "image", len(files))
        for file, known in zip(files, seen):
            if known:
                low, high, floats = known
                if span != "auto":
                    of_bits(np.array([low, high]), span, file)
                elif low < 0:
                    raise DataError(f"{file}: holds {low:g}, so --range auto knows no black; say --range LOW:HIGH")
                found[floats] = max(found.get(floats, (high, file)), (high, file))
    if span != "auto" or not found:
        return span.removesuffix("auto")
    if len(found) == 2:
        one, other = (found[floats][1] for floats in (True, False))
        raise DataError(f"{one} holds floats and {other} whole numbers: say --range LOW:HIGH in place of auto")
    floats, (high, file) = next(iter(found.items()))
    if floats and high <= 1:
        return "0:1"
    bits = max(8, math.ceil(high).bit_length())
    if bits > 32:
        raise DataError(f"{file}: values up to {high:g} are more than --range auto takes; say --range LOW:HIGH")
    return str(bits)


def _extremes(file: Path) -> tuple[float, float, bool] | None:
    try:
        return extremes(file)
    except DataError:  # named where the image is needed
        return None


def of_files(files: Sequence[Path], span: str) -> tuple[str, ...]:
    """The range of every file of one data set, "" of those with 8 bits; () where no file has one."""
    span = decided(files, span)
    return tuple(span if is_one else "" for is_one in deep(files, span)) if span else ()


def of_table(table: Table, span: str) -> list[str]:
    """The range in place of auto of every data set that a table is made of."""
    parts = range(1 + max((row.part for row in table.rows), default=0))
    return [decided([row.file for row in table.rows if row.part == part], span) for part in parts]


def ranged(table: Table, spans: Sequence[str]) -> Table:
    """The table whose deep images are read by the range of their data set (`of_table`); the others as they are."""
    if not any(spans):
        return table
    rows = list(table.rows)
    for part, span in enumerate(spans):
        own = [i for i, row in enumerate(rows) if row.part == part] if span else []
        for i, is_one in zip(own, deep([rows[i].file for i in own], span)):
            rows[i] = replace(rows[i], range=span) if is_one else rows[i]
    return replace(table, rows=tuple(rows))


def told(table: Table, span: str) -> str:
    """What a run says of the range of its images, in words: what was decided, or a warning of dark ones."""
    if not span:
        return dark([row.file for row in table.rows])
    spans = {row.range: limits(row.range) for row in table.rows if row.range}
    means = ", ".join(f"{low:.10g} is black and {high:.10g} white" for low, high in spans.values())
    count = sum(bool(row.range) for row in table.rows)
    return f"--range {span}: {count:,} of {len(table.rows):,} images have more than 8 bits" + f"; {means}" * bool(means)


def dark(files: Sequence[Path]) -> str:
    """A warning where images of more than 8 bits, read without a range, come out dark or flat; else "". The headers of
    some images are looked at, and the pixels of a few."""
    files = files[:: -(-len(files) // HEADERS) or 1]
    found = [file for file, is_one in zip(files, deep(files)) if is_one]
    with ThreadPoolExecutor(4) as pool:
        looked = [ends for ends in pool.map(_ends, found[:: -(-len(found) // LOOKS) or 1]) if ends]
    low, high = min((ends[0] for ends in looked), default=0), max((ends[1] for ends in looked), default=255)
    if high - low > DARK:
        return ""
    return (
        f"dark or flat images: {len(found):,} of {len(files):,} looked at have more than 8 bits and come out in greys "
        f"from {low} to {high} of 255; --range auto makes the most of the bits that are used"
    )


def _ends(file: Path) -> tuple[int, int] | None:
    try:
        ends = open_rgb(file).getextrema()
    except DataError:
        return None
    return min(low for low, _ in ends), max(high for _, high in ends)
