"""Image files to pixels: one policy for every mode, and the papers' transforms.

orientation    EXIF is obeyed
16 bit         divided by 257 (all of 0 .. 65535 to 0 .. 255), never clipped
32-bit integer up to 255: as it is; up to 65535: divided by 257; else its own range is stretched to 0 .. 255
float          in [0, 1]: times 255; else its own range is stretched to 0 .. 255. NaN becomes black
alpha          composited over black, palettes and colour keys with transparency too
CMYK, YCbCr, LAB and grey: converted to RGB; embedded colour profiles are not applied, as in the papers' code
animations     the first frame
damage         an error that names the file: a half-read image is never handed on
"""

import stat
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageEnhance, ImageOps, UnidentifiedImageError
from torch import Tensor

from nanomed.data.table import DataError, report

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
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


def open_rgb(path: str | Path) -> Image.Image:
    """A decoded 8-bit RGB image; DataError, naming the file, where it cannot be had whole."""
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{path}: not a regular file")
        with Image.open(path, formats=FORMATS) as image:  # reads the header alone
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
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


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB, by the policy at the top of this file."""
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
    """The image in the middle of a black square: the transform of the MMCP team's Kandinsky scripts."""
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


def pad_square(image: Image.Image) -> Image.Image:
    """Black borders that make the image square, the odd pixel to the right or below: MMCP's Kandinsky transform."""
    side = max(image.size)
    padded = Image.new("RGB", (side, side))
    padded.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return padded
