"""The doctor: what is wrong with a data set, found before the training starts.

Every image is decoded by the policy of images.py, every line of the table read by its own reader; nothing is changed.
`python -m nanomed.data check PATH` prints what `check` returns.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from nanomed import data
from nanomed.data import clef
from nanomed.data.images import FORMATS, SUFFIXES, open_rgb
from nanomed.data.table import DataError, Row, Table, column, pixel_hash, read_csv

SMALL, LARGE = 64, 4096  # shorter side below, longer side above: pixels that look like a mistake
IMBALANCE = 10  # the largest class over the smallest
UNREAD = (".gif", ".dcm", ".nii", ".heic", ".avif", ".jp2")  # images to people, but no format that is read here

KINDS = {  # what can be found, and what to do about it
    "row": "mend or remove the line, or bring the image",
    "damaged": "get the file again or remove it",
    "leak": "keep one side of the split free of these images",
    "duplicate": "keep one of the files",
    "orphan": "give the image a caption or remove it; of another split of the set: say --valid",
    "name": "rename: some disks take these names for one",
    "caption": "write one: without a caption an image trains only the unconditional model",
    "repeated": "remove the repetition, or the pair counts twice",
    "long": "shorten: what does not fit is cut",
    "orientation": "turned upright here; other programs may not do so: save it upright",
    "depth": "scaled to 8 bits here; other programs clip it: save it as 8 bits",
    "alpha": "shown on black here; other programs show what lies hidden: save it without transparency",
    "mode": "converted here; other programs convert differently: save it as RGB",
    "frames": "only the first is used: save it alone",
    "blank": "an image of one color teaches nothing: remove it",
    "small": f"a shorter side below {SMALL} pixels: was it a thumbnail?",
    "large": f"a longer side above {LARGE} pixels decodes slowly: make it smaller",
    "balance": "sample or weight the classes, and report scores class by class",
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: a kind from KINDS, the file or file:line, and what was seen there."""

    kind: str
    where: str
    what: str


def check(
    path: str | Path,
    valid: str | Path = "",
    tokens: int = 77,
    count: Callable[[list[str]], list[int]] | None = None,
    progress: Callable[..., Iterable] | None = None,
) -> list[Finding]:
    """Everything found wrong with a data set, in the order of KINDS; an empty list is a clean set.

    path      `clef:DIR` and the like, or a folder or CSV whose kind is recognised
    valid     the validation set, if it is a set of its own: images in both are leaks
    tokens    captions may have this many; `count` gives the tokens of each (see `counter`), else they are estimated
    progress  wraps the images as they are examined, as tqdm does

    Raises DataError where `path` or `valid` is not there or of no known kind; the rest are findings.
    """
    specs = [recognise(each) for each in (path, valid) if str(each)]
    findings: list[Finding] = []
    tables = [_read(spec, findings) for spec in specs]
    rows = [row for table in tables for row in table.rows]

    files = list(dict.fromkeys(row.file for row in rows))
    hashes: dict[Path, str] = {}
    with ThreadPoolExecutor(4) as pool:
        examined = pool.map(examine, files)
        for file, (seen, pixels) in zip(files, progress(examined, total=len(files)) if progress else examined):
            findings += seen
            if pixels:
                hashes[file] = pixels

    for table in tables:
        findings += [*_duplicates(table, hashes), *_captions(table, tokens, count or estimate), *_balance(table)]
    if len(tables) == 2:
        findings += _leaks(*tables, hashes)
    findings += _names(files)
    for spec in specs:
        findings += _orphans(spec, set(files))
    order = list(KINDS)
    return sorted(dict.fromkeys(findings), key=lambda finding: order.index(finding.kind))


