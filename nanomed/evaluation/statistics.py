"""Files of statistics instead of real images: the mean and covariance of features that somebody else has published.

pytorch-fid and clean-fid write them as `.npz` with `mu` (D,) and `sigma` (D, D) of Inception's pool3. A Frechet
distance needs no more of the real side; nothing else can be measured against them. What the file does not say, its
user must know: it is only comparable under the protocol (--protocol) that its features were made with.

A folder of this project's own features (runs/cache/features/NETWORK-PROTOCOL-HASH) serves as well, where the images
themselves are elsewhere: its name says what they are features of.
"""

import hashlib
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from nanomed.data.table import DataError
from nanomed.metrics import scores
from nanomed.run import files
from nanomed.run.cache import SHARD


@dataclass(frozen=True)
class Statistics:
    """Moments of features of real images."""

    name: str
    mean: Tensor  # (D,) float64
    factor: Tensor  # (D, r) float64: the covariance is F F^T, of rank r; lower triangular where r = D
    digest: str  # SHA-256 of the file
    of: str = ""  # network and protocol, where that is known


def holds(path: str | Path) -> bool:
    """Whether a path is a file of statistics or a folder of cached features."""
    return str(path).endswith(".npz") or bool(_shards(Path(path)))


def _shards(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*/*.safetensors") if re.fullmatch(r"\d{8}", path.stem))


def of_cache(folder: str | Path) -> Statistics:
    """The moments of a folder of features that an earlier evaluation left in its cache. Raises DataError for shards
    that are damaged, missing or of no features."""
    folder, parts, digests = Path(folder), [], []
    for number, path in enumerate(_shards(folder)):
        mark = path.with_suffix(".sha256")
        digests.append(files.sha256(path))
        if not mark.is_file() or mark.read_text(encoding="utf-8") != digests[-1] or int(path.stem) != number * SHARD:
            raise DataError(f"{path}: damaged or unfinished; measure the images themselves again")
        parts.append(load_file(path).get("features"))
    if len({path.parent for path in _shards(folder)}) != 1 or any(part is None or part.ndim != 2 for part in parts):
        raise DataError(f"{folder}: no features (N, D) of one set of images")
    features = torch.cat(parts)
    if len(features) < 2:
        raise DataError(f"{folder}: features of one image have no covariance")
    if not features.isfinite().all():
        raise DataError(f"{folder}: holds numbers that are not finite")
    mean, factor = scores.mean_and_factor(features)
    digest = hashlib.sha256("".join(digests).encode()).hexdigest()
    return Statistics(str(folder), mean, factor, digest, folder.resolve().name.rpartition("-")[0])


def read(path: str | Path) -> Statistics:
    """The `mu` and `sigma` of an `.npz`. Raises DataError where there are none, or they are of no Gaussian."""
    if Path(path).is_dir():
        return of_cache(path)
    try:
        with np.load(path, allow_pickle=False) as table:
            held = [table[key] for key in ("mu", "sigma")]
        if any(map(np.iscomplexobj, held)):
            raise ValueError("they are complex numbers")
        mean, covariance = (torch.from_numpy(np.asarray(values, dtype=np.float64)) for values in held)
        digest = files.sha256(Path(path))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        said = "it holds no arrays of numbers" if "allow_pickle" in str(error) else error  # no advice to unpickle
        raise DataError(f"{path}: not a file of statistics with mu and sigma ({said})") from None
    if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
        shapes = f"mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)}"
        raise DataError(f"{path}: {shapes} are not a mean (D,) and a covariance (D, D)")
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise DataError(f"{path}: holds numbers that are not finite")
    asymmetry, largest = (covariance - covariance.T).abs().max(), covariance.abs().max()
    if asymmetry > 1e-6 * largest or (covariance.diagonal() < 0).any():
        raise DataError(f"{path}: sigma is not a covariance: it is not symmetric, or has a variance below 0")
    try:
        factor = _checked_factor((covariance + covariance.T) / 2)
    except ValueError as error:
        raise DataError(f"{path}: sigma is not a covariance: {error}") from None
    return Statistics(str(path), mean, factor, digest)


def _checked_factor(covariance: Tensor) -> Tensor:
    """F (D, r) with F F^T = S of a symmetric S, and the proof that there is one: once for a file, not for every
    distance to it. Where rounding has made variances below 0 of what was 0 (within 1e-6 of the largest entry), they are
    0. Raises ValueError for any others."""
    factor, largest = scores.factor_of(covariance), covariance.abs().max()
    if factor.shape[1] == len(covariance) or (factor @ factor.T - covariance).abs().max() <= 1e-11 * largest:
        return factor
    variances, directions = torch.linalg.eigh(covariance)
    if variances[0] < -1e-6 * largest:
        raise ValueError(f"it has a direction of variance {variances[0].item():.3g}")
    factor = directions * variances.clamp(min=0).sqrt()
    return torch.linalg.qr(factor[:, variances > 0].T).R.T.contiguous()
