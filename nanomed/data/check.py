"""The doctor: everything that is wrong with a data set, before a GPU starts.

Every line of the table is read by the data set's own reader and every image decoded by the policy of images.py.
"""

import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from nanomed.data import dicom, load, parts, ranges
from nanomed.data.images import FORMATS, SUFFIXES, is_dicom, listing, open_rgb
from nanomed.data.table import DataError, Row, Table, column, pixel_hash, read_csv
from nanomed.run.progress import progress

MARKERS = (  # which file says what kind of data set a bare folder is
    ("clef", ("prompt-gt.csv", "train_captions.csv", "captions.csv")),
    ("folder", ("metadata.csv", "metadata.jsonl")),
    ("ham10000", ("HAM10000_metadata.csv", "HAM10000_metadata", "HAM10000_metadata.tab")),
)
ORIENTATION = 274  # the EXIF tag
SMALL_SIDE, LARGE_SIDE = 64, 4096
UNREAD = (".gif", ".nii", ".heic", ".avif", ".jp2")  # images to people, but no format that is read here

Count = Callable[[list[str]], list[int]]  # prompts to the tokens that each needs


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. `serious` ones would stop or spoil a training; the others are worth a look."""

    what: str
    where: str
    serious: bool = True


def recognise(path: str) -> str:
    """A data set's spec ("clef:DIR") from a spec, a bare folder or a CSV file."""
    if path == "toy" or (":" in path and not Path(path).exists()):
        return path
    folder = Path(path).expanduser()
    if folder.is_file():
        return f"clef:{path}"
    if not folder.is_dir():
        raise DataError(f"{path}: no such folder")
    for kind, names in MARKERS:
        for name in names:
            if (folder / name).is_file():
                return f"{_by_columns(folder / name) or kind}:{path}"
    images = listing(folder, "**/*", [])
    has_captions = any(file.parent == folder or file.with_suffix(".txt").is_file() for file in images)
    return f"folder:{path}" if has_captions else f"kvasir:{path}"


def _by_columns(path: Path) -> str:
    """The kind that a metadata.csv's columns speak for, where its name says too little."""
    if path.name == "metadata.csv":
        try:
            header = next((record for _, record in read_csv(path, [])), {})
        except DataError:  # torn; its reader will say where
            return ""
        if {"image_id", "dx"} <= header.keys():
            return "ham10000"
        if column(header, ("filename",)) and (path.parent / "images").is_dir():
            return "clef"
    return ""


def check(
    path: str,
    valid: str = "",
    cache: str | Path = "runs/cache",
    tokens: int = 77,
    count: Count | None = None,
    span: str = "",
) -> tuple[Table, list[Finding]]:
    """The table of a data set and what is wrong with it; with `valid`, also images that both sets hold.

    tokens    captions may have this many. `count` (see `counter`) counts them; without it they are estimated
    span      the --range that deep images are read by

    Raises DataError where there is no such data set; whatever is wrong inside is a finding.
    """
    findings: list[Finding] = []
    tables = [_read(recognise(each), cache, findings) for each in (path, valid) if each]
    spans = []
    for table in tables:  # values that a number of bits does not hold are findings
        sets = 1 + max((row.part for row in table.rows), default=0)
        spans.append(ranges.of_table(table, span) if span == "auto" else [span] * sets)
    if len({len(each) for each in spans}) == 1:  # both as the first, so that an image in both is known
        spans = [spans[0]] * len(tables)
    tables = [ranges.ranged(table, each) for table, each in zip(tables, spans)]
    files = {row.file: row.range for table in tables for row in table.rows}
    hashes: dict[Path, str] = {}
    with ThreadPoolExecutor(4) as pool:
        examined = pool.map(examine, files, files.values())
        for file, (digest, found) in zip(files, progress(examined, "looking at images", "image", len(files))):
            findings += found
            if digest:
                hashes[file] = digest
    for table in tables:
        findings += _twins(table, hashes) + _captions(table, tokens, count or estimate) + _balance(table)
    if valid:
        findings += _leaks(*tables, hashes)
    return tables[0], findings + _names(files) + _orphans([recognise(each) for each in (path, valid) if each], files)