def recognise(path: str | Path) -> str:
    """The spec of a folder or CSV file by what is in it; a spec stays as it is. DataError where nothing fits."""
    kind, colon, _ = str(path).partition(":")
    if kind == "toy" or (colon and kind in ("clef", "folder", "kvasir", "ham10000", "skin")):
        return str(path)
    path = Path(path).expanduser()
    if path.is_file():
        return f"clef:{path}"
    if not path.is_dir():
        raise DataError(f"{path}: no such folder")
    if any((path / name).is_file() for name in clef.NAMES if name != "metadata.csv"):
        return f"clef:{path}"
    tables = [table for table in sorted(path.glob("*metadata*")) if table.suffix in ("", ".csv", ".tab", ".tsv")]
    if tables and tables[0].is_file():
        try:
            header = next((record for _, record in read_csv(tables[0], [])), {})
        except DataError:  # torn: the reader of folders will say where
            header = {}
        if {"image_id", "dx"} <= header.keys():
            return f"ham10000:{path}"
        if column(header, ("filename",)) and (path / "images").is_dir():
            return f"clef:{path}"
        return f"folder:{path}"
    images = [file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES]
    if (path / "metadata.jsonl").is_file() or any(file.with_suffix(".txt").is_file() for file in images):
        return f"folder:{path}"
    if any(file.parent.parent == path for file in images):
        return f"kvasir:{path}"
    raise DataError(f"{path}: no prompt-gt.csv, metadata.csv, metadata.jsonl, .txt captions or class folders")


def _read(spec: str, findings: list[Finding]) -> Table:
    """The rows that can be read; the others, and a set that cannot be read at all, become findings."""
    problems: list[DataError] = []
    try:
        table = data.load(spec, problems=problems)
    except DataError as error:
        problems.append(error)
        table = Table(spec, ())
    for problem in problems:
        where, _, what = str(problem).partition(": ")
        findings.append(Finding("row", where, what))
    return table


def examine(file: Path) -> tuple[list[Finding], str]:
    """What is odd about one image file, and the hash of its pixels ("" where they cannot be had)."""
    found: list[Finding] = []

    def note(kind: str, what: str) -> None:
        found.append(Finding(kind, str(file), what))

    try:
        array = np.asarray(open_rgb(file))
        with Image.open(file, formats=FORMATS) as raw:
            raw.verify()  # PNG's checksums, which decoding skips
        with Image.open(file, formats=FORMATS) as raw:
            mode, frames = raw.mode, getattr(raw, "n_frames", 1)
            orientation = raw.getexif().get(0x0112, 1)
            if mode in ("I", "F") or mode.startswith("I;16"):
                note("depth", _range(raw))
            elif mode in ("RGBA", "LA", "PA") or "transparency" in raw.info:
                least = raw.convert("RGBA").getchannel("A").getextrema()[0]
                if least < 255:
                    note("alpha", f"transparency down to {least} of 255")
    except DataError as error:
        return [Finding("damaged", str(file), str(error).removeprefix(f"{file}: "))], ""
    except Exception as error:  # whatever verify makes of bytes it did not expect
        return [Finding("damaged", str(file), f"fails its checksums ({error})")], ""
    height, width = array.shape[:2]
    if orientation != 1:
        note("orientation", f"EXIF orientation {orientation}")
    if mode in ("1", "CMYK", "YCbCr", "LAB"):
        note("mode", f"color mode {mode}")
    if frames > 1:
        note("frames", f"{frames} frames")
    if min(width, height) < SMALL:
        note("small", f"{width} x {height}")
    if max(width, height) > LARGE:
        note("large", f"{width} x {height}")
    if (array == array[0, 0]).all():
        note("blank", f"every pixel is {tuple(array[0, 0].tolist())}")
    return found, pixel_hash(array)


def _range(raw: Image.Image) -> str:
    values = np.asarray(raw)
    low, high = np.nanmin(values), np.nanmax(values)
    dark = raw.mode != "F" and 255 < high < 65536 / 8
    return f"mode {raw.mode}, values {low:g} to {high:g}" + (", so nearly black here: stretch it first" if dark else "")


def _duplicates(table: Table, hashes: dict[Path, str]) -> list[Finding]:
    first: dict[str, Row] = {}
    found = []
    for row in table.rows:
        twin = first.setdefault(hashes.get(row.file, str(row.file)), row)
        if twin.file != row.file:
            classes = f", but class {row.label} here and {twin.label} there" if twin.label != row.label else ""
            found.append(Finding("duplicate", str(row.file), f"same pixels as {twin.file}{classes}"))
    return found


