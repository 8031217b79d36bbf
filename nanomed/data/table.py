"""What every reader makes of a data set: one row an image, with all the prompts that describe it."""

import codecs
import csv
import hashlib
import io
import json
import random
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from nanomed.run import files
from nanomed.run.progress import progress

FILE_COLUMNS, TEXT_COLUMNS = ("file_name", "filename", "image"), ("text", "prompt", "caption")  # as people name them


class DataError(ValueError):
    """Data that cannot be used; one line names the file, the row and what to do."""


@dataclass(frozen=True)
class Row:
    """An image and what is said of it."""

    file: Path
    prompts: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = ()  # one for each prompt, or none at all
    label: str = ""  # the class, where the data set has classes
    group: str = ""  # images that a split keeps together, such as those of one lesion; empty: the image alone
    pad: bool = False  # whether the image gets a black border that makes it square, before all else
    part: int = 0  # which of several data sets it is of
    weight: int = 1  # how often it comes in an epoch
    range: str = ""  # which of its values are black and white (ranges.py); empty: the policy of images.py


@dataclass(frozen=True)
class Table:
    """Images of a data set, or of several."""

    name: str
    rows: tuple[Row, ...]

    def split(self, share: float, seed: int, by_label: bool | None = False) -> tuple["Table", "Table"]:
        """(train, valid) with `share` of the images in valid; all prompts of an image stay together, and all images
        of a group. Of one image, or one group, none is held out; of two or more at least one, and at least one is not.

        The choice depends on seed and names alone, not on the order of the rows. With `by_label` every class gives
        the same share; None: where the first image has a class. Of several data sets each is split by itself, as it
        would be alone, and images that are held out come once.
        """
        if len(parts := dict.fromkeys(row.part for row in self.rows)) > 1:
            return self._split_each(parts, share, seed, by_label)
        if not 0 <= share < 1:
            raise DataError(f"a share of {share} held out: it must be at least 0 and less than 1")
        if by_label is None:
            by_label = bool(self.rows and self.rows[0].label)
        held_out = self._chosen(share, seed, by_label)
        if share and not held_out and len(self.rows) > 1:
            held_out = self._unit(min)
        if held_out and len(held_out) == len(self.rows):  # something must be left to train on, if it is only one image
            held_out -= self._unit(max)
        train = tuple(row for row in self.rows if row.file not in held_out)
        valid = tuple(replace(row, weight=1) for row in self.rows if row.file in held_out)
        return Table(self.name, train), Table(self.name, valid)

    def _split_each(self, parts: Iterable[int], share: float, seed: int, by_label: bool | None):
        sets = (Table(self.name, tuple(row for row in self.rows if row.part == part)) for part in parts)
        train, valid = zip(*(table.split(share, seed, by_label) for table in sets))
        return tuple(Table(self.name, tuple(row for half in halves for row in half.rows)) for halves in (train, valid))

    def _chosen(self, share: float, seed: int, by_label: bool) -> set[Path]:
        """The files of a share of the images, or of every class; groups are whole."""
        held_out: set[Path] = set()
        classes: dict[str, dict[str, list[Path]]] = {}
        for row in self.rows:
            units = classes.setdefault(row.label if by_label else "", {})
            units.setdefault(row.group or row.file.as_posix(), []).append(row.file)
        for label, units in classes.items():
            names, wanted, taken = sorted(units), round(share * sum(map(len, units.values()))), 0
            random.Random(f"{seed} {label}").shuffle(names)
            for name in names:
                if taken >= wanted:
                    break
                held_out.update(units[name])
                taken += len(units[name])
        return held_out

    @cached_property
    def sums(self) -> list[str]:
        """SHA-256 of the file of every row; read once, for the run's own hash and for the caches of all stages."""
        with ThreadPoolExecutor(8) as pool:  # hashing leaves the interpreter free
            digests = pool.map(lambda row: files.sha256(row.file), self.rows)
            return list(progress(digests, "hashing images", "image", len(self.rows)))

    @property
    def digest(self) -> str:
        """A hash of all that can be trained on, in its order: files by name and bytes, prompts and classes. Where they
        lie does not count."""
        rows = [[row.file.name, digest, row.prompts, row.paraphrases, row.label, row.pad, *_more(row)]
                for row, digest in zip(self.rows, self.sums)]  # fmt: skip
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def _unit(self, choose) -> set[Path]:
        """The first or last image by name, with all of its group."""
        one = choose(self.rows, key=lambda row: row.file)
        return {row.file for row in self.rows if row is one or row.group == one.group != ""}


def _more(row: Row) -> list[str | int]:
    """What the digest says of a row besides: nothing of one that is read as it is and comes once."""
    return [*filter(None, [row.range]), *([row.weight] if row.weight > 1 else [])]


