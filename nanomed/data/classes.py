"""Class folders: Kvasir v2 (DIR/polyps/*.jpg, ...) and Med-Art's eight skin lesion classes.

The caption is made from the folder's name by a template, as Med-Art's "simple" captions are.
"""

from pathlib import Path

from nanomed.data.images import SUFFIXES
from nanomed.data.table import DataError, Row, Table

TEMPLATES = {"kvasir": "An endoscopic image of {category}", "skin": "A dermoscopic image of {category}"}


def load(folder: str | Path, kind: str = "kvasir") -> Table:
    """One row an image, with its class as label. Split it with `by_label=True` (Med-Art: 80/20 of every class)."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    rows = []
    for path in sorted(folder.glob("*/*")):
        if path.suffix.lower() in SUFFIXES:
            category = path.parent.name.replace("-", " ").replace("_", " ")
            rows.append(Row(path, (TEMPLATES[kind].format(category=category),), label=path.parent.name))
    if not rows:
        raise DataError(f"{folder}: no class folders with images; expected {folder}/CLASS/IMAGE.jpg")
    return Table(kind, tuple(rows))
