"""Numbers from features: Frechet and kernel distance, Inception Score, precision and recall, density and coverage.

Features are (N, D) tensors of one network under one protocol; where they come from is features.py's business, how sure
a number is uncertainty.py's. Everything works in blocks, so that memory grows with N and never with N^2, and sums are
taken in float64. Nothing here calls `sqrtm`: traces of square roots are sums of singular values, which are real.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

BLOCK = 1024  # rows at a time: a 1024 x 1024 tile of float64 is 8 MB


def check(least: int, *sets: Tensor) -> None:
    """Raise ValueError unless every set of features is (N >= least, D), of one D and finite."""
    for features in sets:
        if features.ndim != 2 or features.shape[1] != sets[0].shape[1]:
            raise ValueError(
                f"features must be (N, D) with one D, not {' and '.join(str(tuple(s.shape)) for s in sets)}"
            )
        if len(features) < least:
            raise ValueError(
                f"needs at least {least} samples on each side, not {' and '.join(str(len(s)) for s in sets)}"
            )
        sound = torch.cat([rows.isfinite().all(1) for rows in features.split(BLOCK)])
        if not sound.all():
            rows = (~sound).nonzero().flatten()
            raise ValueError(f"features of image {rows[0]} are not finite ({len(rows)} such images)")


# ------------------------------------------------------------------------------------------------ Frechet distance


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D, D) in float64."""
    mean = sum(rows.double().sum(0) for rows in features.split(BLOCK)) / len(features)
    scatter = features.new_zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    for rows in features.split(BLOCK):
        centred = rows.double() - mean
        scatter.addmm_(centred.T, centred)
    return mean, scatter / (len(features) - 1)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of the Gaussians fitted to two sets of features (Heusel et al.
    2017, eq. 6). Any N >= 2, singular covariances included; with few samples the estimate is biased upwards.
    """
    check(2, a, b)
    if min(len(a), len(b)) > a.shape[1]:
        return frechet_from_moments(*moments(a), *moments(b))
    (mean_a, factor_a), (mean_b, factor_b) = mean_and_factor(a), mean_and_factor(b)
    within = factor_a.square().sum() + factor_b.square().sum() - 2 * _common(factor_a, factor_b)
    return max(((mean_a - mean_b).square().sum() + within).item(), 0.0)


def frechet_from_moments(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """The same from means (D,) and covariances (D, D). Those of fewer samples than dimensions are taken apart at the
    price of their rank."""
    cov_a, cov_b = cov_a.double(), cov_b.double()
    factor = factor_of(cov_a)
    if factor.shape[1] < len(cov_a):  # of low rank: the other side need not be taken apart
        common = _sum_of_singular_values(factor.T @ cov_b @ factor, lambda: factor.T @ factor_of(cov_b))
    elif (other := factor_of(cov_b)).shape[1] < len(cov_b):
        common = _sum_of_singular_values(other.T @ cov_a @ other, lambda: other.T @ factor)
    else:
        common = _sum_of_singular_values(_congruence(factor, cov_b), lambda: factor.T @ other)
    within = cov_a.trace() + cov_b.trace() - 2 * common
    return max(((mean_a.double() - mean_b.double()).square().sum() + within).item(), 0.0)


def frechet_to_moments(features: Tensor, mean: Tensor, factor: Tensor) -> float:
    """The same of features (N >= 2, D) to the Gaussian of a mean (D,) and a covariance F F^T, such as a file of
    statistics holds; F (D, r) is what `factor_of` makes of the covariance."""
    return distances_to_moments(features, mean, factor)(torch.arange(len(features)))


def distances_to_moments(features: Tensor, mean: Tensor, factor: Tensor) -> Callable[[Tensor], float]:
    """`frechet_to_moments` of some of the features, as a function of their indices. Of fewer features than dimensions
    the one large product is made here, for whatever is chosen among them; each choice costs its eigenvalues."""
    check(2, features)
    if features.shape[1:] != mean.shape or len(factor) != len(mean):
        shapes = f"a mean {tuple(mean.shape)} and a covariance {(len(factor),) * 2}"
        raise ValueError(f"features {tuple(features.shape)} have no distance to {shapes}")
    mean, trace, (n, width) = mean.double(), factor.square().sum(), features.shape

    def distance(own: Tensor, own_trace: Tensor, common: Tensor) -> float:
        return max(((own - mean).square().sum() + own_trace + trace - 2 * common).item(), 0.0)

    if n > width:

        def of_many(rows: Tensor) -> float:
            if len(rows) <= width:
                return frechet_to_moments(features[rows], mean, factor)
            own, covariance = moments(features[rows])
            triangular = factor.shape[1] == width
            gram = _congruence(factor, covariance) if triangular else factor.T @ covariance @ factor
            common = _sum_of_singular_values(gram, lambda: factor.T @ factor_of(covariance))
            return distance(own, covariance.trace(), common)

        return of_many

    middle = features.double().mean(0)
    x = features.double() - middle
    product = _times(x, factor)  # (N, r)
    gram = product @ product.T

    def of_few(rows: Tensor) -> float:
        own, m = x[rows].mean(0), len(rows)
        own_trace = (x[rows].square().sum() - m * own.square().sum()) / (m - 1)
        if m - 1 > product.shape[1]:  # the smaller of the two has no eigenvalues that are rounding alone
            part = _centred(product[rows])
            square = part.T @ part
        else:
            square = _centred(_centred(gram[rows][:, rows]).T)
        common = _sum_of_singular_values(square, lambda: _centred(product[rows])) / (m - 1) ** 0.5
        return distance(own + middle, own_trace, common)

    return of_few


def _common(factor_a: Tensor, factor_b: Tensor) -> Tensor:
    """tr (S_a S_b)^(1/2) from factors (D, r) of the two, at the price of the smaller rank."""
    product = factor_a.T @ factor_b
    if product.shape[0] > product.shape[1]:
        product = product.T
    return _sum_of_singular_values(product @ product.T, lambda: product)


def mean_and_factor(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, and a matrix F (D, r) with F F^T = S."""
    n, width = features.shape
    if n > width:
        mean, covariance = moments(features)
        return mean, factor_of(covariance)
    x = features.double()
    return x.mean(0), _centred(x).T / (n - 1) ** 0.5


