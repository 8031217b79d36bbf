"""Frechet radiomic distance: how far apart two sets are in what radiologists' software measures, with no network.

v1 (Konz, Osuala et al., arXiv 2412.01496): 77 features (radiomics.NAMES) of the grey image, brought to mean 0 and
deviation 100 and to every second pixel by cubic B-splines, and of eight images made of it: Laplacians of Gaussians of
sigma 2 to 5, and the four bands of a wavelet; levels of width 5. Both sets by the mean and deviation of the real one;
the number is the logarithm of the squared Frechet distance, as the authors' package prints it (their eq. 3 is half).
v0 (Osuala et al., arXiv 2403.13890): 93 features (radiomics.ALL_NAMES) of the grey image as it is, levels of width 25;
each scaled from its least and greatest value over both sets to [0, 7.457]; the squared Frechet distance itself. Shape
features are left out: of whole images they are constants, which have no distance.

The authors' code hands pyradiomics one slice of a volume, for which that leaves the Laplacians out with a warning
(they are of three dimensions and need four slices); here they are of two, as the paper describes the features.
"""

import functools
import math

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import map_coordinates
from scipy.signal import lfilter, lfilter_zi
from torch import Tensor

from nanomed.metrics import radiomics, scores

SIGMAS = (2.0, 3.0, 4.0, 5.0)  # of the Laplacians, in pixels of the whole image
SCALE, SHIFT, WIDTH, STEP = 100.0, 300.0, 5.0, 2
WIDTH_V0, RANGE_V0 = 25.0, 7.45670747756958
COIF1 = np.array([-0.015655728135791993, -0.07273261951252645, 0.3848648468648578,
                  0.8525720202116004, 0.3378976624574818, -0.07273261951252645])  # fmt: skip
LEAST = 8  # pixels of a side


def grey(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) to uint8 (H, W) as Pillow's mode L weighs the colours."""
    return np.asarray(Image.fromarray(image).convert("L"))


def features(image: np.ndarray) -> dict[str, np.ndarray]:
    """{"v1": (693,), "v0": (93,)} of a uint8 image (H, W, 3), in float64: v1 of the images of `derived`, each with the
    features of radiomics.NAMES. Raises ValueError for a side below 8 pixels."""
    if min(image.shape[:2]) < LEAST:
        raise ValueError(f"an image of {image.shape[1]} x {image.shape[0]} pixels has no texture; {LEAST} are needed")
    plain = grey(image)
    images = derived(resampled(normalised(plain))).values()
    v1 = [radiomics.features(x, width=WIDTH, shift=SHIFT, area=STEP**2) for x in images]
    v0 = radiomics.features(plain.astype(np.float64), width=WIDTH_V0, everything=True)
    return {"v1": np.concatenate(v1), "v0": v0}


# --------------------------------------------------------------------------------------------------- derived images


def normalised(image: np.ndarray) -> np.ndarray:
    """To mean 0 and (unbiased) deviation SCALE; an image of one grey level to 0."""
    x = image.astype(np.float64)
    deviation = x.std(ddof=1)
    return (x - x.mean()) * (SCALE / deviation) if deviation else np.zeros_like(x)


def resampled(image: np.ndarray) -> np.ndarray:
    """(H, W) to (H // STEP, W // STEP): cubic B-splines through the pixels, read midway between every two."""
    rows, columns = (_spline(side) for side in image.shape)
    return rows @ image @ columns.T


# Each of these filters is linear along rows and then along columns: a matrix for each side, made once for its length.


