"""Files to images and prompts: one reader a file, all of them to one table.

toy, toy:N        the embedded world (toy.py), N images
toyclasses:N      the same with a class for every image, by its polyps; clefclasses:DIR too
clef:DIR          ImageCLEFmed MEDVQA-GI
folder:DIR        images with metadata.csv or metadata.jsonl, or a .txt beside each
kvasir:DIR        class folders, captions from their names
ham10000:DIR      metadata CSV with diagnoses
skin:DIR          Med-Art's eight skin lesion classes, in folders

May import `run`; must not know networks or what is made of the images.
"""

from pathlib import Path

from nanomed.data.captioned import with_captions
from nanomed.data.table import DataError, Row, Table, padded, with_paraphrases

__all__ = ["DataError", "Row", "Table", "load", "padded", "with_captions", "with_paraphrases"]

TOY_IMAGES = 2000


def load(
    spec: str, cache: str | Path = "runs/cache", size: int = 256, problems: list[DataError] | None = None
) -> Table:
    """Read a data set named as above. The toy world is rendered for images of `size` pixels into `cache` once, and
    read back by the reader of the organisers' layout.

    The first thing wrong is raised as a DataError; with a list `problems`, rows that cannot be used are noted there
    and left out, so that the doctor (check.py) finds them all.
    """
    kind, _, where = spec.partition(":")
    if kind in ("toyclasses", "clefclasses"):
        from nanomed.data import classes

        return classes.by_polyps(load(f"{kind.removesuffix('classes')}:{where}", cache, size, problems))
    if kind == "toy":
        from nanomed.data import clef, toy

        if where and not (where.isdecimal() and int(where)):
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

    module = importlib.import_module(f"nanomed.data.{readers[kind]}")
    if readers[kind] == "classes":
        return module.load(where, kind, problems)
    return module.load(where, problems)