def _centred(x: Tensor) -> Tensor:
    """n - 1 rows (n - 1, D) with the scatter that x (n, D) has about its mean.

    The reflection that takes (1, ..., 1) / sqrt(n) to the first axis moves the whole mean into the first row; the rows
    that remain have the scatter of the centred ones, without the null direction that subtracting the mean leaves."""
    root = len(x) ** 0.5
    return x[1:] - (root * x.mean(0) - x[0]) / (root - 1)


def factor_of(covariance: Tensor) -> Tensor:
    """F with F F^T = S: Cholesky's lower triangle, or (D, r) where S is of rank r < D, from Cholesky with pivots, which
    ends where what is left is rounding. That the upper left quarter has no triangle tells at an eighth of the price.
    What S is, a covariance in float64, is taken on trust."""
    half = len(covariance) // 2
    failed = bool(torch.linalg.cholesky_ex(covariance[:half, :half])[1]) if half else False
    if not failed:
        factor, last = torch.linalg.cholesky_ex(covariance)
        failed = bool(last)
    if failed:
        rows, pivots, rank, _ = lapack.dpstrf(covariance.cpu().numpy(), lower=1)
        factor = torch.zeros(len(covariance), rank, dtype=torch.float64)
        factor[torch.from_numpy(pivots).long() - 1] = torch.from_numpy(rows[:, :rank]).tril()
        if rank == len(covariance):  # it was rounding that failed: of full rank, whose rows the pivots have exchanged
            factor = torch.linalg.qr(factor.T).R.T
        factor = factor.to(covariance.device)
    return factor


def _times(x: Tensor, factor: Tensor, block: int = 256) -> Tensor:
    """x F (n, r); of a square F, which is lower triangular, half of the multiplications."""
    width, rank = factor.shape
    if rank < width:
        return x @ factor
    return torch.cat([x[:, i:] @ factor[i:, i : i + block] for i in range(0, width, block)], 1)


