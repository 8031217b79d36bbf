"""Other sizes than a system's own: what it draws is near in shape, scaled and cropped. Of PixArt's and Hunyuan-DiT's
resolution binning."""

import torch.nn.functional as F
from torch import Tensor

# The sizes PixArt was trained on, height x width in sixteenths of the square's side, by rising height / width.
BINS = """8x32 8x29 9x28 9x27 9x26 10x25 10x24 11x23 11x22 11x21 12x21 12x20 13x19 13x18 14x18 14x17 15x17 15x16 16x16
16x15 17x15 17x14 18x14 18x13 19x13 20x12 21x12 22x11 23x11 24x10 25x10 27x9 32x8"""

SIDES = (32, 64, 128)  # of the latents of the published networks


def binned(height: int, width: int, sample_size: int) -> tuple[int, int]:
    """The trained size, in pixels, whose shape is nearest to height / width (as rounded to two decimals). Networks of
    other sides than the published ones (256, 512, 1024 pixels) have no such table: the size as it is."""
    if sample_size not in SIDES:
        return height, width
    return min(trained(sample_size), key=lambda size: abs(round(size[0] / size[1], 2) - height / width))


def trained(sample_size: int) -> tuple[tuple[int, int], ...]:
    """The sizes of PixArt's training, in pixels, for latents of a side of `SIDES`."""
    unit = sample_size * 8 // 16
    sizes = (size.split("x") for size in BINS.split())
    return tuple((int(rows) * unit, int(columns) * unit) for rows, columns in sizes)


def cropped(images: Tensor, height: int, width: int) -> Tensor:
    """Images scaled until they cover height x width, and their middle cut out."""
    rows, columns = images.shape[2:]
    if (rows, columns) == (height, width):
        return images
    ratio = max(height / rows, width / columns)
    rows, columns = int(rows * ratio), int(columns * ratio)
    images = F.interpolate(images, size=(rows, columns), mode="bilinear", align_corners=False)
    top, left = (rows - height) // 2, (columns - width) // 2
    return images[:, :, top : top + height, left : left + width]


# Hunyuan-DiT's: the sizes of its training, height x width by the shape width / height, the first where two are as near
STANDARD = {
    1: ((1024, 1024), (1280, 1280)),
    4 / 3: ((768, 1024), (864, 1152), (960, 1280)),
    3 / 4: ((1024, 768), (1152, 864), (1280, 960)),
    16 / 9: ((768, 1280),),
    9 / 16: ((1280, 768),),
}


def standard(height: int, width: int) -> tuple[int, int]:
    """The size of `STANDARD` whose shape is nearest to width / height, and of that shape the one whose area is."""
    height, width = height // 16 * 16, width // 16 * 16
    shape = min(STANDARD, key=lambda shape: abs(shape - width / height))
    return _of_area(shape, height * width)


def standards(side: int) -> tuple[tuple[int, int], ...]:
    """Of every shape of `STANDARD` the size that is nearest to a square of that side in area."""
    return tuple(_of_area(shape, side * side) for shape in STANDARD)


def _of_area(shape: float, area: int) -> tuple[int, int]:
    return min(STANDARD[shape], key=lambda size: abs(size[0] * size[1] - area))