def _read(spec: str, cache: str | Path, findings: list[Finding]) -> Table:
    """The rows that can be used; every line that cannot is a finding."""
    problems: list[DataError] = []
    try:
        table = load(spec, cache, problems=problems)
    except DataError as error:
        if len(parts(spec)) > 1 or not Path(spec.partition(":")[2] or "/nowhere/").expanduser().exists():
            raise
        table = Table(spec, ())
        problems.append(error)
    findings += [Finding("cannot be used", str(problem)) for problem in problems]
    return table


def _name(file: Path) -> str:
    return f"{file.parent.name}/{file.name}"


def examine(file: Path, span: str = "") -> tuple[str, list[Finding]]:
    """The hash of an image's pixels ("" where they cannot be had), and what is odd about the file, read by `span`."""
    name, found = _name(file), []
    try:
        pixels = np.asarray(open_rgb(file, span))
        if is_dicom(file):
            return pixel_hash(pixels), _about_dicom(file) + _about_pixels(name, pixels)
        with Image.open(file, formats=FORMATS) as image:
            mode, deep = image.mode, ";16" in str(image.tile)  # as the decoder is told, before it reads
            frames = getattr(image, "n_frames", 1)
            turned = image.getexif().get(ORIENTATION, 1) != 1
            if mode.startswith(("I", "F")):
                what = f"more than 8 bits ({f'read by --range {span}' if span else 'scaled here'}, clipped elsewhere)"
                found.append(Finding(what, f"{name}: {mode}, {_range(image, span)}", serious=not span))
            elif deep:
                found.append(Finding("16 bits a colour, of which the upper 8 are read", name, serious=False))
            elif mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                least = image.convert("RGBA").getchannel("A").getextrema()[0]
                hidden = f"transparent down to {least} of 255, black there" if least < 255 else "opaque"
                found.append(Finding("not plain RGB", f"{name}: {mode}, {hidden}", serious=False))
            elif mode not in ("RGB", "L", "P"):
                found.append(Finding("not plain RGB", f"{name}: {mode}", serious=False))
    except DataError as error:
        return "", [Finding("cannot be read", str(error))]
    except Exception as error:  # what a decoder makes of damage in later frames or in what it tells of the image
        return "", [Finding("cannot be read", f"{file}: damaged image ({error}); get the file again")]
    if turned:
        found.append(Finding("turned by its EXIF tag (obeyed here, not everywhere)", name, serious=False))
    if frames > 1:
        found.append(Finding("an animation (its first frame is used)", f"{name}: {frames} frames", serious=False))
    return pixel_hash(pixels), found + _about_pixels(name, pixels)


def _about_dicom(file: Path) -> list[Finding]:
    said, found = dicom.header(file), []
    if said.burnt_in:
        found.append(Finding("says that a name may be burnt into its pixels", _name(file)))
    if said.grey and not said.windowed and said.bits > 8:
        what = f"{_name(file)}: {said.bits} bits"
        found.append(Finding("no window in it, so all of its range is shown", what, serious=False))
    return found


def _about_pixels(name: str, pixels: np.ndarray) -> list[Finding]:
    found, (height, width) = [], pixels.shape[:2]
    if min(width, height) < SMALL_SIDE:
        found.append(Finding("tiny", f"{name}: {width} x {height}", serious=False))
    if max(width, height) > LARGE_SIDE:
        found.append(Finding("huge, so slow to decode", f"{name}: {width} x {height}", serious=False))
    if (pixels == pixels[0, 0]).all():
        found.append(Finding("one color all over", f"{name}: {tuple(pixels[0, 0].tolist())}"))
    return found


def _range(image: Image.Image, span: str) -> str:
    """The values of a deep image, and a warning where 14 bits or fewer in a file of 16 come out nearly black."""
    values = np.asarray(image)
    low, high = np.nanmin(values), np.nanmax(values)
    dark = not span and image.mode != "F" and 255 < high < 65536 / 4
    return f"{low:g} to {high:g}" + (" of 65535: nearly black, say --range auto" if dark else "")