def _leaks(train: Table, valid: Table, hashes: dict[Path, str]) -> list[Finding]:
    known = {hashes[row.file]: row.file for row in train.rows if row.file in hashes}
    found = []
    for row in valid.rows:
        if twin := known.get(hashes.get(row.file, "")):
            same = "also trained on" if twin == row.file else f"same pixels as {twin}, which is trained on"
            found.append(Finding("leak", str(row.file), same))
    return found


def _captions(table: Table, tokens: int, count: Callable[[list[str]], list[int]]) -> list[Finding]:
    found, first = [], {}
    for row in table.rows:
        if not row.prompts:
            found.append(Finding("caption", str(row.file), "no caption"))
        for prompt, times in Counter(row.prompts).items():
            if not prompt.strip():
                found.append(Finding("caption", str(row.file), "an empty caption"))
            if times > 1:
                found.append(Finding("repeated", str(row.file), f"{times} times: {_short(prompt)}"))
        for prompt in row.prompts + row.paraphrases:
            first.setdefault(prompt, row.file)
    about = "about " if count is estimate else ""
    for (prompt, file), length in zip(first.items(), count(list(first))):
        if length > tokens:
            what = f"{about}{length} tokens, {tokens} fit: {_short(prompt)}"
            found.append(Finding("long", str(file), what))
    return found


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 60 else prompt[:57] + "...")


def _balance(table: Table) -> list[Finding]:
    counts = Counter(row.label for row in table.rows).most_common()
    if len(counts) < 2 or counts[0][1] < IMBALANCE * counts[-1][1]:
        return []
    return [Finding("balance", table.name, ", ".join(f"{label} {number}" for label, number in counts))]


def _names(files: list[Path]) -> list[Finding]:
    """Names that differ only in case or Unicode form, or that share their stem."""

    def plain(text: str) -> str:
        return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())

    def key(file: Path) -> tuple[str, str]:
        return str(file.parent), plain(file.stem)

    found = []
    for _, group in groupby(sorted(files, key=key), key):
        twin, *others = group
        for other in others:
            how = "in case or Unicode form" if plain(other.name) == plain(twin.name) else "in the suffix"
            found.append(Finding("name", str(other), f"differs from {ascii(twin.name)} only {how}"))
    return found


def _orphans(spec: str, used: set[Path]) -> list[Finding]:
    """Images beside those of the table which no row mentions."""
    folders = {file.parent for file in used}
    root = Path(spec.partition(":")[2]).expanduser()
    if not spec.startswith("toy"):
        root = root.parent if root.is_file() else root
        folders |= {root, root / "images"}
    found = []
    for folder in sorted(folders):
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            suffix = file.suffix.lower()
            if file.name.startswith(".") or file in used or suffix not in (*SUFFIXES, *UNREAD):
                continue
            found.append(Finding("orphan", str(file), "no row" if suffix in SUFFIXES else f"{suffix} is not read"))
    return found


# ------------------------------------------------------------------------------------------------------------- tokens


def estimate(prompts: list[str]) -> list[int]:
    """About how many CLIP tokens prompts need, start and end included: a word is one and one more for every two
    letters beyond eight, a digit or a mark is one. For MEDVQA-GI's prompts this is within 4 of the true number."""
    pieces = re.compile(r"[^\W\d_]+|[^\s]")
    return [2 + sum(1 + max(0, len(piece) - 7) // 2 for piece in pieces.findall(prompt)) for prompt in prompts]


def counter(folder: str | Path) -> Callable[[list[str]], list[int]]:
    """Counts tokens, special ones included, with a folder's tokenizer.json or CLIP's vocab.json and merges.txt."""
    folder = Path(folder).expanduser()
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer, special = Tokenizer.from_file(str(folder / "tokenizer.json")), 0
            tokenizer.no_truncation()
            tokenizer.no_padding()
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            tokenizer, special = _clip(folder), 2
        else:
            raise DataError(f"{folder}: neither tokenizer.json nor vocab.json and merges.txt is there")
    except DataError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise DataError(f"{folder}: damaged tokenizer files ({error})") from None
    return lambda prompts: [len(encoding.ids) + special for encoding in tokenizer.encode_batch(prompts)]


def _clip(folder: Path) -> Tokenizer:
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer
