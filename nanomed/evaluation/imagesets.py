"""Sets of images to be measured: where they are, what is known of each, and what is wrong with them.

A set is named by a folder (its images, those in its `images/`, or those in its class folders), by a data set as
train.py takes it (clef:DIR, kvasir:DIR, toy:N, ...), or by "toy", fresh scenes of the embedded world. Every image is
decoded once, whole, before a network sees any: damage is found by name, and the colours are measured on the way.
"""

import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nanomed import data
from nanomed.data import dicom, ranges, toy
from nanomed.data import images as decoding
from nanomed.data.images import FORMATS, SUFFIXES, listing, open_rgb, squash
from nanomed.data.table import DataError, column, read_csv
from nanomed.evaluation.table import one_line
from nanomed.metrics import colour, memorisation
from nanomed.metrics.colour import Colours
from nanomed.run import files
from nanomed.run.cache import Cache
from nanomed.run.progress import progress
from nanomed.run.ranks import ALONE, Ranks

KINDS = ("damaged", "in colour", "greyscale", "transparent", "16 bit or float", "CMYK or of another mode")
LOSSY = ("JPEG", "WEBP")
FRESH = 10_000_000  # first of the toy scenes that evaluations draw; models train on scenes from 0 upwards


@dataclass(frozen=True)
class ImageSet:
    """Images and what is known of each, row by row."""

    name: str  # what messages and tables call it
    sources: tuple[Path | int, ...]  # files, or numbers of toy scenes
    prompts: tuple[tuple[str, ...], ...] = ()  # of every image; empty where they are not known
    labels: tuple[str, ...] = ()  # the class of every image; empty where there are none
    side: int = 0  # toy scenes are rendered at this size; files are squashed to it, 0 = left as they are
    parts: tuple["ImageSet", ...] = ()  # of a union
    ranges: tuple[str, ...] = ()  # of every image, which values are black and white (data/ranges.py); empty: of none
    hashes: tuple[str, ...] = field(default=(), compare=False)  # of everything that decides the pixels

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def digest(self) -> str:
        """A hash of all the images together."""
        return hashlib.sha256("\n".join(self.hashes).encode()).hexdigest()

    def image(self, row: int) -> np.ndarray:
        """uint8 (H, W, 3); a DataError where the file is damaged."""
        source = self.sources[row]
        if isinstance(source, int):
            return toy.render(toy.scene(source), self.side)
        opened = open_rgb(source, self.range(row))
        return squash(opened, self.side) if self.side else np.asarray(opened)

    def range(self, row: int) -> str:
        """Which values of an image are black and white; "": as it is read without --range."""
        return self.ranges[row] if self.ranges else ""

    def title(self, row: int) -> str:
        """The file's name, with its class folder where it lies in one."""
        source = self.sources[row]
        if isinstance(source, int):
            return f"scene {source}"
        return f"{source.parent.name}/{source.name}" if self.labels else source.name

    def keep(self, rows: Sequence[int]) -> "ImageSet":
        """The set of some of the rows."""

        def of(values: tuple) -> tuple:
            return tuple(values[row] for row in rows) if values else ()

        return replace(self, sources=of(self.sources), prompts=of(self.prompts), labels=of(self.labels),
                       ranges=of(self.ranges), hashes=of(self.hashes))  # fmt: skip


def find(spec: str, name: str = "", limit: int = 0, cache: str = "runs/cache", side: int = 0,
         span: str = "") -> ImageSet:  # fmt: skip
    """The set that `spec` names: a folder or a data set, its deep images read by the --range `span`, of which auto is
    decided for all of it. Raises DataError for what is not there or has no images."""
    if re.match(rf"({'|'.join(data.KINDS)})[:+*]", spec) and not Path(spec).exists():
        if weighted := [f"{one}*{weight}" for one, weight in data.parts(spec) if weight > 1]:
            raise DataError(f"{spec}: the weight of {weighted[0]} is for training; measured are images, each once")
        table = data.load(spec, cache, side or 256)
        return of_table(ranges.ranged(table, ranges.of_table(table, span)), name or spec, limit, side)
    root = Path(spec).expanduser()
    if root.is_file():
        raise DataError(f"{spec}: is a file; say a folder of images, or a data set such as clef:DIR")
    if not root.is_dir():
        raise DataError(f"{spec}: no such folder")
    found, labels = listing(root, "*"), ()
    if not found and (root / "images").is_dir():
        found = listing(root / "images", "*")
    if not found:
        found = listing(root, "*/*")
        labels = tuple(path.parent.name for path in found)
    if not found:
        raise DataError(f"{root}: no images ({', '.join(SUFFIXES)}), in it, in images/ or in class folders")
    stop, spans = limit or len(found), ranges.of_files(found, span)
    return hashed(ImageSet(name or spec, tuple(found[:stop]), labels=labels[:stop], side=side, ranges=spans[:stop]))