def _twins(table: Table, hashes: dict[Path, str]) -> list[Finding]:
    """Different files with the same pixels; worse, with different classes."""
    same: dict[str, list[Row]] = defaultdict(list)
    for row in table.rows:
        if row.file in hashes:
            same[hashes[row.file]].append(row)
    findings = []
    for rows in same.values():
        if len({row.file for row in rows}) > 1:
            names = ", ".join(_name(row.file) for row in rows[:4])
            torn = len({row.label for row in rows}) > 1
            findings.append(Finding("the same pixels in two classes" if torn else "the same pixels twice", names))
    return findings


def _leaks(train: Table, valid: Table, hashes: dict[Path, str]) -> list[Finding]:
    known = {hashes[row.file]: row.file for row in train.rows if row.file in hashes}
    pairs = [(known.get(hashes.get(row.file, "")), row.file) for row in valid.rows]
    return [Finding("in both splits", f"{_name(twin)} and {_name(file)}") for twin, file in pairs if twin]


def _captions(table: Table, tokens: int, count: Count) -> list[Finding]:
    findings, first = [], {}
    for row in table.rows:
        for prompt, times in Counter(row.prompts).items():
            if times > 1:
                where = f"{_name(row.file)}: {prompt[:60]}"
                findings.append(Finding("the same prompt twice for an image", where, serious=False))
            if not prompt.strip():
                findings.append(Finding("empty caption", _name(row.file)))
        for prompt in row.prompts + row.paraphrases:
            first.setdefault(prompt, row.file)
        if not row.prompts:
            findings.append(Finding("no caption", _name(row.file)))
    about = "about " if count is estimate else ""
    for (prompt, file), length in zip(first.items(), count(list(first))):
        if length > tokens:
            where = f"{_name(file)}: {about}{length} tokens, {tokens} fit: {prompt[:60]}"
            findings.append(Finding("caption that may be cut" if about else "caption that will be cut", where))
    return findings


def _balance(table: Table) -> list[Finding]:
    labels = Counter(row.label for row in table.rows if row.label)
    if labels and max(labels.values()) > 10 * min(labels.values()):
        counts = ", ".join(f"{label} {number}" for label, number in labels.most_common())
        return [Finding("classes out of balance", counts, serious=False)]
    return []


def _names(files: list[Path]) -> list[Finding]:
    """Names that are one file on some disks: other case, other Unicode form, the same stem with two suffixes."""
    findings = []
    folded, stems = defaultdict(set), defaultdict(set)
    for file in files:
        composed = unicodedata.normalize("NFC", unicodedata.normalize("NFC", file.name).casefold())
        folded[file.parent, composed].add(file.name)
        stems[file.parent, file.stem].add(file.name)
    for same in folded.values():
        if len(same) > 1:
            findings.append(Finding("names that clash on some disks", ", ".join(sorted(same))))
    for same in stems.values():
        if len(same) > 1:
            findings.append(Finding("the same name with two suffixes", ", ".join(sorted(same)), serious=False))
    return findings


def _orphans(specs: list[str], files: list[Path]) -> list[Finding]:
    """Images that lie where the others do and that no row names."""
    named, folders = set(files), {file.parent for file in files}
    for one in (one for spec in specs for one, _ in parts(spec)):
        if not one.startswith("toy"):
            root = Path(one.partition(":")[2]).expanduser()
            root = root.parent if root.is_file() else root
            folders |= {root, root / "images"}
    findings = []
    for path in sorted(path for folder in folders if folder.is_dir() for path in folder.iterdir()):
        if path in named or path.name.startswith("."):
            continue
        if path.suffix.lower() in SUFFIXES:
            findings.append(Finding("image that no row names", _name(path), serious=False))
        elif path.suffix.lower() in UNREAD:
            findings.append(Finding("a format that is not read", _name(path), serious=False))
    return findings


# ------------------------------------------------------------------------------------------------------------- tokens


def estimate(prompts: list[str]) -> list[int]:
    """About how many CLIP tokens prompts need, start and end included: a word is one and one more for every two
    letters beyond eight, a digit or a mark is one. For MEDVQA-GI's prompts this is within 4 of the true number."""
    pieces = re.compile(r"[^\W\d_]+|[^\s]")
    return [2 + sum(1 + max(0, len(piece) - 7) // 2 for piece in pieces.findall(prompt)) for prompt in prompts]


def counter(folder: str | Path) -> Count:
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
