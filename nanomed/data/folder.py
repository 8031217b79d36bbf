"""A folder of images with captions: `metadata.csv` or `metadata.jsonl` with `file_name,text`, or a .txt beside each.

Other column names that people use are understood: Filename and Prompt, image and caption. Several lines of one image
are several captions of it.
"""

import json
from pathlib import Path

from nanomed.data.images import SUFFIXES, inside
from nanomed.data.table import DataError, Row, Table, column, read_csv, read_text

FILE_COLUMNS, TEXT_COLUMNS = ("file_name", "filename", "image"), ("text", "prompt", "caption")


def load(folder: str | Path) -> Table:
    """One row an image. File names are relative to the metadata file."""
    folder = Path(folder).expanduser()
    for name, read in (("metadata.csv", read_csv), ("metadata.jsonl", _read_jsonl)):
        if (folder / name).is_file():
            return Table("folder", tuple(_rows(folder, folder / name, read(folder / name))))
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    missing = [path for path in images if not path.with_suffix(".txt").is_file()]
    if not images or missing:
        raise DataError(
            f"{folder}: needs metadata.csv or metadata.jsonl with file_name and text, or a .txt beside every image"
            + (f"; {missing[0].name} has none" if missing else "")
        )
    captions = {path: read_text(path.with_suffix(".txt")).strip().splitlines() for path in images}
    return Table("folder", tuple(Row(path, tuple(lines)) for path, lines in captions.items()))


def _rows(folder: Path, path: Path, records: list[tuple[int, dict]]) -> list[Row]:
    if not records:
        raise DataError(f"{path}: no rows")
    name, text = column(records[0][1], FILE_COLUMNS), column(records[0][1], TEXT_COLUMNS)
    if name is None or text is None:
        raise DataError(f"{path}:1: columns file_name and text are needed, not {', '.join(records[0][1])}")
    captions: dict[Path, list[str]] = {}
    for line, record in records:
        if name not in record or text not in record:
            raise DataError(f"{path}:{line}: {name} or {text} is missing")
        try:
            file = inside(folder, record[name])
        except DataError as error:
            raise DataError(f"{path}:{line}: {error}") from None
        if not file.is_file():
            raise DataError(f"{path}:{line}: no image {record[name]!r} in {folder}")
        captions.setdefault(file, []).append(record[text])
    return [Row(file, tuple(texts)) for file, texts in captions.items()]


def _read_jsonl(path: Path) -> list[tuple[int, dict]]:
    records = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: not JSON ({error})") from None
            if not isinstance(record, dict):
                raise DataError(f"{path}:{number}: not an object with file_name and text")
            records.append((number, record))
    return records
