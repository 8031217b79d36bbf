"""Class folders: Kvasir v2 (DIR/polyps/*.jpg, ...) and Med-Art's eight skin lesion classes.

The caption is made from the folder's name by a template, as Med-Art's "simple" captions are. Folders of skin lesions
may have the usual abbreviations as names (MEL, NV, BCC, ...); captions spell them out.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nanomed.data import grammar
from nanomed.data.images import listing
from nanomed.data.readers.ham10000 import DIAGNOSES
from nanomed.data.table import DataError, Row, Table

TEMPLATES = {"kvasir": "An endoscopic image of {category}", "skin": "A dermoscopic image of {category}"}


def load(folder: str | Path, kind: str = "kvasir", problems: list[DataError] | None = None) -> Table:
    """One row an image, with its class as label. Split it with `by_label=True` (Med-Art: 80/20 of every class)."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    rows = []
    for path in listing(folder, "*/*", problems):
        label = path.parent.name
        category = _spelled(label) if kind == "skin" else label.replace("-", " ").replace("_", " ")
        rows.append(Row(path, (TEMPLATES[kind].format(category=category),), label=label))
    if not rows:
        raise DataError(f"{folder}: no class folders with images; expected {folder}/CLASS/IMAGE.jpg")
    return Table(kind, tuple(rows))


def named(table: Table) -> tuple[Table, tuple[str, ...]]:
    """The table with the name of its class as the one prompt of an image, and all the names, for systems that know
    classes instead of words. Where images have no class, every distinct prompt is one.

    Raises DataError where one image has a class and another has not, and where no two images say the same.
    """
    if without := [row for row in table.rows if not row.label]:
        if len(without) < len(table.rows):
            raise DataError(f"{without[0].file}: has no class, as others have; put images into class folders")
        names = sorted({prompt for row in table.rows for prompt in row.prompts} - {""})
        if not names or len(names) == sum(len(row.prompts) for row in table.rows) > 1:
            raise DataError(
                f"{table.name}: no classes; put images into class folders, or add a column label to metadata.csv"
            )
        return table, tuple(names)
    rows = tuple(replace(row, prompts=(_spelled(row.label),), paraphrases=()) for row in table.rows)
    return Table(table.name, rows), tuple(sorted({row.prompts[0] for row in rows}))


def by_polyps(table: Table) -> Table:
    """The table with a class for every image, "polyps" or "no polyps", as its prompts in the organisers' grammar say.

    Raises DataError where an image's prompts do not say how many polyps it shows.
    """

    def label(row: Row) -> str:
        for prompt in row.prompts:
            try:
                said = grammar.parse(prompt)
            except ValueError:
                continue
            if "polyps" in said:
                return "polyps" if said["polyps"] else "no polyps"
        raise DataError(f"{row.file}: no prompt says how many polyps it shows, as 'with no polyps' would")

    return Table(table.name, tuple(replace(row, label=label(row)) for row in table.rows))


def class_of(prompt: str, names: Sequence[str]) -> int | None:
    """Which class a prompt names: one that it is, by its name or its folder's, else the longest one whose name is among
    its words; None for "".

    Raises DataError where it names none, or several of which one is not part of the other.
    """
    if prompt in names:
        return names.index(prompt)
    if not prompt.strip():
        return None
    text, plain = _spelled(prompt).lower(), [name.lower() for name in names]
    if text in plain:
        return plain.index(text)
    found = [name for name in plain if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)]
    longest = max(found, key=len, default="")
    if not found or any(name not in longest for name in found):
        several = f"several classes ({', '.join(found)})" if found else "no class"
        known = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
        raise DataError(f"the prompt {prompt!r} names {several}; the model knows: {known}")
    return plain.index(longest)


def _spelled(label: str) -> str:
    """A folder's name in words."""
    return DIAGNOSES.get(label.lower(), label.replace("-", " ").replace("_", " "))
