"""The doctor: everything that is wrong with a data set, before a GPU starts."""

import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from nanomed.data import load
from nanomed.data.images import SUFFIXES, open_rgb
from nanomed.data.table import DataError, Table, pixel_hash

MARKERS = (  # which file says what kind of data set a bare folder is
    ("clef", ("prompt-gt.csv", "train_captions.csv", "captions.csv")),
    ("folder", ("metadata.csv", "metadata.jsonl")),
    ("ham10000", ("HAM10000_metadata.csv",)),
)
ORIENTATION = 274  # the EXIF tag
SMALL_SIDE = 64
LONG_CAPTION = 60  # words; CLIP has 77 tokens with the two at the ends, T5 under PixArt 120


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. `serious` ones would stop or spoil a training; the others are worth a look."""

    what: str
    where: str
    serious: bool = True


def recognise(path: str) -> str:
    """A data set's spec ("clef:DIR") from a spec or a bare folder."""
    if ":" in path and not Path(path).exists():
        return path
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"{path}: no such folder")
    for kind, names in MARKERS:
        if any((folder / name).is_file() for name in names):
            return f"{kind}:{path}"
    has_captions = any(folder.glob("*.txt"))
    return f"folder:{path}" if has_captions else f"kvasir:{path}"


def check(path: str, valid: str = "", cache: str | Path = "runs/cache") -> tuple[Table, list[Finding]]:
    """The table of a data set and what is wrong with it; with `valid`, also images that both sets hold."""
    spec = recognise(path)
    table = load(spec, cache)
    findings = _captions(table) + _names(table) + _orphans(spec, table)
    hashes, images = _images(table)
    findings += images
    for same in hashes.values():
        if len(same) > 1:
            findings.append(Finding("the same pixels twice", ", ".join(file.name for file in same[:4])))
    if valid:
        others, _ = _images(load(recognise(valid), cache))
        for digest in hashes.keys() & others.keys():
            findings.append(Finding("in both splits", f"{hashes[digest][0].name} and {others[digest][0].name}"))
    labels = Counter(row.label for row in table.rows if row.label)
    if labels and max(labels.values()) > 10 * min(labels.values()):
        rare, common = min(labels, key=labels.get), max(labels, key=labels.get)
        findings.append(
            Finding("classes out of balance", f"{common} {labels[common]}, {rare} {labels[rare]}", serious=False)
        )
    return table, findings


def _images(table: Table) -> tuple[dict[str, list[Path]], list[Finding]]:
    """Files by the hash of their pixels, and what is odd about single files."""
    hashes: dict[str, list[Path]] = defaultdict(list)
    findings = []
    for file in dict.fromkeys(row.file for row in table.rows):
        try:
            pixels = np.asarray(open_rgb(file))
        except DataError as error:
            findings.append(Finding("cannot be read", str(error)))
            continue
        hashes[pixel_hash(pixels)].append(file)
        with Image.open(file) as image:
            mode, turned = image.mode, image.getexif().get(ORIENTATION, 1) != 1
        if turned:
            findings.append(Finding("turned by its EXIF tag (obeyed here, not everywhere)", file.name, serious=False))
        if mode.startswith(("I", "F")):
            findings.append(Finding("more than 8 bits (scaled here, clipped elsewhere)", f"{file.name}: {mode}"))
        elif mode not in ("RGB", "L"):
            findings.append(Finding("not plain RGB", f"{file.name}: {mode}", serious=False))
        if min(pixels.shape[:2]) < SMALL_SIDE:
            findings.append(Finding("tiny", f"{file.name}: {pixels.shape[1]} x {pixels.shape[0]}", serious=False))
    return hashes, findings


def _captions(table: Table) -> list[Finding]:
    findings = []
    for row in table.rows:
        for prompt, times in Counter(row.prompts).items():
            if times > 1:
                findings.append(Finding("the same prompt twice for an image", f"{row.file.name}: {prompt[:60]}", False))
            if not prompt.strip():
                findings.append(Finding("empty caption", row.file.name))
            if len(prompt.split()) > LONG_CAPTION:
                findings.append(Finding("caption that may be cut", f"{row.file.name}: {len(prompt.split())} words"))
        if not row.prompts:
            findings.append(Finding("no caption", row.file.name))
    return findings


def _names(table: Table) -> list[Finding]:
    """Names that are one file on some disks: other case, other Unicode form, the same stem with two suffixes."""
    findings = []
    folded, stems = defaultdict(set), defaultdict(set)
    for file in {row.file for row in table.rows}:
        folded[file.parent, unicodedata.normalize("NFC", file.name).casefold()].add(file.name)
        stems[file.parent, file.stem].add(file.name)
    for same in folded.values():
        if len(same) > 1:
            findings.append(Finding("names that clash on some disks", ", ".join(sorted(same))))
    for same in stems.values():
        if len(same) > 1:
            findings.append(Finding("the same name with two suffixes", ", ".join(sorted(same)), serious=False))
    return findings


def _orphans(spec: str, table: Table) -> list[Finding]:
    """Images that lie beside the others and that no row names."""
    if spec.startswith("toy"):
        return []
    named = {row.file for row in table.rows}
    folders = {file.parent for file in named}
    lost = [p for folder in folders for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p not in named]
    return [Finding("image that no row names", path.name, serious=False) for path in sorted(lost)]
