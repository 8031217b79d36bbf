"""A file of prompts: what `sample.py --prompts` reads."""

import re
from collections.abc import Sequence
from pathlib import Path

from nanomed.data.table import DataError, column, read_csv, read_text

WORDS, CLASSES = ("prompt", "text", "caption"), ("label", "category", "class")  # columns


def read_prompts(path: str | Path, columns: Sequence[str] = (*WORDS, *CLASSES)) -> list[str]:
    """The prompts of a file, in order; repetitions stay.

    A `.csv` or `.tsv` file needs a column `prompt`, `Prompt` or `text`, or one that names a class (or one column
    alone): the first of `columns` that it has. Others are ignored, and an empty prompt means: no condition. Any other
    file is one prompt a line.
    """
    path = Path(path)
    if path.suffix.lower() not in (".csv", ".tsv"):
        lines = re.split(r"\r\n|\r|\n", read_text(path))
        while lines and not lines[-1].strip():
            lines.pop()
        prompts = [line.strip() for line in lines]
    else:
        records = read_csv(path)
        if not records:
            raise DataError(f"{path}: no prompts below the header")
        name = column(records[0][1], columns) or _only(records[0][1])
        if name is None:
            names = ", ".join(records[0][1])
            raise DataError(f"{path}:1: no column prompt, Prompt or text in the header, which is: {names}")
        prompts = [record[name].strip() for _, record in records]
    if not prompts:
        raise DataError(f"{path}: no prompts")
    return prompts


def _only(record: dict[str, str]) -> str | None:
    """The one column there is, unless its name is a sentence: then the file has no header, and this is a prompt."""
    name = next(iter(record))
    return name if len(record) == 1 and len(name.split()) <= 3 else None
