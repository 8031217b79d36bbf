"""What every reader makes of a data set: one row an image, with all the prompts that describe it."""

import csv
import hashlib
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path


class DataError(ValueError):
    """Data that cannot be used; one line names the file, the row and what to do."""


@dataclass(frozen=True)
class Row:
    file: Path
    prompts: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = ()  # one for each prompt, or none at all
    label: str = ""  # the class, where the data set has classes


@dataclass(frozen=True)
class Table:
    name: str
    rows: tuple[Row, ...]

    def split(self, share: float, seed: int, by_label: bool = False) -> tuple["Table", "Table"]:
        """(train, valid) with `share` of the images in valid; all prompts of an image stay together.

        The choice depends on seed and file names alone, not on the order of the rows. With `by_label` every class
        gives the same share.
        """
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(row.label if by_label else "", []).append(row)
        held_out: set[Path] = set()
        for label, rows in groups.items():
            files = sorted(row.file for row in rows)
            random.Random(f"{seed} {label}").shuffle(files)
            held_out.update(files[: round(share * len(files)) if share else 0])
        if share and not held_out and len(self.rows) > 1:
            held_out = {min(row.file for row in self.rows)}
        train = tuple(row for row in self.rows if row.file not in held_out)
        valid = tuple(row for row in self.rows if row.file in held_out)
        return Table(self.name, train), Table(self.name, valid)


def with_paraphrases(table: Table, path: str | Path, strategy: str) -> Table:
    """The paper's three ways to use paraphrases (Chaichuk & Tutubalina 2024), from a CSV with Prompt and Paraphrase.

    "add"   strategy 1: every prompt twice, once in its own words and once in others
    "some"  strategy 2: the other words take the prompt's place with some probability, drawn by the data loader
    "all"   strategy 3: always

    A prompt with several paraphrases gives different images different ones.
    """
    if strategy not in ("add", "some", "all"):
        raise DataError(f"paraphrase strategy {strategy!r}: choose add, some or all")
    choices: dict[str, list[str]] = {}
    for line, record in read_csv(path):
        if not {"Prompt", "Paraphrase"} <= record.keys():
            raise DataError(f"{path}:{line}: columns Prompt and Paraphrase are needed, not {', '.join(record)}")
        choices.setdefault(record["Prompt"], []).append(record["Paraphrase"])

    def other(prompt: str, file: Path) -> str:
        if prompt not in choices:
            raise DataError(f"{path}: no paraphrase of {prompt!r}; make the file again from these prompts")
        return random.Random(f"{file.name} {prompt}").choice(choices[prompt])

    rows = []
    for row in table.rows:
        others = tuple(other(prompt, row.file) for prompt in row.prompts)
        if strategy == "add":
            rows.append(replace(row, prompts=row.prompts + others))
        else:
            rows.append(replace(row, paraphrases=others))
    return Table(table.name, tuple(rows))


def read_csv(path: str | Path) -> list[tuple[int, dict[str, str]]]:
    """(line number, record) of every row of a CSV file with a header.

    The delimiter (comma, semicolon or tab) is taken from the header; a byte-order mark, CRLF and quoted newlines are
    understood. Anything torn is a DataError that names file and line.
    """
    path = Path(path)
    text = read_text(path)
    first = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if not header or not any(header):
            raise DataError(f"{path}: the file is empty; a header line and rows are expected")
        header = [name.strip() for name in header]
        if len(set(header)) < len(header):
            raise DataError(f"{path}:1: a column name occurs twice: {', '.join(header)}")
        records, line = [], reader.line_num
        for values in reader:
            start, line = line + 1, reader.line_num
            if not values:
                continue
            if len(values) != len(header):
                raise DataError(
                    f"{path}:{start}: {len(values)} fields where the header has {len(header)}; quote fields that contain "
                    f"{delimiter!r}"
                )
            records.append((start, dict(zip(header, values))))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: {error}; check the quotes") from None
    return records


def read_text(path: str | Path) -> str:
    """A UTF-8 file, with or without a byte-order mark; a DataError for anything that is not text."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    data = path.read_bytes()
    if b"\0" in data:
        raise DataError(f"{path}: holds zero bytes, so it is no UTF-8 text; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from None


def column(record: dict[str, str], names: Sequence[str]) -> str | None:
    """The first of `names` that is a column of the record, in any case of letters."""
    lower = {name.lower(): name for name in record}
    return next((lower[name.lower()] for name in names if name.lower() in lower), None)


def pixel_hash(array) -> str:
    """A hash of decoded pixels, so that the same picture in two files is recognised."""
    return hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()