def of_table(table: data.Table, name: str, limit: int = 0, side: int = 0) -> ImageSet:
    """The images of a data set, with their prompts and classes."""
    rows = table.rows[: limit or len(table.rows)]
    labels = tuple(row.label for row in rows) if rows and all(row.label for row in rows) else ()
    spans = tuple(row.range for row in rows) if any(row.range for row in rows) else ()
    prompts = tuple(row.prompts for row in rows)
    return hashed(ImageSet(name, tuple(row.file for row in rows), prompts, labels, side, ranges=spans))


def of_files(paths: Sequence[Path], name: str, spans: Sequence[str] = ()) -> ImageSet:
    """A set of files, in their order, with the range of each."""
    return hashed(ImageSet(name, tuple(paths), ranges=tuple(spans)))


def side_of(images: ImageSet) -> int:
    """The height of the first image that can be read."""
    for row in range(len(images)):
        try:
            return len(images.image(row))
        except DataError:
            continue
    raise DataError(f"{images.name}: none of the {len(images)} images can be read")


def fresh_scenes(count: int, side: int) -> ImageSet:
    """Scenes of the embedded world that no training set holds, with their prompts."""
    numbers = tuple(range(FRESH, FRESH + count))
    prompts = tuple(tuple(toy.prompts(toy.scene(number))) for number in numbers)
    return hashed(ImageSet("toy", numbers, prompts, side=side))


def union(name: str, sets: Sequence[ImageSet]) -> ImageSet:
    """Several sets as one; what only some of them know is dropped."""
    known = {
        what: tuple(value for part in sets for value in getattr(part, what))
        if all(len(getattr(part, what)) == len(part) for part in sets)
        else ()
        for what in ("sources", "prompts", "labels", "hashes")
    }
    spans = tuple(part.range(row) for part in sets for row in range(len(part))) if any(p.ranges for p in sets) else ()
    return ImageSet(name, side=sets[0].side, parts=tuple(sets), ranges=spans, **known)


def hashed(images: ImageSet) -> ImageSet:
    """The set with the hashes of its images: of a file's bytes, or of a scene and the program that draws it."""

    def digest(row: int) -> str:
        source, span = images.sources[row], images.range(row)
        if isinstance(source, int):
            return f"toy {toy.version()} {source} {images.side}"
        try:
            squashed, by = f" squash {images.side}" * bool(images.side), f" range {span}" * bool(span)
            return files.sha256(source) + squashed + by
        except OSError as error:
            raise DataError(f"{source}: cannot be read ({error.strerror})") from None

    with ThreadPoolExecutor(8) as pool:  # hashing leaves the interpreter free
        digests = progress(pool.map(digest, range(len(images))), f"hashing {images.name}", "image", len(images))
        return replace(images, hashes=tuple(digests))


# ------------------------------------------------------------------------------------------- what goes with an image


def with_prompts(images: ImageSet, folder: str, prompts: str) -> ImageSet:
    """The set with its prompts: row i of the file `prompts` for the i-th image, else those of a manifest.jsonl that
    sample.py left in `folder`. A column `label` of the file gives the classes. Raises DataError where they do not
    match."""
    manifest = Path(folder) / "manifest.jsonl"
    if prompts:
        from nanomed.data.prompts import read_prompts

        texts, labels = read_prompts(prompts), images.labels
        if len(texts) < len(images) or (len(texts) > len(images) and not _limited(images, folder)):
            raise DataError(f"{prompts}: {len(texts):,} prompts for the {len(images):,} images in {folder}")
        if Path(prompts).suffix.lower() in (".csv", ".tsv"):
            records = [record for _, record in read_csv(prompts)]
            if name := column(records[0], ("label", "class")):
                labels = tuple(record[name].strip() for record in records[: len(images)])
        return replace(images, prompts=tuple((text,) for text in texts[: len(images)]), labels=labels)
    if manifest.is_file():
        known = {}
        for number, line in enumerate(manifest.read_text(encoding="utf-8").splitlines(), 1):
            try:
                entry = json.loads(line)
                known[entry["file"]] = entry["prompt"]
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{manifest}:{number}: no object with file and prompt; draw the images again") from None
        if unknown := [path.name for path in images.sources if path.name not in known]:
            raise DataError(f"{manifest}: knows no {one_line(unknown)}; give the prompts with --prompts FILE")
        return replace(images, prompts=tuple((known[path.name],) for path in images.sources))
    return images