def joined(tables: Sequence[Table], weights: Sequence[int]) -> Table:
    """Several data sets as one, whose images come so many times in an epoch. Groups of one name in two sets stay two;
    classes of one name are one. Raises DataError for an image that two of them hold."""
    rows, known = [], set()
    for part, (table, weight) in enumerate(zip(tables, weights)):
        for row in table.rows:
            if (file := row.file.resolve()) in known:
                raise DataError(f"{row.file}: is in two of the data sets {' and '.join(one.name for one in tables)}")
            known.add(file)
            group = f"{row.group} of set {part + 1}" if row.group and len(tables) > 1 else row.group
            rows.append(replace(row, part=part, weight=weight, group=group))
    return Table("+".join(table.name for table in tables), tuple(rows))


def padded(table: Table) -> Table:
    """The table with all images padded to squares."""
    return replace(table, rows=tuple(replace(row, pad=True) for row in table.rows))


def with_paraphrases(table: Table, path: str | Path, strategy: str) -> Table:
    """The paper's three ways to use paraphrases (Chaichuk & Tutubalina 2024), from a CSV with Prompt and Paraphrase.

    "add"   strategy 1: every prompt twice, once in its own words and once in others
    "some"  strategy 2: the other words take the prompt's place with some probability, drawn by the data loader
    "all"   strategy 3: always

    A prompt with several paraphrases gives different images different ones. One whose paraphrase is itself, as the
    file says where no rule covers it, keeps its own words, and stands there once.
    """
    if strategy not in ("add", "some", "all"):
        raise DataError(f"paraphrase strategy {strategy!r}: choose add, some or all")
    choices: dict[str, list[str]] = {}
    for line, record in read_csv(path):
        prompt, paraphrase = column(record, ("Prompt",)), column(record, ("Paraphrase",))
        if prompt is None or paraphrase is None:
            raise DataError(f"{path}:1: columns Prompt and Paraphrase are needed, not {', '.join(record)}")
        if record[prompt] and not record[paraphrase].strip():
            raise DataError(f"{path}:{line}: an empty paraphrase would train without a condition; write one")
        choices.setdefault(record[prompt], []).append(record[paraphrase])

    def other(prompt: str, file: Path) -> str:
        if not prompt:
            return ""
        if prompt not in choices:
            raise DataError(f"{path}: no paraphrase of {prompt!r}; make the file again from these prompts")
        return random.Random(f"{file.name} {prompt}").choice(choices[prompt])

    rows = []
    for row in table.rows:
        others = tuple(other(prompt, row.file) for prompt in row.prompts)
        if strategy == "add":
            added = tuple(text for text, prompt in zip(others, row.prompts) if text != prompt or not prompt)
            rows.append(replace(row, prompts=row.prompts + added))
        else:
            rows.append(replace(row, paraphrases=others))
    return Table(table.name, tuple(rows))


def report(error: DataError, problems: list[DataError] | None) -> None:
    """Raise an error; or, for a caller that wants to know them all (the doctor), note it and go on."""
    if problems is None:
        raise error
    problems.append(error)