@functools.lru_cache(16)
def _spline(side: int) -> np.ndarray:
    """(side // STEP, side)"""
    places = np.arange(side // STEP) * STEP + (STEP - 1) / 2
    return np.stack([map_coordinates(line, places[None], order=3, mode="mirror") for line in np.eye(side)], 1)


def derived(image: np.ndarray) -> dict[str, np.ndarray]:
    """The nine images of one: itself, Laplacians of Gaussians, wavelet bands (the letters: along x, then along y)."""
    found = {"original": image} | {f"log {sigma:g}": laplacian(image, sigma / STEP) for sigma in SIGMAS}
    return found | {f"wavelet {bands}": band for bands, band in wavelet(image).items()}


def wavelet(image: np.ndarray) -> dict[str, np.ndarray]:
    """One level of the stationary wavelet transform by coif1: low and high pass along each axis, at every pixel, the
    image repeated beyond its edges (an odd side by one pixel more of it)."""
    height, width = image.shape
    padded = np.pad(image, [(0, side % 2) for side in image.shape], mode="wrap")
    (low, high), found = _passes(padded.shape[0]), {}
    for x, columns in zip("LH", _passes(padded.shape[1])):
        half = padded @ columns.T
        found |= {x + y: (rows @ half)[:height, :width] for y, rows in zip("LH", (low, high))}
    return {name: found[name] for name in ("LH", "HL", "HH", "LL")}


@functools.lru_cache(16)
def _passes(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Low and high pass (side, side) of a line that goes round."""
    taps = COIF1, COIF1[::-1] * (-1.0) ** np.arange(1, 7)
    return tuple(sum(tap * np.roll(np.eye(side), k - 3, 0) for k, tap in enumerate(line)) for line in taps)


def laplacian(image: np.ndarray, sigma: float) -> np.ndarray:
    """sigma^2 times the Laplacian of the image smoothed by a Gaussian of `sigma` pixels, both by the recursive filters
    of Farneback and Westin (2006), which ITK uses: four steps forward and four back, whatever the sigma."""
    (smooth_y, bend_y), (smooth_x, bend_x) = (_recursive(side, sigma) for side in image.shape)
    return bend_y @ image @ smooth_x.T + smooth_y @ image @ bend_x.T


@functools.lru_cache(32)
def _recursive(side: int, sigma: float) -> list[np.ndarray]:
    """The Gaussian and sigma^2 times its second derivative as matrices (side, side): what a forward and a backward pass
    make of a line that goes on beyond its ends as it ends."""

    def one(lines: np.ndarray, taps: np.ndarray, feedback: np.ndarray) -> np.ndarray:
        return lfilter(taps, feedback, lines, zi=lfilter_zi(taps, feedback) * lines[:, :1])[0]

    eye = np.eye(side)
    return [
        (one(eye, forward, feedback) + one(eye[:, ::-1], backward, feedback)[:, ::-1]).T
        for forward, backward, feedback in _gaussian(sigma)
    ]


def _gaussian(sigma: float) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Coefficients (forward, backward, feedback) of the Gaussian and of sigma^2 times its second derivative."""
    w1, l1, w2, l2 = 0.6681, -1.3932, 2.0787, -1.3732  # Farneback and Westin, the fit to exp(-x^2 / 2) of order 4
    sin1, cos1, exp1 = math.sin(w1 / sigma), math.cos(w1 / sigma), math.exp(l1 / sigma)
    sin2, cos2, exp2 = math.sin(w2 / sigma), math.cos(w2 / sigma), math.exp(l2 / sigma)
    k = np.arange(5)

    def numerator(a1: float, b1: float, a2: float, b2: float) -> np.ndarray:
        both = (a1 + a2) * cos2 * cos1 - b1 * cos2 * sin1 - b2 * cos1 * sin2
        return np.array([
            a1 + a2,
            exp2 * (b2 * sin2 - (a2 + 2 * a1) * cos2) + exp1 * (b1 * sin1 - (a1 + 2 * a2) * cos1),
            2 * exp1 * exp2 * both + a2 * exp1**2 + a1 * exp2**2,
            exp2 * exp1**2 * (b2 * sin2 - a2 * cos2) + exp1 * exp2**2 * (b1 * sin1 - a1 * cos1),
        ])  # fmt: skip

    feedback = np.array([
        1.0,
        -2 * (exp2 * cos2 + exp1 * cos1),
        4 * cos2 * cos1 * exp1 * exp2 + exp1**2 + exp2**2,
        -2 * exp1 * exp2 * (exp2 * cos1 + exp1 * cos2),
        exp1**2 * exp2**2,
    ])  # fmt: skip
    sd, dd, ed = feedback.sum(), (k * feedback).sum(), (k * k * feedback).sum()
    zero, second = numerator(1.3530, 1.8151, -0.3531, 0.0902), numerator(-1.3563, 5.2318, 0.3446, -2.2355)
    bend = second - (2 * second.sum() - sd * second[0]) / (2 * zero.sum() - sd * zero[0]) * zero  # sums to 0
    sn, dn, en = bend.sum(), (k[:4] * bend).sum(), (k[:4] ** 2 * bend).sum()
    curvature = (en * sd**2 - ed * sn * sd - 2 * dn * dd * sd + 2 * dd**2 * sn) / sd**3  # of x^2 / 2
    zero = zero / (2 * zero.sum() / sd - zero[0])
    found = []
    for forward in (zero, bend * sigma**2 / curvature):
        whole = np.append(forward, 0.0)
        backward = whole - feedback * whole[0]
        found.append((forward, backward, feedback))
    return found


# --------------------------------------------------------------------------------------------------------- distances


def distance_v1(real: Tensor, fake: Tensor) -> float:
    """log of the squared Frechet distance of v1's features (N, D), which rounding leaves anywhere below 1e-9 for equal
    sets: never less than log 1e-12. Features that are constant among the real images, or not defined for some image of
    either set, are left out. Raises ValueError where none remains."""
    scores.check(2, real.nan_to_num(0.0), fake.nan_to_num(0.0))
    real, fake = real.double(), fake.double()
    mean, deviation = real.mean(0), real.std(0, correction=0)
    kept = (deviation > 1e-9 * mean.abs()) & ~real.isnan().any(0) & ~fake.isnan().any(0)
    sides = [(x[:, kept] - mean[kept]) / deviation[kept] for x in (real, fake)]
    if not kept.any():
        raise ValueError("no radiomic feature varies among the real images")
    return math.log(max(scores.frechet_distance(*sides), 1e-12))


def distance_v0(real: Tensor, fake: Tensor) -> float:
    """The squared Frechet distance of v0's features (N, D), each scaled by its range over both sets; a value that is
    not defined lies in the middle, and so does a feature without range."""
    real, fake = real.double(), fake.double()
    both = torch.cat([real, fake])
    low = both.nan_to_num(torch.inf, posinf=torch.inf).amin(0)
    high = both.nan_to_num(-torch.inf, neginf=-torch.inf).amax(0)
    span = high - low
    ranged = (span > 0) & span.isfinite()
    sides = [
        torch.where(ranged, (x - low) / torch.where(ranged, span, 1.0), 0.5).nan_to_num(0.5) * RANGE_V0
        for x in (real, fake)
    ]
    return scores.frechet_distance(*sides)
