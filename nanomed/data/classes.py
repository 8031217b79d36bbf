"""Class folders: Kvasir v2 (DIR/polyps/*.jpg, ...) and Med-Art's eight skin lesion classes.

The caption is made from the folder's name by a template, as Med-Art's "simple" captions are. Folders of skin lesions
may have the usual abbreviations as names (MEL, NV, BCC, ...); captions spell them out.
"""

from pathlib import Path

from nanomed.data.ham10000 import DIAGNOSES
from nanomed.data.images import listing
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
        category = label.replace("-", " ").replace("_", " ")
        if kind == "skin":
            category = DIAGNOSES.get(label.lower(), category)
        rows.append(Row(path, (TEMPLATES[kind].format(category=category),), label=label))
    if not rows:
        raise DataError(f"{folder}: no class folders with images; expected {folder}/CLASS/IMAGE.jpg")
    return Table(kind, tuple(rows))