def _congruence(factor: Tensor, covariance: Tensor, block: int = 256) -> Tensor:
    """F^T S F of a lower-triangular F, on and below the diagonal, which is all that eigvalsh reads: a third of the
    multiplications of the two products."""
    right, out = _times(covariance, factor, block), torch.zeros_like(covariance)
    for i in range(0, len(factor), block):
        out[i : i + block, : i + block] = factor[i:, i : i + block].T @ right[i:, : i + block]
    return out


def _sum_of_singular_values(gram: Tensor, product: Callable[[], Tensor]) -> Tensor:
    """tr (S_a S_b)^(1/2) is this sum for P = F_a^T F_b, given P P^T (or the like from F_a and S_b).

    Square roots of the eigenvalues of P P^T are the singular values at a fraction of the price, but squaring blurs
    those below 1e-8 of the largest by as much. Where so many are that their sum could be seen, svdvals of P.
    """
    if not len(gram):  # a side without variance
        return gram.sum()
    values = torch.linalg.eigvalsh(gram).clamp(min=0)
    blurred = (values < 1e-16 * values[-1]).sum() * 1e-8 * values[-1].sqrt()
    if blurred > 1e-7 * values.sqrt().sum():
        return torch.linalg.svdvals(product()).sum()
    return values.sqrt().sum()


# ------------------------------------------------------------------------------------------------- kernel distance


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x.y / D + 1)^3 of every pair, KID's kernel (Binkowski et al. 2018); (n, m) in float64, from products in the
    precision of the features: their rounding is 1e-7 a pair, has no bias and averages out over the pairs of a sum."""
    products = (x @ y.T).double().div_(x.shape[1]).add_(1)
    return products.square().mul_(products)


def kernel_distance(a: Tensor, b: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """KID (Binkowski et al. 2018): mean and (population) standard deviation, over random subsets drawn without
    replacement from each set, of the unbiased squared MMD with the kernel (x.y / D + 1)^3.

    `size` is reduced to the smaller set where that has fewer samples. Values near 0 may be negative. The deviation says
    how subsets differ, not how sure the mean is: that is `uncertainty.kernel_interval`.
    """
    check(2, a, b)
    size = min(size, len(a), len(b))
    generator = torch.Generator().manual_seed(seed)
    picks = [tuple(torch.randperm(len(x), generator=generator)[:size] for x in (a, b)) for _ in range(subsets)]
    values = squared_mmd(a, b, picks)
    return values.mean().item(), values.std(correction=0).item()


def squared_mmd(a: Tensor, b: Tensor, picks: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Unbiased squared MMD of every pair of subsets of equal size, given by their indices; (len(picks),) in float64.

    Subsets that together repeat more pairs than there are share one pass over all pairs; few small subsets of large
    sets are taken one by one.
    """
    size = len(picks[0][0])
    if len(picks) * size**2 < max(len(a), len(b)) ** 2:
        return torch.stack([_one_mmd(a[i], b[j]) for i, j in picks])
    chosen_a = torch.zeros(len(picks), len(a), dtype=torch.float64, device=a.device)
    chosen_b = torch.zeros(len(picks), len(b), dtype=torch.float64, device=b.device)
    for row, (i, j) in enumerate(picks):
        chosen_a[row, i], chosen_b[row, j] = 1, 1
    same = _kernel_sums(a, a, chosen_a, chosen_a) + _kernel_sums(b, b, chosen_b, chosen_b)
    return same / (size * (size - 1)) - 2 * _kernel_sums(a, b, chosen_a, chosen_b) / size**2


def _one_mmd(a: Tensor, b: Tensor) -> Tensor:
    n = len(a)
    same = sum(polynomial_kernel(x, x).fill_diagonal_(0).sum() for x in (a, b))
    return same / (n * (n - 1)) - 2 * polynomial_kernel(a, b).sum() / n**2


def _kernel_sums(x: Tensor, y: Tensor, chosen_x: Tensor, chosen_y: Tensor) -> Tensor:
    """For every row of the two 0/1 choices the sum of the kernel over the chosen pairs; (len(chosen_x),). A set paired
    with itself leaves its diagonal out, and computes one of each two mirrored tiles."""
    total, itself = x.new_zeros(len(chosen_x), dtype=torch.float64), y is x
    for i, j in tiles(len(x), len(y), itself):
        kernel = polynomial_kernel(x[i], y[j])
        if itself and i == j:
            kernel.fill_diagonal_(0)
        twice = 2 if itself and i != j else 1
        total += twice * ((chosen_x[:, i] @ kernel) * chosen_y[:, j]).sum(1)
    return total