def read_csv(path: str | Path, problems: list[DataError] | None = None) -> list[tuple[int, dict[str, str]]]:
    """(line number, record) of every row of a CSV file with a header.

    The delimiter (comma, semicolon or tab) is taken from the header; a byte-order mark, CRLF and quoted newlines are
    understood. Anything torn is a DataError that names file and line; with `problems`, rows of the wrong length are
    noted there and left out.
    """
    path = Path(path)
    text = read_text(path)
    header_line = re.split(r"[\r\n]", text, maxsplit=1)[0]
    delimiter = max(",;\t", key=re.sub('"[^"]*"', "", header_line).count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 0
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
                torn = f"{len(values)} fields where the header has {len(header)}"
                report(DataError(f"{path}:{start}: {torn}; quote fields that contain {delimiter!r}"), problems)
                continue
            records.append((start, dict(zip(header, values))))
    except csv.Error as error:
        raise DataError(f"{path}:{line + 1}: {error}; check the quotes from here on") from None
    return records


def read_text(path: str | Path) -> str:
    """A text file: UTF-8, with or without a byte-order mark, UTF-16 with one, or western letters as Windows has them
    (`_western`); a DataError, with the line where there is one, for anything else."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            text = data.decode("utf-16")
        except UnicodeDecodeError:
            raise DataError(f"{path}: begins as UTF-16 and is damaged; save it as UTF-8") from None
        if "\0" in text:
            raise DataError(f"{path}: holds zero bytes, so it is no text; save it as UTF-8")
        return text
    if b"\0" in data:
        raise DataError(f"{path}: holds zero bytes, so it is no UTF-8 text; save it as UTF-8")
    marked = data.startswith(codecs.BOM_UTF8)
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if marked:
            raise _not_utf8(path, data, error.start) from None
    return _western(path, data)


# The letters of languages beside a to z, those of words that they borrow included: a text has them from one of these.
WESTERN = (
    "äöüßéèàêçôâ",  # German
    "àâæçéèêëîïôœùûü",  # French
    "áàçéèíïñóòúü",  # Spanish, Catalan
    "áàâãçéêíóôõúü",  # Portuguese
    "àèéìòù",  # Italian
    "åäöæøéüàèê",  # Danish, Norwegian, Swedish, Finnish
    "áäçéèëêíïóöôúûü",  # Dutch
)
EASTERN = (  # the code page of others, and some of the letters that a text in this language has at once
    ("cp1250", "áčďéěíňóřšťúůýž", "áíěšřž"),  # Czech
    ("cp1250", "áäčďéíľňóôšťúýž", "áíľšž"),  # Slovak
    ("cp1250", "ąćęłńóśźż", "ąęłśż"),  # Polish
    ("cp1250", "áéíóöőúüű", "á"),  # Hungarian
    ("cp1250", "čćđšž", "čšž"),  # Croatian, Slovene
    ("cp1250", "ăâîşţ", "ă"),  # Romanian
    ("cp1257", "ąčęėįšųūž", "ėš"),  # Lithuanian
    ("cp1257", "āčēģīķļņšūž", "āī"),  # Latvian
)


def _western(path: Path, data: bytes) -> str:
    """Text in one byte a letter, as Excel and Notepad write it on Windows in western Europe and the Americas (cp1252).

    Nothing in such a file says what its bytes mean. It is read where all of its letters are those of one western
    language; a DataError where they could be of an eastern one as well (e with a grave accent is c with a caron in
    cp1250, but the umlauts of German and the acute accents of Spanish are the same everywhere), where a word has no
    plain letter, as in Cyrillic and Greek, and where a sign stands within a word, as a Mac's and DOS's letters do here.
    """
    text = data.decode("cp1252", "replace")
    plain = re.sub(rb"(?<![A-Za-z\x80-\xff])([cdm]?m)\xb3(?![A-Za-z\x80-\xff])", rb"\1 ", data)  # mm3 is no Polish word
    if "\ufffd" in text:
        raise _not_utf8(path, data, text.index("\ufffd"))
    for word in re.finditer(r"[A-Za-z\x80-\uffff]+", text):
        letters = [_is_letter(letter) for letter in word[0]]
        if sum(letters) > 1 and not re.search("[A-Za-z]", word[0]):
            raise _not_utf8(path, data, word.start())
        within = range(letters.index(True), len(letters) - letters[::-1].index(True)) if any(letters) else ()
        if odd := [i for i in within if not letters[i] and word[0][i] not in "\u2019\xb7\xad"]:
            raise _not_utf8(path, data, word.start() + odd[0])
    if not any(_accents(text) <= {*known} for known in WESTERN):
        strange = next(i for i, letter in enumerate(text) if _is_letter(letter) and not letter.isascii())
        raise _not_utf8(path, data, strange)
    for page, known, often in EASTERN:
        other = plain.decode(page, "replace")
        if _accents(other) <= {*known} and _accents(other) & {*often}:
            for i, (one, two) in enumerate(zip(text, other)):
                if one != two and _is_letter(two):
                    raise _not_utf8(path, data, i, f", and byte {data[i]:#x} could mean {one} or {two}")
    return text


def _is_letter(character: str) -> bool:
    return character.isalpha() and character not in "\xaa\xba\xb5"  # of ordinals, and micro


def _accents(text: str) -> set[str]:
    return {letter for letter in text.lower() if _is_letter(letter) and not letter.isascii()}


def _not_utf8(path: Path, data: bytes, place: int, why: str = "") -> DataError:
    line = data[:place].count(b"\n") + 1
    return DataError(f"{path}:{line}: not UTF-8{why}; save the file as UTF-8")


def column(record: dict[str, str], names: Sequence[str]) -> str | None:
    """The first of `names` that is a column of the record, in any case of letters."""
    lower = {name.lower(): name for name in record}
    return next((lower[name.lower()] for name in names if name.lower() in lower), None)


def deeper(folder: Path, names: Sequence[str]) -> str:
    """The end of a message about a folder without a data set: where one lies just below it, if one does."""
    found = sorted(path for name in names for path in folder.glob(f"*/{name}") if path.is_file())
    if not found:
        return ""
    others = f" (and {len(found) - 1} more like it)" if len(found) > 1 else ""
    return f"; {found[0]} lies one folder deeper{others}: give {found[0].parent}"


def pixel_hash(array) -> str:
    """A hash of decoded pixels, so that the same picture in two files is recognised."""
    return hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()
