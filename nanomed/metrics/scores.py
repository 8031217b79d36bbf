"""Numbers from features: Frechet distance, kernel distance, Inception Score, precision and recall.

Features are (N, D) tensors of one network under one protocol; where they come from is features.py's business. Sums are
taken in float64. Nothing here calls `sqrtm`: traces of square roots come from symmetric eigenvalues, which are real.
"""

import torch
from torch import Tensor


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D, D) in float64."""
    x = features.double()
    mean = x.mean(0)
    centred = x - mean
    return mean, centred.T @ centred / (len(x) - 1)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of the Gaussians fitted to two sets of features (Heusel et al.
    2017, eq. 6). Any N >= 2; with few samples the estimate is biased upwards.

    tr (S_a S_b)^(1/2) is the sum of the singular values of X_a X_b^T / sqrt((n_a - 1)(n_b - 1)), X centred features:
    that N x N form is used when samples are fewer than dimensions and is never singular. Otherwise it is the sum of
    the square roots of the eigenvalues of L^T S_b L with S_a = L L^T.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a Frechet distance needs at least 2 samples on each side, not {len(a)} and {len(b)}")
    a, b = a.double(), b.double()
    if len(a) + len(b) > a.shape[1]:
        return frechet_from_moments(*moments(a), *moments(b))
    mean_a, mean_b = a.mean(0), b.mean(0)
    xa, xb = (a - mean_a) / (len(a) - 1) ** 0.5, (b - mean_b) / (len(b) - 1) ** 0.5
    within = xa.square().sum() + xb.square().sum() - 2 * torch.linalg.svdvals(xa @ xb.T).sum()
    return max(((mean_a - mean_b).square().sum() + within).item(), 0.0)


def frechet_from_moments(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """The same from means and covariances."""
    within = cov_a.trace() + cov_b.trace() - 2 * trace_sqrt(cov_a, cov_b)
    return max(((mean_a - mean_b).square().sum() + within).item(), 0.0)


def trace_sqrt(a: Tensor, b: Tensor) -> Tensor:
    """tr (a b)^(1/2) of two symmetric positive semi-definite matrices, singular ones too."""
    factor, failed = torch.linalg.cholesky_ex(a)
    if failed:  # rank-deficient: the square root from eigenvalues instead
        values, vectors = torch.linalg.eigh(a)
        factor = vectors * values.clamp(min=0).sqrt()
    return torch.linalg.eigvalsh(factor.T @ b @ factor).clamp(min=0).sqrt().sum()


def kernel_distance(a: Tensor, b: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """KID (Binkowski et al. 2018): mean and standard deviation, over random subsets, of the unbiased squared MMD with
    the kernel (x.y / D + 1)^3.

    The three kernel matrices are computed once and every subset sums entries of them. `size` is reduced to the
    smaller set where that has fewer samples.
    """
    size = min(size, len(a), len(b))
    if size < 2:
        raise ValueError("a kernel distance needs at least 2 samples on each side")
    a, b = a.double(), b.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    generator = torch.Generator().manual_seed(seed)
    pick_a = torch.zeros(subsets, len(a), dtype=torch.float64)
    pick_b = torch.zeros(subsets, len(b), dtype=torch.float64)
    for i in range(subsets):
        pick_a[i, torch.randperm(len(a), generator=generator)[:size]] = 1
        pick_b[i, torch.randperm(len(b), generator=generator)[:size]] = 1
    of_a, of_b = kernel(a, a).fill_diagonal_(0), kernel(b, b).fill_diagonal_(0)
    same = ((pick_a @ of_a) * pick_a).sum(1) + ((pick_b @ of_b) * pick_b).sum(1)
    cross = ((pick_a @ kernel(a, b)) * pick_b).sum(1)
    values = same / (size * (size - 1)) - 2 * cross / size**2
    return values.mean().item(), values.std(correction=0).item()


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """exp of the mean KL(p(y|x) || p(y)) (Salimans et al. 2016): mean and standard deviation over contiguous splits."""
    if len(logits) < splits:
        raise ValueError(f"an Inception Score over {splits} splits needs as many images, not {len(logits)}")
    scores = []
    for part in logits.double().tensor_split(splits):
        log_p = part.log_softmax(1)
        marginal = log_p.exp().mean(0, keepdim=True)
        divergence = (log_p.exp() * (log_p - marginal.log())).sum(1)
        scores.append(divergence.mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|^2 by one product, negative rounding set to 0; (n, m)."""
    products = torch.addmm(y.square().sum(1).expand(len(x), -1), x, y.T, alpha=-2)
    return products.add_(x.square().sum(1, keepdim=True)).clamp_(min=0)


def neighbour_radii(features: Tensor, k: int = 3, block: int = 4096) -> Tensor:
    """Squared distance of every sample to its k-th nearest other one, (N,)."""
    radii = []
    for rows in features.split(block):
        distances = _squared_distances(rows, features)
        radii.append(distances.topk(k + 1, dim=1, largest=False).values[:, -1])  # the nearest is the sample itself
    return torch.cat(radii)


def precision_recall(real: Tensor, fake: Tensor, k: int = 3, block: int = 4096) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019): the share of fakes inside some real sample's ball, and
    of reals inside some fake's. A ball reaches to the k-th neighbour; inside is strict, as in the papers' code.

    Works in blocks of rows: no N x N matrix is held.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall with k = {k} need more than {k} samples on each side")
    real, fake = real.float(), fake.float()

    def covered(points: Tensor, centres: Tensor, radii: Tensor) -> float:
        inside = 0
        for rows in points.split(block):
            inside += (_squared_distances(rows, centres) < radii).any(1).sum().item()
        return inside / len(points)

    precision = covered(fake, real, neighbour_radii(real, k, block))
    recall = covered(real, fake, neighbour_radii(fake, k, block))
    return precision, recall


def f1(precision: float, recall: float) -> float:
    """Their harmonic mean; 0 when both are."""
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
