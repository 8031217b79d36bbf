"""Files of statistics instead of real images: the mean and covariance of features that somebody else has published.

pytorch-fid and clean-fid write them as `.npz` with `mu` (D,) and `sigma` (D, D) of Inception's pool3. A Frechet
distance needs no more of the real side; nothing else can be measured against them. What the file does not say, its
user must know: it is only comparable under the protocol (--protocol) that its features were made with.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanomed.data.table import DataError
from nanomed.run import files


@dataclass(frozen=True)
class Statistics:
    """Moments of features of real images."""

    name: str
    mean: Tensor  # (D,) float64
    covariance: Tensor  # (D, D) float64
    digest: str  # SHA-256 of the file


def read(path: str | Path) -> Statistics:
    """The `mu` and `sigma` of an `.npz`. Raises DataError where there are none, or they are of no Gaussian."""
    try:
        with np.load(path, allow_pickle=False) as table:
            mean, covariance = (torch.from_numpy(np.asarray(table[key], dtype=np.float64)) for key in ("mu", "sigma"))
        digest = files.sha256(Path(path))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a file of statistics with mu and sigma ({error})") from None
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        shapes = f"mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)}"
        raise DataError(f"{path}: {shapes} are not a mean (D,) and a covariance (D, D)")
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise DataError(f"{path}: holds numbers that are not finite")
    asymmetry, largest = (covariance - covariance.T).abs().max(), covariance.abs().max()
    if asymmetry > 1e-6 * largest or (covariance.diagonal() < 0).any():
        raise DataError(f"{path}: sigma is not a covariance: it is not symmetric, or has a variance below 0")
    return Statistics(str(path), mean, (covariance + covariance.T) / 2, digest)