def _limited(images: ImageSet, folder: str) -> bool:
    return len(find(folder).sources) > len(images)


# ------------------------------------------------------------------------------------------------- decoding them all


@dataclass(frozen=True)
class Survey:
    """What decoding every image of a set once has shown."""

    columns: dict[str, Tensor]

    def colours(self) -> Colours:
        """Their colours, as `nanomed.metrics.colour.measure` counts them."""
        c = {name: self.columns[name].numpy() for name in ("means", "stds", "channels", "saturation")}
        return Colours(c["means"], c["stds"], *(c[name].mean(0, dtype=float) for name in ("channels", "saturation")))


def survey(images: ImageSet, cache: str | Path, ranks: Ranks = ALONE) -> Survey:
    """Decode every image once, on all ranks, and keep what was seen in `cache` under the images' hashes."""
    if images.parts:
        parts = [survey(part, cache, ranks).columns for part in images.parts]
        return Survey({name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def make(rows: list[int]) -> dict[str, Tensor]:
        with ThreadPoolExecutor(8) as pool:
            seen = list(pool.map(lambda row: _look(images, row), rows))
        return {name: torch.stack([one[name] for one in seen]) for name in seen[0]}

    key = ["survey", _version(), list(images.hashes)]
    columns = Cache(Path(cache) / "survey", ranks).read(key, len(images), make, 64, f"{images.name}, pixels")
    return Survey({name: torch.cat([shard[name] for shard in columns.shards]) for name in columns.shards[0]})


@functools.cache
def _version() -> str:
    """Changes when the code that looks does."""
    makers = (__file__, decoding.__file__, colour.__file__, memorisation.__file__)
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in makers)).hexdigest()[:16]


def _look(images: ImageSet, row: int) -> dict[str, Tensor]:
    try:
        image = images.image(row)
        kind, lossy, size = _kind(images.sources[row], image)
        colours, small = colour.measure([image]), memorisation.pixels([image])[0]
    except ValueError:  # a DataError, or an image of one pixel
        kind, lossy, size = 0, False, (0, 0)
        colours = Colours(np.zeros((1, 3)), np.zeros((1, 3)), np.zeros((3, 256)), np.zeros(64))
        small = torch.zeros(3, memorisation.SIDE, memorisation.SIDE)
    return {
        "kind": torch.tensor(kind, dtype=torch.uint8),
        "lossy": torch.tensor(lossy),
        "size": torch.tensor(size, dtype=torch.int32),  # width and height of the file
        "means": torch.from_numpy(colours.means[0]),  # (3,)
        "stds": torch.from_numpy(colours.stds[0]),  # (3,)
        "channels": torch.from_numpy(colours.channels).float(),  # (3, 256)
        "saturation": torch.from_numpy(colours.saturation).float(),  # (64,)
        "small": small.to(torch.uint8),  # (3, 16, 16), what memorisation compares
    }


def _kind(source: Path | int, image: np.ndarray) -> tuple[int, bool, tuple[int, int]]:
    if isinstance(source, int):
        return 1, False, image.shape[1::-1]
    if decoding.is_dicom(source):
        said = dicom.header(source)
        return KINDS.index("greyscale" if said.grey else "in colour"), False, said.size
    with Image.open(source, formats=FORMATS) as opened:  # the header alone; the pixels were read before
        mode, form, size, transparent = opened.mode, opened.format, opened.size, "transparency" in opened.info
    if mode.startswith("I") or mode == "F":
        kind = KINDS.index("16 bit or float")
    elif transparent or mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        kind = KINDS.index("transparent")
    elif mode in ("1", "L") or (image[..., 0] == image[..., 1]).all() and (image[..., 1] == image[..., 2]).all():
        kind = KINDS.index("greyscale")
    else:
        kind = KINDS.index("in colour" if mode in ("RGB", "P") else "CMYK or of another mode")
    return kind, form in LOSSY, size