def gaussian_kernel(x: Tensor, y: Tensor, sigma: float = 10.0) -> Tensor:
    """exp(-|x - y|^2 / (2 sigma^2)) - 1 of the directions x and y of every pair, CMMD's kernel (Jayasumana et al. 2024)
    less one; (n, m) in float64. For vectors of length 1 and their sigma of 10 it lies within 0.02 of 0, where float32
    products leave 1e-9 of error; the one that is left out cancels in every MMD."""
    x, y = unit(x), unit(y)  # of a tile at a time: directions of all would be another copy of the features
    squares = [torch.linalg.vector_norm(z, dim=1, dtype=torch.float64).square_() for z in (x, y)]
    return (x @ y.T).double().mul_(-2).add_(squares[0][:, None] + squares[1]).mul_(-1 / (2 * sigma**2)).expm1_()


def cmmd(a: Tensor, b: Tensor) -> float:
    """CMMD (Jayasumana et al. 2024, section 4) of CLIP embeddings (N, D): 1000 times the squared MMD of their
    directions, pairs of an image with itself included, as the authors' code has it. In tiles: memory does not grow with
    N. Raises ValueError for an embedding without a direction.
    """
    check(1, a, b)
    for features in (a, b):
        lengths(features)

    def mean(x: Tensor, y: Tensor) -> Tensor:
        total, itself = x.new_zeros((), dtype=torch.float64), y is x
        for i, j in tiles(len(x), len(y), itself):
            total += gaussian_kernel(x[i], y[j]).sum() * (2 if itself and i != j else 1)
        return total / (len(x) * len(y))

    return 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b)).item()


def unit(features: Tensor) -> Tensor:
    """Features (N, D) over their lengths. Raises ValueError for one of length 0, which has no direction."""
    return features / lengths(features).to(features.dtype)


def lengths(features: Tensor) -> Tensor:
    """Of features (N, D), (N, 1) in float64. Raises ValueError for one of length 0."""
    blocks = features.split(BLOCK)
    found = torch.cat([torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64) for x in blocks])
    if not found.all():
        raise ValueError(f"features of image {found.flatten().argmin().item()} are all 0, so it has no direction")
    return found


def clip_scores(images: Tensor, texts: Tensor) -> Tensor:
    """2.5 max(cos, 0) of every image's embedding (N, D) and its prompt's (N, D) (Hessel et al. 2021, eq. 1); (N,)."""
    check(1, images, texts)
    if len(images) != len(texts):
        raise ValueError(f"{len(images)} images have no score with {len(texts)} prompts")
    return 2.5 * (unit(images).double() * unit(texts).double()).sum(1).clamp(min=0)


def tiles(n: int, m: int, mirrored: bool = False, block: int = BLOCK) -> Iterator[tuple[slice, slice]]:
    """Tiles of an n x m table as (rows, columns); of a symmetric table, those on and above the diagonal."""
    for top in range(0, n, block):
        for left in range(top if mirrored else 0, m, block):
            yield slice(top, min(top + block, n)), slice(left, min(left + block, m))


# ------------------------------------------------------------------------------------------------- Inception Score


