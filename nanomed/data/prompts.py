"""A file of prompts: what `sample.py --prompts` reads."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanomed.data.table import DataError, column, read_csv, read_text
from nanomed.run.flags import NUMBER, within

WORDS, CLASSES = ("prompt", "text", "caption"), ("label", "category", "class")  # columns


def read_prompts(path: str | Path, columns: Sequence[str] = (*WORDS, *CLASSES)) -> list[str]:
    """The prompts of a file, in order; repetitions stay. As `read_rows`, without what rows say besides."""
    return [row["prompt"] for row in read_rows(path, columns, {})]


def read_rows(path: str | Path, columns: Sequence[str] = (*WORDS, *CLASSES),
              own: Mapping[str, Callable[[str], Any]] | None = None) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of a file of prompts: {"prompt": text} and, where a `.csv` or `.tsv` file has such columns and the cell
    is not empty, seed, guidance, negative, steps, size and file, which decide for their row (`own`: others).

    A `.csv` or `.tsv` file needs a column `prompt`, `Prompt` or `text`, or one that names a class (or one column
    alone): the first of `columns` that it has. Others are ignored, and an empty prompt means: no condition. Any other
    file is one prompt a line. Raises DataError.
    """
    path = Path(path)
    if path.suffix.lower() not in (".csv", ".tsv"):
        lines = re.split(r"\r\n|\r|\n", read_text(path))
        while lines and not lines[-1].strip():
            lines.pop()
        rows = [{"prompt": line.strip()} for line in lines]
    else:
        records = read_csv(path)
        if not records:
            raise DataError(f"{path}: no prompts below the header")
        name = column(records[0][1], columns) or _only(records[0][1])
        if name is None:
            names = ", ".join(records[0][1])
            raise DataError(f"{path}:1: no column prompt, Prompt or text in the header, which is: {names}")
        known = COLUMNS if own is None else own
        there = {key: found for key in known if (found := column(records[0][1], (key,))) and found != name}
        rows = []
        for number, record in records:
            row = {"prompt": record[name].strip()}
            for key, header in there.items():
                if cell := record[header].strip():
                    try:
                        row[key] = known[key](cell)
                    except ValueError as error:
                        raise DataError(f"{path}:{number}: {header} is {cell!r}: {error}") from None
            rows.append(row)
    if not rows:
        raise DataError(f"{path}: no prompts")
    return rows


def _number(kind: type, limits: str) -> Callable[[str], Any]:
    """Reads a number as a flag of this range is read."""
    wanted = "not a whole number" if kind is int else "not a number"

    def read(text: str) -> Any:
        if not re.fullmatch(NUMBER[kind], text) or len(text) > 300 or not math.isfinite(kind(text)):
            raise ValueError(wanted)
        if not within(kind(text), limits):
            raise ValueError(f"out of range, which is {limits}")
        return kind(text)

    return read


def _file(text: str) -> str:
    """A name for an image that every system can have in a folder, without .png."""
    name = re.sub(r"\.png$", "", text, flags=re.IGNORECASE)
    if not name or re.search(r'[<>:"/\\|?*\x00-\x1f\x7f]', name) or name[0] in ". " or name[-1] in ". ":
        raise ValueError("not a name for a file in the folder of the images")
    taken = r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[\d\u00b9\u00b2\u00b3])(\..*)?"  # by Windows, whatever follows
    if re.fullmatch(taken, name, re.IGNORECASE) or len(name.encode()) > 200:
        raise ValueError("not a name that a file can have everywhere")
    return name


# What a row may decide for itself, and how its cell is read: in the range of drawing.py's flag of its name.
RANGES = {
    "seed": (int, "0 ..< 2^63"),
    "guidance": (float, "0 .. 1000"),
    "steps": (int, ">= 1"),
    "size": (int, "1 .. 16384"),
}
COLUMNS: dict[str, Callable[[str], Any]] = {
    **{name: _number(*of) for name, of in RANGES.items()}, "negative": str, "file": _file,
}  # fmt: skip


def _only(record: dict[str, str]) -> str | None:
    """The one column there is, unless its name is a sentence: then the file has no header, and this is a prompt."""
    name = next(iter(record))
    return name if len(record) == 1 and len(name.split()) <= 3 else None