def sound(images: ImageSet, found: Survey, skip_bad: bool) -> tuple[ImageSet, Survey, list[str]]:
    """The set without its damaged images, its survey, and a line about them; a DataError names them all unless
    `skip_bad`."""
    bad = (found.columns["kind"] == 0).nonzero().flatten().tolist()
    if not bad:
        return images, found, []
    reasons = []
    for row in bad[:5]:
        try:
            images.image(row)
            reasons.append(f"{images.sources[row]}: a single pixel")
        except DataError as error:
            reasons.append(str(error))
    more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
    if not skip_bad:
        raise DataError(f"{images.name}: {_of(len(bad), images)} cannot be read, --skip_bad leaves them out: "
                        f"{'; '.join(reasons)}{more}")  # fmt: skip
    good = (found.columns["kind"] > 0).nonzero().flatten().tolist()
    if not good:
        raise DataError(f"{images.name}: none of the {len(images)} images can be read: {'; '.join(reasons)}{more}")
    note = f"{images.name}: {_of(len(bad), images)} skipped, damaged: {one_line(images.title(row) for row in bad)}"
    left = Survey({name: values[good] for name, values in found.columns.items()})
    return replace(images.keep(good), parts=()), left, [note]


def remarks(images: ImageSet, found: Survey) -> list[str]:
    """One line for everything unusual in a set: odd kinds, several sizes, the same file twice; by name."""
    lines = []
    kinds = found.columns["kind"].tolist()
    for number, kind in enumerate(KINDS[2:], 2):
        if rows := [row for row, seen in enumerate(kinds) if seen == number]:
            names = one_line(images.title(row) for row in rows)
            spans = sorted({images.range(row) for row in rows} - {""})
            by = f" by --range {' and '.join(spans)}" if spans else ""
            done = {"transparent": "composited over black", "16 bit or float": f"scaled to 8 bit{by}"}
            lines.append(f"{images.name}: {_of(len(rows), images)} {_are(rows)} {kind}, "
                         f"{done.get(kind, 'measured as RGB')}: {names}")  # fmt: skip
    if not any(images.ranges) and (warning := ranges.dark([x for x in images.sources if isinstance(x, Path)])):
        lines.append(f"{images.name}: {warning}")
    sizes = Counter(map(tuple, found.columns["size"].tolist()))
    if len(sizes) > 1:
        (width, height), most = sizes.most_common(1)[0]
        odd = [row for row, size in enumerate(found.columns["size"].tolist()) if tuple(size) != (width, height)]
        lines.append(f"{images.name}: {len(sizes)} sizes, {most:,} images of {width} x {height} and {len(odd):,} of "
                     f"another: {one_line(images.title(row) for row in odd)}")  # fmt: skip
    lossy = found.columns["lossy"].tolist()
    if 0 < sum(lossy) < len(lossy):
        few = sum(lossy) * 2 <= len(lossy)
        names = one_line(images.title(row) for row, value in enumerate(lossy) if value == few)
        lines.append(f"{images.name}: {sum(lossy):,} lossy (JPEG, WebP) and {len(lossy) - sum(lossy):,} lossless files "
                     f"in one set, the {'former' if few else 'latter'}: {names}")  # fmt: skip
    seen: dict[str, int] = {}
    again = [row for row, digest in enumerate(images.hashes) if seen.setdefault(digest, row) != row]
    if again:
        pairs = one_line(f"{images.title(row)} = {images.title(seen[images.hashes[row]])}" for row in again)
        lines.append(f"{images.name}: {_of(len(again), images)} {_are(again)} another one's copy: {pairs}")
    return lines


def mismatches(real: ImageSet, of_real: Survey, fake: ImageSet, of_fake: Survey) -> list[str]:
    """One line for everything that makes two sets differ besides what they show."""
    lines = []
    lossy = [bool(found.columns["lossy"].float().mean() > 0.5) for found in (of_real, of_fake)]
    if lossy[0] != lossy[1]:
        one, other = (real, fake) if lossy[0] else (fake, real)
        lines.append(f"{one.name} is JPEG or WebP, {other.name} is lossless: compression alone moves these metrics")
    raw = {_of_file(digest) for digest in real.hashes}
    same = [row for row, digest in enumerate(fake.hashes) if _of_file(digest) in raw]
    if same:
        lines.append(f"{_of(len(same), fake)} of {fake.name} {_are(same)} byte for byte in {real.name}: "
                     f"{one_line(fake.title(row) for row in same)}")  # fmt: skip
    ratio = [(c[:, 0] / c[:, 1].clamp(min=1)).mean().item() for c in (f.columns["size"] for f in (of_real, of_fake))]
    if max(ratio) > 1.02 * min(ratio):
        lines.append(f"{real.name} is {ratio[0]:.2f} times as wide as high, {fake.name} {ratio[1]:.2f}: "
                     f"every protocol stretches both to a square")  # fmt: skip
    return lines