def split_scores(logits: Tensor, splits: int = 10, seed: int | None = 2020) -> Tensor:
    """exp of the mean KL(p(y|x) || p(y)) (Salimans et al. 2016) of every split; (splits,) in float64.

    Split i holds images floor(i N / splits) to floor((i + 1) N / splits), in the order that NumPy's RandomState(seed)
    deals (2020 is torch-fidelity's) or, with seed None, as they come.
    """
    check(splits, logits)
    if seed is not None:
        logits = logits[torch.from_numpy(np.random.RandomState(seed).permutation(len(logits)))]
    n, scores = len(logits), []
    for i in range(splits):
        log_p = logits[i * n // splits : (i + 1) * n // splits].double().log_softmax(1)
        marginal = log_p.exp().mean(0).log()
        divergence = (log_p.exp() * (log_p - marginal)).nan_to_num(nan=0.0).sum(1)  # 0 log 0 = 0
        scores.append(divergence.mean().exp())
    return torch.stack(scores)


def inception_score(logits: Tensor, splits: int = 10, seed: int | None = 2020) -> tuple[float, float]:
    """Mean and population standard deviation of the score over splits: torch-fidelity's number.

    torchmetrics shuffles with torch's global generator, cuts ceil(N / splits) images at a time (so perhaps fewer
    splits) and divides the deviation by splits - 1; its mean is ours where the splits are the same.
    """
    scores = split_scores(logits, splits, seed)
    return scores.mean().item(), scores.std(correction=0).item()


# ----------------------------------------------------------------------- precision and recall, density and coverage


def squared_distances(x: Tensor, y: Tensor, origin: Tensor) -> Tensor:
    """|x_i - y_j|^2 in float32 by one product, negative rounding set to 0; (n, m).

    Both are taken from `origin` (D,), somewhere among them: distances stay and their rounding shrinks.
    """
    x, y = (x - origin).float(), (y - origin).float()
    products = torch.addmm(y.square().sum(1).expand(len(x), -1), x, y.T, alpha=-2)
    return products.add_(x.square().sum(1, keepdim=True)).clamp_(min=0)


def nearest(features: Tensor, count: int, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Squared distances (N, count) from every sample to the nearest ones, itself included, in rising order, and their
    indices (N, count). Mirrored tiles are computed once."""
    check(count, features)
    n, origin = len(features), features.mean(0)
    distances = torch.full((n, count), math.inf, device=features.device)
    indices = torch.zeros(n, count, dtype=torch.long, device=features.device)

    def offer(rows: slice, tile: Tensor, first: int) -> None:
        best, found = tile.topk(min(count, tile.shape[1]), dim=1, largest=False)
        best, order = torch.cat([distances[rows], best], 1).topk(count, dim=1, largest=False)
        distances[rows], indices[rows] = best, torch.cat([indices[rows], found + first], 1).gather(1, order)

    for i, j in tiles(n, n, mirrored=True, block=block):
        tile = squared_distances(features[i], features[j], origin)
        offer(i, tile, j.start)
        if i != j:
            offer(j, tile.T.contiguous(), i.start)
    return distances, indices


def neighbour_radii(features: Tensor, k: int = 3, block: int = BLOCK) -> Tensor:
    """Squared distance of every sample to its k-th nearest other one, (N,)."""
    return nearest(features, k + 1, block)[0][:, k]


def precision_recall(real: Tensor, fake: Tensor, k: int = 3, block: int = BLOCK) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019): the share of fakes inside some real sample's ball, and
    of reals inside some fake's. A ball reaches to the k-th neighbour; inside is strict, as in the papers' code.

    Each of the two self-distances costs half a product and the cross-distances serve both numbers: 2 N^2 D
    multiplications where the dense computation takes 3.
    """
    check(k + 1, real, fake)
    real_radii, fake_radii, origin = neighbour_radii(real, k, block), neighbour_radii(fake, k, block), real.mean(0)
    real_inside = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    fake_inside = torch.zeros(len(fake), dtype=torch.bool, device=real.device)
    for i, j in tiles(len(fake), len(real), block=block):
        distances = squared_distances(fake[i], real[j], origin)
        fake_inside[i] |= (distances < real_radii[j]).any(1)
        real_inside[j] |= (distances < fake_radii[i, None]).any(0)
    return fake_inside.double().mean().item(), real_inside.double().mean().item()


def density_coverage(real: Tensor, fake: Tensor, k: int = 5, block: int = BLOCK) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020): in how many real balls a fake lies on average, over k, and the share of
    real balls that hold a fake. Both near 1 for equal distributions; density may exceed 1."""
    check(k + 1, real, fake)
    radii, origin = neighbour_radii(real, k, block), real.mean(0)
    covered, hits = torch.zeros(len(real), dtype=torch.bool, device=real.device), 0
    for i, j in tiles(len(fake), len(real), block=block):
        inside = squared_distances(fake[i], real[j], origin) < radii[j]
        hits += inside.sum().item()
        covered[j] |= inside.any(0)
    return hits / (k * len(fake)), covered.double().mean().item()


def f1(precision: float, recall: float) -> float:
    """Their harmonic mean; 0 when both are."""
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
