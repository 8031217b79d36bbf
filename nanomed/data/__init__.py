"""Files to images and prompts: one reader a file, all of them to one table.

toy, toy:N        the embedded world (toy.py), N images
toyclasses:N      the same with a class for every image, by its polyps; clefclasses:DIR too
clef:DIR          ImageCLEFmed MEDVQA-GI
folder:DIR        images with metadata.csv or metadata.jsonl, or a .txt beside each
kvasir:DIR        class folders, captions from their names
ham10000:DIR      metadata CSV with diagnoses
skin:DIR          Med-Art's eight skin lesion classes, in folders
folder:A+clef:B   several as one: each is split by itself, as it would be alone; classes of one name are one class
folder:A*3+...    the images of A three times in an epoch (write it in quotes, for the shell)

Images are PNG, JPEG, WebP, BMP, TIFF (images.py), and DICOM where pydicom is installed (dicom.py). Greys of more than 8
bits are read by `--range` (ranges.py).

May import `run`; must not know networks or what is made of the images.
"""

import re
from pathlib import Path

from nanomed.data import dicom
from nanomed.data.captioned import with_captions
from nanomed.data.table import DataError, Row, Table, joined, padded, with_paraphrases

__all__ = [
    "DataError", "Row", "Table", "load", "only_toy", "padded", "parts", "there", "with_captions", "with_paraphrases"
]  # fmt: skip

TOY_IMAGES = 2000


KINDS = ("toy", "toyclasses", "clef", "clefclasses", "folder", "kvasir", "ham10000", "skin")
_NEXT = re.compile(rf"\+(?=(?:{'|'.join(KINDS)})(?:[:+*]|$))")  # a plus before the name of a kind begins another set


def parts(spec: str) -> list[tuple[str, int]]:
    """(data set, weight) of each of the sets that a name joins, as in "folder:A*3+clef:B". A path that is there counts
    as it is, whatever is in its name."""
    found = []
    for one in [spec] if there(spec) else _NEXT.split(spec):
        name, times, weight = (one, "", "") if there(one) else one.rpartition("*")
        if not times:
            found.append((one, 1))
        elif re.fullmatch(r"[1-9][0-9]{0,5}", weight):
            found.append((name, int(weight)))
        else:
            raise DataError(f"--data {spec}: the weight {weight!r} of {name} is no whole number from 1 to 999999")
    return found


def there(spec: str) -> bool:
    """Whether what stands behind the kind is a path that is there."""
    where = spec.partition(":")[2]
    try:
        return bool(where) and Path(where).expanduser().exists()
    except (OSError, RuntimeError):  # too long a name, or nobody's home
        return False


def only_toy(spec: str) -> bool:
    """Whether a data set is the embedded world and nothing else."""
    return all(one.partition(":")[0] == "toy" for one, _ in parts(spec))


def load(
    spec: str, cache: str | Path = "runs/cache", size: int = 256, problems: list[DataError] | None = None
) -> Table:
    """Read a data set named as above. The toy world is rendered for images of `size` pixels into `cache` once, and
    read back by the reader of the organisers' layout.

    The first thing wrong is raised as a DataError; with a list `problems`, rows that cannot be used are noted there
    and left out, so that the doctor (check.py) finds them all.
    """
    sets = parts(spec)
    tables = [_read(one, cache, size, problems) for one, _ in sets]
    table = tables[0] if sets == [(spec, 1)] else joined(tables, [weight for _, weight in sets])
    if problems is None and not dicom.installed():  # said now, and not when the first one is needed
        for row in table.rows:
            if row.file.suffix.lower() == dicom.SUFFIX:
                dicom.header(row.file)
    return table


def _read(spec: str, cache: str | Path, size: int, problems: list[DataError] | None) -> Table:
    kind, _, where = spec.partition(":")
    if kind in ("toyclasses", "clefclasses"):
        from nanomed.data.readers import classes

        return classes.by_polyps(load(f"{kind.removesuffix('classes')}:{where}", cache, size, problems))
    if kind == "toy":
        from nanomed.data import toy
        from nanomed.data.readers import clef

        if where and not re.fullmatch("[1-9][0-9]{0,6}", where):
            raise DataError(f"{spec}: say toy:N with the number of images")
        number, side = int(where or TOY_IMAGES), max(64, min(2 * size, 256))
        folder = Path(cache) / f"toy-{number}-{side}px-{toy.version()}"
        if not (folder / "prompt-gt.csv").is_file():
            toy.write(folder, number, side)
        return clef.load(folder)
    readers = {"clef": "clef", "folder": "folder", "kvasir": "classes", "skin": "classes", "ham10000": "ham10000"}
    if kind not in readers or not where:
        names = ", ".join(f"{name}:DIR" for name in readers)
        raise DataError(f"--data {spec}: say toy, toy:N, {names}")
    import importlib

    module = importlib.import_module(f"nanomed.data.readers.{readers[kind]}")
    if readers[kind] == "classes":
        return module.load(where, kind, problems)
    return module.load(where, problems)
