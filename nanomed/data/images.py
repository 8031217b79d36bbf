"""Image files to pixels: one policy for every mode, and the papers' transforms.

orientation    EXIF is obeyed
16 bit         divided by 257 (all of 0 .. 65535 to 0 .. 255), never clipped; of colours Pillow keeps the upper 8 bits
32-bit integer up to 255: as it is; up to 65535: divided by 257; else its own range is stretched to 0 .. 255
float          in [0, 1]: times 255; else its own range is stretched to 0 .. 255. NaN becomes black
alpha          composited over black, palettes and colour keys with transparency too
CMYK, YCbCr, LAB and grey: converted to RGB; embedded colour profiles are not applied, as in the papers' code
animations     the first frame
DICOM          as dicom.py says, where pydicom is installed
damage         an error that names the file: a half-read image is never handed on

With a range (`--range`, ranges.py) whole numbers of more than 8 bits and floats are scaled by it instead, all files of
a data set alike. 8-bit files stay as they are.
"""

import math
import re
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageEnhance, ImageOps, UnidentifiedImageError
from torch import Tensor

from nanomed.data import dicom
from nanomed.data.table import DataError, Row, report
from nanomed.run.flags import UsageError
from nanomed.run.progress import progress

T = TypeVar("T")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", dicom.SUFFIX)
MAX_PIXELS = 64_000_000


def inside(root: str | Path, name: str) -> Path:
    """root / name, refused with a DataError when the name leaves the folder, by itself or through a link."""
    parts = Path(name).parts
    if not name or "\0" in name or "\\" in name or name.startswith(("~", "/")) or ".." in parts or name[1:2] == ":":
        raise DataError(f"the file name {name!r} is refused: it must be relative and stay in its folder")
    path = Path(root) / name
    try:
        if path.is_symlink() or any(parent.is_symlink() for parent in path.parents if parent.is_relative_to(root)):
            if not path.resolve().is_relative_to(Path(root).resolve()):
                raise DataError(f"{path}: refused, it links to a place outside {root}")
    except (OSError, RuntimeError) as error:  # too long, a circle of links
        reason = error.strerror if isinstance(error, OSError) else type(error).__name__
        raise DataError(f"the file name {name!r} is refused: {reason}") from None
    return path


def find(name: str, folders: Sequence[Path]) -> Path:
    """The image of that name, with or without its suffix, in the first of `folders` that has it; else a DataError."""
    for folder in folders:
        for suffix in ("", *SUFFIXES):
            path = inside(folder, name + suffix)
            if path.is_file():
                return path
    raise DataError(f"no image {name!r} in {folders[0]}")


def listing(folder: Path, pattern: str, problems: list[DataError] | None = None) -> list[Path]:
    """The image files that a pattern finds in a folder, sorted. Names that begin with a dot are left out; links that
    lead out of the folder are refused."""
    found = []
    for path in sorted(folder.glob(pattern)):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            try:
                found.append(inside(folder, path.relative_to(folder).as_posix()))
            except DataError as error:
                report(error, problems)
    return found


def open_rgb(path: str | Path, span: str = "") -> Image.Image:
    """A decoded 8-bit RGB image; DataError, naming the file, where it cannot be had whole.

    span   what `limits` reads: the values of deep images that are black and white; "": the policy of this file
    """
    if is_dicom(path):
        return _of_dicom(Path(path), span)
    return _opened(path, lambda image: to_rgb(ImageOps.exif_transpose(image), span, Path(path)))


def judge(rows: Sequence[Row]) -> None:
    """Decode every image once. Raises DataError for the first one that is damaged: before a training, not in it."""
    pool = ThreadPoolExecutor(8)  # decoding leaves the interpreter free
    try:
        looks = pool.map(lambda row: open_rgb(row.file, row.range) is None, rows)
        for _ in progress(looks, "looking at every image", "image", len(rows)):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def extremes(path: str | Path) -> tuple[float, float, bool] | None:
    """(the least value, the most, whether they are floats) of an image with more than 8 bits, as the file has them;
    None of one with 8, and of one without any number."""

    def make(image: Image.Image) -> tuple[float, float, bool] | None:
        values = np.asarray(image)
        known = values[np.isfinite(values)] if image.mode == "F" else values
        return (float(known.min()), float(known.max()), image.mode == "F") if _is_deep(image) and known.size else None

    if is_dicom(path):
        values = dicom.read(Path(path), MAX_PIXELS).values
        known = values[np.isfinite(values)]
        return (float(known.min()), float(known.max()), False) if known.size else None
    return _opened(path, make)


def is_dicom(path: str | Path) -> bool:
    """Whether a file is DICOM, by its name."""
    return Path(path).suffix.lower() == dicom.SUFFIX


def is_deep(path: Path, span: str = "") -> bool:
    """Whether a file has more than 8 bits, by its header alone; False where that cannot be read. Of DICOM files those
    that say themselves what to show have not, unless `span` is a window that takes the place of theirs."""
    if is_dicom(path):
        try:
            said = dicom.header(path)
        except DataError:
            return False
        return said.grey and (":" in span or (said.bits > 8 and not said.windowed))
    if path.suffix.lower() not in (".png", ".tif", ".tiff"):
        return False
    try:
        with Image.open(path, formats=FORMATS) as image:
            return _is_deep(image)
    except Exception:  # damage is named where the image is decoded
        return False


def _of_dicom(path: Path, span: str) -> Image.Image:
    picture = dicom.read(path, MAX_PIXELS)
    if picture.greys is None:
        return Image.fromarray(picture.values)
    greys = picture.greys
    if span and is_deep(path, span):
        greys = scaled(picture.values, span, path)
    greys = np.clip(greys, 0, 255)
    return _grey(255 - greys if picture.inverted else greys)


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith(("I", "F"))


