"""Colour drift: how far the colours of generated images are from those of real ones, which is what HLDF is for.

Per image and channel, the mean m and the unbiased standard deviation s of its pixels (Med-Art, eq. 4); per set, their
averages over its images. `drift` compares two sets:

    hldf             sum over channels of (difference of the average m)^2 + (difference of the average s)^2, with pixels
                     in [-1, 1]: eq. 4 between the sets' averages. The released code averages the channels: a third
    mean, std        per channel, fake minus real, in grey levels of 0 to 255
    mean_abs, std_abs   averages over the three channels of their absolute values
    saturation_w1    Wasserstein-1 distance between the histograms of HSV saturation (0 to 1), i.e. the area between the
                     two distribution functions
    saturation_tv    half the sum of the histograms' absolute differences (0: equal, 1: disjoint)
    channels_w1      Wasserstein-1 distance of each channel's histogram, in grey levels

Every image weighs the same, whatever its size.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

BINS = 64  # of the saturation
_LEVELS = np.arange(256.0)


@dataclass(frozen=True)
class Colours:
    """What `measure` makes of a set of images."""

    means: np.ndarray  # (N, 3) per image, in grey levels of 0 to 255
    stds: np.ndarray  # (N, 3) per image, unbiased
    channels: np.ndarray  # (3, 256) shares of the grey levels of red, green and blue; each row sums to 1
    saturation: np.ndarray  # (BINS,) shares of the saturation, from 0 to 1; sums to 1

    @property
    def n(self) -> int:
        """Images."""
        return len(self.means)


def measure(images: Iterable[np.ndarray]) -> Colours:
    """The colour statistics of uint8 images (H, W, 3), streamed: one image is held at a time.

    Raises ValueError for no image, and for one that is not uint8 RGB or has a single pixel.
    """
    means, stds = [], []
    channels, saturation = np.zeros((3, 256)), np.zeros(BINS)
    table = _saturation_table()
    for number, image in enumerate(images):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image[..., 0].size < 2:
            raise ValueError(f"image {number}: {image.dtype} {image.shape} is not uint8 (H, W, 3) of 2 pixels or more")
        size = image.shape[0] * image.shape[1]
        counts = np.stack([np.bincount(image[..., c].ravel(), minlength=256) for c in range(3)])  # (3, 256)
        mean = counts @ _LEVELS / size
        deviations = (_LEVELS - mean[:, None]) ** 2  # (3, 256)
        means.append(mean)
        stds.append(np.sqrt((counts * deviations).sum(1) / (size - 1)))
        channels += counts / size
        saturation += np.bincount(table[image.max(2), image.min(2)].ravel(), minlength=BINS) / size
    if not means:
        raise ValueError("no image to measure the colours of")
    n = len(means)
    return Colours(np.stack(means), np.stack(stds), channels / n, saturation / n)


def _saturation_table() -> np.ndarray:
    """(256, 256) uint8: the bin of (max - min) / max, of a pixel's largest and smallest channel; black has none."""
    largest, smallest = np.mgrid[0:256, 0:256]
    spread = (largest - smallest).clip(min=0)
    return np.minimum(BINS * spread // np.maximum(largest, 1), BINS - 1).astype(np.uint8)


def drift(real: Colours, fake: Colours) -> dict[str, float | list[float]]:
    """The distances that the head of this file defines, as plain numbers; all are 0 for equal sets."""
    mean = fake.means.mean(0) - real.means.mean(0)  # (3,)
    std = fake.stds.mean(0) - real.stds.mean(0)
    return {
        "hldf": float((mean**2 + std**2).sum() / 127.5**2),
        "mean": mean.tolist(),
        "std": std.tolist(),
        "mean_abs": float(np.abs(mean).mean()),
        "std_abs": float(np.abs(std).mean()),
        "saturation_w1": wasserstein(real.saturation, fake.saturation) / BINS,
        "saturation_tv": total_variation(real.saturation, fake.saturation),
        "channels_w1": [wasserstein(a, b) for a, b in zip(real.channels, fake.channels)],
    }


def wasserstein(a: np.ndarray, b: np.ndarray) -> float:
    """Wasserstein-1 distance of two histograms on the same bins, in units of a bin."""
    return float(np.abs(np.cumsum(a - b)[:-1]).sum())


def total_variation(a: np.ndarray, b: np.ndarray) -> float:
    """Half the sum of absolute differences of two histograms on the same bins."""
    return float(np.abs(a - b).sum() / 2)
