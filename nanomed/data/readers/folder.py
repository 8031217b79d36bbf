"""A folder of images with captions: `metadata.csv` or `metadata.jsonl` with `file_name,text`, or a .txt beside each.

Other column names that people use are understood: Filename and Prompt, image and caption. Several lines of one image
are several captions of it. An image's class is the column `category`, else the folder that it lies in.
"""

import json
import re
from pathlib import Path

from nanomed.data.images import find, listing
from nanomed.data.table import (
    FILE_COLUMNS,
    TEXT_COLUMNS,
    DataError,
    Row,
    Table,
    column,
    deeper,
    read_csv,
    read_text,
    report,
)

METADATA = ("metadata.csv", "metadata.jsonl")
LABEL_COLUMNS = ("category", "label", "class")


def load(folder: str | Path, problems: list[DataError] | None = None) -> Table:
    """One row an image. File names are relative to the metadata file.

    With `problems`, lines and images that cannot be used are noted there instead of raised, and left out.
    """
    folder = Path(folder).expanduser()
    for name, read in zip(METADATA, (read_csv, _read_jsonl)):
        path = folder / name
        if path.is_file():
            return Table("folder", tuple(_rows(folder, path, read(path, problems), problems)))
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    images = listing(folder, "**/*", problems)
    if not images:
        raise DataError(f"{folder}: no images{deeper(folder, METADATA)}")
    if not any(path.with_suffix(".txt").is_file() for path in images):
        raise DataError(
            f"{folder}: needs metadata.csv or metadata.jsonl with file_name and text, or a .txt beside every image"
            + deeper(folder, METADATA)
        )
    rows = []
    for path in images:
        sidecar = path.with_suffix(".txt")
        try:
            lines = [line.strip() for line in re.split(r"[\r\n]+", read_text(sidecar))]
        except DataError as error:
            report(DataError(f"{error}; {path.name} needs it for its caption"), problems)
            lines = []
        rows.append(Row(path, tuple(filter(None, lines)), label=_folder(path, folder)))
    return Table("folder", tuple(rows))


def _rows(folder: Path, path: Path, records: list[tuple[int, dict]], problems: list[DataError] | None) -> list[Row]:
    if not records:
        raise DataError(f"{path}: no rows")
    name, text = column(records[0][1], FILE_COLUMNS), column(records[0][1], TEXT_COLUMNS)
    if name is None or text is None:
        raise DataError(f"{path}:1: columns file_name and text are needed, not {', '.join(records[0][1])}")
    captions: dict[Path, list[str]] = {}
    labels: dict[Path, str] = {}
    label = column(records[0][1], LABEL_COLUMNS)
    for line, record in records:
        try:
            texts = record.get(text)
            texts = texts if isinstance(texts, list) else [texts]  # JSON may hold several captions
            if not isinstance(record.get(name), str) or not all(isinstance(caption, str) for caption in texts):
                raise DataError(f"{name} or {text} is missing or no text")
            file = find(record[name], (folder,))
            captions.setdefault(file, []).extend(texts)
            labels.setdefault(file, str(record[label]) if label in record else _folder(file, folder))
        except DataError as error:
            report(DataError(f"{path}:{line}: {error}"), problems)
    return [Row(file, tuple(texts), label=labels[file]) for file, texts in captions.items()]


def _folder(file: Path, root: Path) -> str:
    """The folder below the root that a file lies in: its class, in data sets that are laid out so."""
    return "" if file.parent == root else file.parent.name


def _read_jsonl(path: Path, problems: list[DataError] | None) -> list[tuple[int, dict]]:
    records = []
    for number, line in enumerate(re.split(r"\r\n|\r|\n", read_text(path)), 1):
        if line.strip():
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError("no object with file_name and text")
                records.append((number, record))
            except (ValueError, RecursionError) as error:
                report(DataError(f"{path}:{number}: not JSON as expected ({error})"), problems)
    return records