def _opened(path: str | Path, make: Callable[[Image.Image], T]) -> T:
    """What is made of an image that was read whole; else a DataError."""
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{path}: not a regular file")
        with Image.open(path, formats=FORMATS) as image:  # reads the header alone
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            image.load()
            return make(image)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"{path}: more than {MAX_PIXELS:,} pixels; make it smaller") from None
    except UnidentifiedImageError:
        raise DataError(f"{path}: not a {', '.join(FORMATS)} image") from None
    except Exception as error:  # whatever a decoder makes of bytes it did not expect
        raise DataError(f"{path}: damaged image ({error}); get the file again") from None


@cache
def size_of(path: Path) -> tuple[int, int]:
    """(width, height) of the image that `open_rgb` gives, from the file's header alone where that says it."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return (image.height, image.width) if turned else image.size
    except Exception:  # what it is, open_rgb says
        return open_rgb(path).size


def to_rgb(image: Image.Image, span: str = "", path: Path = Path()) -> Image.Image:
    """Any mode to RGB, by the policy at the top of this file, or deep ones by a range; `path` is for messages."""
    if span and _is_deep(image):
        return _grey(scaled(np.asarray(image).astype(np.float64), span, path))
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        return _grey(np.asarray(image).astype(np.float64) / 257)
    if image.mode in ("I", "F"):
        values = np.asarray(image).astype(np.float64)
        known = values[np.isfinite(values)]
        low, high = (known.min(), known.max()) if known.size else (0.0, 0.0)
        if image.mode == "F" and 0 <= low and high <= 1:
            return _grey(values * 255)
        if image.mode == "I" and 0 <= low and high <= 65535:
            return _grey(values / 257 if high > 255 else values)
        return _grey((values - low) / max(high - low, 1e-12) * 255)
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")
    return image.convert("RGB")


def _grey(values: np.ndarray) -> Image.Image:
    grey = np.clip(np.nan_to_num(values, nan=-1.0) + 0.5, 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


# ------------------------------------------------------------------------------------------------------------- ranges


def limits(span: str) -> tuple[float, float]:
    """(what becomes black, what becomes white) of a range: BITS, 0 and 2^BITS - 1, or LOW:HIGH; else a UsageError."""
    if re.fullmatch(r"[0-9]{1,2}", span) and 8 <= int(span) <= 32:
        return 0.0, float(2 ** int(span) - 1)
    if match := re.fullmatch(r"([+-]?[0-9.]+):([+-]?[0-9.]+)", span):
        try:
            low, high = float(match[1]), float(match[2])
        except ValueError:  # two points in a number
            low = high = math.nan
        if low < high < math.inf:
            return low, high
    shown = span if len(span) <= 80 else f"{span[:77]}..."
    raise UsageError(f"--range {shown}: say auto, the bits that are used (8 .. 32), or LOW:HIGH with LOW < HIGH")


def of_bits(values: np.ndarray, span: str, path: Path) -> None:
    """A number of bits says what a file is: a DataError for values that they do not hold."""
    _, high = limits(span)
    known = values[np.isfinite(values)]
    if known.size and (known.min() < 0 or known.max() > high):
        odd = known.min() if known.min() < 0 else known.max()
        raise DataError(f"{path}: holds {odd:g}, which {span} bits do not hold; give --range more bits, or LOW:HIGH")


def scaled(values: np.ndarray, span: str, path: Path) -> np.ndarray:
    """The values of a file to 0 .. 255 by a range; beyond LOW:HIGH, a window that someone has chosen, they go on, to be
    clipped by what rounds them."""
    if ":" not in span:
        of_bits(values, span, path)
    low, high = limits(span)
    return (values - low) / ((high - low) / 255)  # of 16 bits: divided by 257


# --------------------------------------------------------------------------------------------------------- transforms


def to_unit(array: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) to float (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(array)).permute(2, 0, 1).float() / 127.5 - 1


def _square(image: Image.Image, left: int, top: int, size: int) -> Image.Image:
    """The square of the shorter side at (left, top), resized; cropping and resizing in one pass."""
    side = min(image.size)
    return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BILINEAR)


def msdm_valid(image: Image.Image, size: int) -> np.ndarray:
    """Centre crop of the shorter side, bilinear resize: uint8 (size, size, 3). Also the transform of MSDM's VAE."""
    side = min(image.size)
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)  # as torchvision rounds
    return np.asarray(_square(image, left, top, size))


def padded(image: Image.Image) -> Image.Image:
    """The image in the middle of a black square, the odd pixel to the right or below: the transform of the MMCP team's
    Kandinsky scripts."""
    side = max(image.size)
    square = Image.new("RGB", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def random_square(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """Random crop of the shorter side, resize: Med-Art's transform."""
    side = min(image.size)
    left, top = rng.integers(image.width - side + 1), rng.integers(image.height - side + 1)
    return _square(image, int(left), int(top), size)


def msdm_train(image: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
    """Random crop of the shorter side, resize, brightness, contrast and saturation jitter of 0.4.

    The paper names only brightness and contrast; the released code also jitters the saturation.
    """
    return np.asarray(color_jitter(random_square(image, size, rng), rng))


def color_jitter(image: Image.Image, rng: np.random.Generator, strength: float = 0.4) -> Image.Image:
    """Brightness, contrast and saturation, each times U(1 - strength, 1 + strength), in random order."""
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for i in rng.permutation(3):
        image = enhancers[i](image).enhance(rng.uniform(1 - strength, 1 + strength))
    return image


def squash(image: Image.Image, size: int) -> np.ndarray:
    """Resize both sides to `size`, whatever the aspect: what the papers' FID does to real images."""
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
