"""Whether a set repeats what it was made from, or itself, or lacks a part: authenticity, Vendi score, F-beta curves.

Features are (N, D) tensors of one network, as in scores.py; memory grows with N and D^2, never with N^2.
"""

import math
import warnings

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from nanomed.metrics import scores


def closest(real: Tensor, fake: Tensor, block: int = scores.BLOCK) -> tuple[Tensor, Tensor]:
    """Of every fake the squared distance to its nearest real sample (M,), and which one that is (M,)."""
    distances = torch.full((len(fake),), math.inf, device=fake.device)
    indices, origin = torch.zeros(len(fake), dtype=torch.long, device=fake.device), real.mean(0)
    for i, j in scores.tiles(len(fake), len(real), block=block):
        best, found = scores.squared_distances(fake[i], real[j], origin).min(1)
        nearer = best < distances[i]
        distances[i] = torch.where(nearer, best, distances[i])
        indices[i] = torch.where(nearer, found + j.start, indices[i])
    return distances, indices


def authentic(real: Tensor, fake: Tensor, block: int = scores.BLOCK) -> Tensor:
    """Which fakes lie farther from their nearest real sample than that one lies from its own nearest; bool (M,)."""
    scores.check(2, real)
    scores.check(1, real, fake)
    distances, indices = closest(real, fake, block)
    return distances > scores.neighbour_radii(real, 1, block)[indices]


def authenticity(real: Tensor, fake: Tensor, block: int = scores.BLOCK) -> float:
    """The share of fakes that no real sample explains too well (Alaa et al. 2022, section 3.3): 1 for fakes unlike all
    that is real, 0 for copies, about a half for new samples of the same distribution.

    real (N >= 2, D), fake (M, D). Raises ValueError for features of other shapes or not finite.
    """
    return authentic(real, fake, block).double().mean().item()


def vendi(features: Tensor) -> float:
    """How many different samples a set is worth (Friedman and Dieng 2023): exp of the entropy of the eigenvalues of
    K / N, where K holds the cosine of every pair. 1 for one image repeated, N for N orthogonal ones, at most min(N, D).

    K and the D x D matrix of the same features have the same eigenvalues but zeros, which have no entropy: the smaller
    of the two is taken apart. Raises ValueError for a sample of length 0, which has no direction.
    """
    scores.check(1, features)
    n, width = features.shape
    if n <= width:
        unit = scores.unit(features.double())
        gram = unit @ unit.T
    else:
        gram = features.new_zeros(width, width, dtype=torch.float64)
        for start in range(0, n, scores.BLOCK):
            unit = scores.unit(features[start : start + scores.BLOCK].double())
            gram.addmm_(unit.T, unit)
    values = torch.linalg.eigvalsh(gram / n).clamp(min=0)
    return torch.special.entr(values).sum().exp().item()


# ------------------------------------------------------------------------------------------------------ F-beta curves


def clusters(real: Tensor, fake: Tensor, count: int = 20, repeats: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Both sets' bins (N, repeats) and (M, repeats): the nearest of `count` centres that k-means, started `repeats`
    times, finds in the two together (Sajjadi et al. 2018, section 4.1)."""
    scores.check(1, real, fake)
    both = torch.cat([real, fake]).float().cpu().numpy()
    count, draw, found = min(count, len(both)), np.random.default_rng(seed), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a centre that nothing is nearest to: an empty bin, where images repeat
        for _ in range(repeats):
            found.append(kmeans2(both, count, iter=20, minit="++", rng=draw)[1])
    bins = torch.from_numpy(np.stack(found, 1)).long()
    return bins[: len(real)], bins[len(real) :]


def curve(real: Tensor, fake: Tensor, angles: int = 1001) -> Tensor:
    """Precision and recall (angles, 2) of bins (N, repeats) and (M, repeats), means over the repeats: for every slope
    l from 0 to infinity, sum min(l p, q) and sum min(p, q / l) of the shares p and q of both sets (eq. 7)."""
    slope = torch.linspace(1e-6, math.pi / 2 - 1e-6, angles, dtype=torch.float64).tan()[:, None]
    count, found = int(max(real.max(), fake.max())) + 1, 0.0
    for one, other in zip(real.T, fake.T):
        p, q = (torch.bincount(bins, minlength=count).double() / len(bins) for bins in (one, other))
        precision = torch.minimum(slope * p, q).sum(1)
        found = found + torch.stack([precision, precision / slope[:, 0]], 1)
    return (found / real.shape[1]).clamp(0, 1)


def f_beta(points: Tensor, beta: float) -> float:
    """The best (1 + beta^2) P R / (beta^2 P + R) on a curve (points, 2): with beta above 1 recall weighs more."""
    precision, recall = points.unbind(1)
    below = (beta**2 * precision + recall).clamp(min=1e-30)
    return ((1 + beta**2) * precision * recall / below).max().item()
