"""Other captions for the same images: Med-Art's comparison (Guo et al. 2025, Table 3) is one data set in four wordings.

empty                                    no words at all
"An endoscopic image of {category}"      the class in a sentence: the paper's simple captions
FILE.csv                                 file_name,text of another captioner (LLaVA-NeXT, Ovis, ...)

and the data's own captions where nothing is said.
"""

from dataclasses import replace
from pathlib import Path, PurePosixPath

from nanomed.data.table import FILE_COLUMNS, TEXT_COLUMNS, DataError, Row, Table, column, read_csv


def with_captions(table: Table, captions: str) -> Table:
    """The table with one caption an image, or with several where a file has several lines for an image.

    captions   "empty", a sentence with {category} in it, or the path of a CSV. A category is the image's class: the
               column `category` of metadata.csv, or the class folder the image lies in
    """
    if captions == "empty":
        return Table(table.name, tuple(replace(row, prompts=("",), paraphrases=()) for row in table.rows))
    if "{category}" in captions:
        rows = tuple(replace(row, prompts=(_named(captions, row),), paraphrases=()) for row in table.rows)
        return Table(table.name, rows)
    if not Path(captions).is_file():
        raise DataError(f'--captions {captions}: no such file; say empty, "... {{category}} ...", or a CSV file')
    return _from_file(table, Path(captions))


def _named(sentence: str, row: Row) -> str:
    if not row.label:
        raise DataError(f"{row.file}: has no category for the caption; put images into class folders, or add a column")
    return sentence.replace("{category}", row.label.replace("-", " ").replace("_", " "))


def _from_file(table: Table, path: Path) -> Table:
    records = read_csv(path)
    if not records:
        raise DataError(f"{path}: no rows")
    name, text = column(records[0][1], FILE_COLUMNS), column(records[0][1], TEXT_COLUMNS)
    if name is None or text is None:
        raise DataError(f"{path}:1: columns file_name and text are needed, not {', '.join(records[0][1])}")
    said: dict[str, dict[PurePosixPath, list[str]]] = {}  # name without folder and suffix -> path -> captions
    for line, record in records:
        if not record[text].strip():
            raise DataError(f"{path}:{line}: an empty caption; say --captions empty to train without words")
        file = PurePosixPath(record[name])
        said.setdefault(file.stem, {}).setdefault(file, []).append(record[text].strip())

    def caption(row: Row) -> tuple[str, ...]:
        meant = [texts for file, texts in said.get(row.file.stem, {}).items() if _ends(row.file, file)]
        if len(meant) != 1:
            problem = "no caption" if not meant else "captions under more than one name"
            raise DataError(
                f"{path}: {problem} for {row.file}; the column {name} is to say its path in the data folder"
            )
        return tuple(meant[0])

    return Table(table.name, tuple(replace(row, prompts=caption(row), paraphrases=()) for row in table.rows))


def _ends(path: Path, file: PurePosixPath) -> bool:
    """Whether a path ends in the given file name with its folders, with or without its suffix."""
    written = path.as_posix() if file.suffix.lower() == path.suffix.lower() else path.with_suffix("").as_posix()
    return f"/{written}".endswith(f"/{file.as_posix()}")