def _of_file(digest: str) -> str:
    """The part of a hash that a file's bytes decide, or a toy scene's whole one."""
    return re.split(" squash| range", digest)[0]


_GENERATED = re.compile(r"(?<![a-z])(fakes?|generated|synthetic|synth|samples?|drawn)(?![a-z])", re.IGNORECASE)
_REAL = re.compile(r"(?<![a-z])(reals?|originals?|reference|ground.?truth)(?![a-z])", re.IGNORECASE)


def suspicions(reals: Mapping[str, ImageSet], where: str, fake: ImageSet) -> list[str]:
    """Lines that say why real and generated images may have been exchanged: a manifest of sample.py beside those called
    real, else the names of folders, else those of images. reals by the folder or data set that they are of; `where` is
    the generated ones' folder, "" without one."""
    lines = [
        f"{spec} holds the manifest.jsonl of sample.py, which lies beside generated images: "
        + ("are these real?" if where and drawn_here(where) else "are --real and --fake exchanged?")
        for spec in reals
        if drawn_here(spec)
    ]
    lines = lines or [said for spec in reals if (said := exchanged(spec, where))]
    return lines or [said for images in reals.values() for said in exchanged_names(images, fake)]


def exchanged(real: str, fake: str) -> str:
    """A line where the names of two folders say the contrary of what they were given as; else ""."""
    real, fake = (Path(where).name or where for where in (real, fake))
    for name, sounds, other, given in ((real, _GENERATED, _REAL, "real"), (fake, _REAL, _GENERATED, "generated")):
        if sounds.search(name) and not other.search(name):
            return f"{name} does not sound {given}: are --real and --fake exchanged?"
    return ""


def drawn_here(folder: str | Path) -> Path | None:
    """The manifest.jsonl of sample.py among the images of a folder: in it, in a folder below, such as the `test` of a
    run, or above it, where it names an image of the folder; None where there is none."""
    folder = Path(folder)
    places = [folder, folder.parent, *sorted(folder.glob("*/"))] if folder.is_dir() else []
    return next((place / "manifest.jsonl" for place in places if _draws(place / "manifest.jsonl", folder)), None)


def _draws(manifest: Path, folder: Path) -> bool:
    """Whether a manifest is there, and that of the folder or of an image which lies below it."""
    if not manifest.is_file() or manifest.parent == folder:
        return manifest.is_file()
    with open(manifest, encoding="utf-8", errors="replace") as lines:
        first = lines.readline()
    try:
        image = (manifest.parent / json.loads(first)["file"]).resolve()
    except (ValueError, KeyError, TypeError):
        return False
    return image.is_file() and image.is_relative_to(folder.resolve())


def exchanged_names(real: ImageSet, fake: ImageSet) -> list[str]:
    """A line for each of: real images that are called generated, generated ones called real, and generated images that
    bear the names of real ones (counters alone say nothing)."""
    stems = [[path.stem for path in images.sources if isinstance(path, Path)] for images in (real, fake)]
    lines = []
    for images, mine, sounds, other, given in (
        (real, stems[0], _GENERATED, _REAL, "real"), (fake, stems[1], _REAL, _GENERATED, "generated")
    ):  # fmt: skip
        contrary = [stem for stem in mine if sounds.search(stem) and not other.search(stem)]
        if 2 * len(contrary) > len(mine):
            lines.append(f"{_of(len(contrary), images)} of {images.name} do not sound {given} ({contrary[0]}): are "
                         f"--real and --fake exchanged?")  # fmt: skip
    theirs = set(stems[0])
    same = [stem for stem in stems[1] if stem in theirs and len(re.sub(r"[\W\d_]", "", stem)) >= 3]
    if 2 * len(same) > len(stems[1]) and not lines:
        lines.append(f"{_of(len(same), fake)} of {fake.name} bear the names of images of {real.name} ({same[0]}): are "
                     f"they made from these, or the real images themselves?")  # fmt: skip
    return lines


def _of(count: int, images: ImageSet) -> str:
    return f"{count:,} of {len(images):,} images"


def _are(rows: Sequence[int]) -> str:
    return "is" if len(rows) == 1 else "are"
