"""Scores: closed forms first, then the libraries that published numbers come from, on the same features.

Then how sure a number is: intervals that hold what they say as often as they say, and the floor.
"""

import math

import numpy as np
import pytest
import torch
from conftest import close
from pytorch_fid.fid_score import calculate_frechet_distance

from nanomed.metrics import scores, uncertainty


def sets(n: int, m: int, d: int, shift: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n + m + d)
    mix = torch.randn(d, d, generator=generator) / d**0.5
    a = torch.randn(n, d, generator=generator) @ mix
    b = 1.2 * torch.randn(m, d, generator=generator) @ mix + shift
    return a, b


def covariance(d: int, seed: int) -> torch.Tensor:
    x = torch.randn(d, 3 * d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x @ x.T / (3 * d)


# ------------------------------------------------------------------------------------------------ Frechet distance


def test_frechet_distance_of_gaussians_with_a_closed_form():
    """Equal covariances leave the means; commuting ones add sum (s_a - s_b)^2; a scaled one adds (c - 1)^2 trace."""
    mean, other = torch.tensor([1.0, 0.0, -2.0, 0.5]).double(), torch.zeros(4).double()
    shared = covariance(4, 0)
    assert scores.frechet_from_moments(mean, shared, other, shared) == pytest.approx(5.25, rel=1e-9)
    assert scores.frechet_from_moments(mean, shared, mean, shared) < 1e-6
    sa, sb = torch.tensor([1.0, 4.0, 9.0, 0.0]).double(), torch.tensor([4.0, 1.0, 0.0, 2.0]).double()
    expected = 5.25 + ((sa.sqrt() - sb.sqrt()) ** 2).sum().item()
    assert scores.frechet_from_moments(mean, torch.diag(sa), other, torch.diag(sb)) == pytest.approx(expected, rel=1e-9)
    turn = torch.linalg.qr(covariance(4, 1))[0]  # the same in other axes, singular as before
    turned = [turn @ torch.diag(s) @ turn.T for s in (sa, sb)]
    assert scores.frechet_from_moments(mean, turned[0], other, turned[1]) == pytest.approx(expected, rel=1e-6)
    wide = scores.frechet_from_moments(other, 9 * shared, other, shared)
    assert wide == pytest.approx(4 * shared.trace().item(), rel=1e-9)


def test_frechet_distance_of_samples_approaches_that_of_their_gaussians():
    mean, a, b = torch.full((8,), 0.5).double(), covariance(8, 2), covariance(8, 3)
    exact = scores.frechet_from_moments(0 * mean, a, mean, b)
    draw = torch.Generator().manual_seed(4)
    x, y = (torch.randn(100_000, 8, dtype=torch.float64, generator=draw) for _ in range(2))
    x, y = x @ torch.linalg.cholesky(a).T, y @ torch.linalg.cholesky(b).T + mean
    assert scores.frechet_distance(x, y) == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("n, m, d", [(500, 400, 32), (2100, 2100, 64), (130, 100, 96)])
def test_frechet_distance_equals_pytorch_fid_and_torchmetrics(n, m, d):
    from torchmetrics.image.fid import _compute_fid

    a, b = sets(n, m, d)
    x, y = a.double().numpy(), b.double().numpy()
    moments = x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False)
    value = scores.frechet_distance(a, b)
    assert value == pytest.approx(calculate_frechet_distance(*moments), rel=1e-6)
    assert value == pytest.approx(_compute_fid(*map(torch.from_numpy, moments)).item(), rel=1e-6)


def test_frechet_distance_equals_torch_fidelity():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    a, b = sets(300, 200, 48)
    theirs = fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b), False)
    assert scores.frechet_distance(a, b) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


@pytest.mark.parametrize("n, m", [(20, 30), (20, 200), (64, 65)])
def test_fewer_samples_than_dimensions_stay_real_and_agree(n, m):
    """Singular covariances: the form from features, the form from moments and a direct product are one number."""
    a, b = sets(n, m, 64)
    (ma, ca), (mb, cb) = scores.moments(a), scores.moments(b)
    value = scores.frechet_distance(a, b)
    assert value == pytest.approx(scores.frechet_from_moments(ma, ca, mb, cb), rel=1e-6)
    product = torch.linalg.eigvals(ca @ cb).real.clamp(min=0).sqrt().sum()
    assert value == pytest.approx(((ma - mb).square().sum() + ca.trace() + cb.trace() - 2 * product).item(), rel=1e-5)


@pytest.mark.parametrize("n, m, d", [(20, 30, 64), (20, 200, 64), (200, 30, 64), (90, 100, 64), (65, 65, 64)])
def test_moments_on_one_side_or_both_give_the_distance_of_features(n, m, d):
    """Of few samples and of many: a covariance of low rank is taken apart at the price of its rank, to the same
    number."""
    a, b = sets(n, m, d)
    value = scores.frechet_distance(a.double(), b.double())
    (ma, ca), (mb, cb) = scores.moments(a), scores.moments(b)
    assert scores.frechet_to_moments(a, mb, scores.factor_of(cb)) == pytest.approx(value, rel=1e-6)
    assert scores.frechet_to_moments(b, ma, scores.factor_of(ca)) == pytest.approx(value, rel=1e-6)
    assert scores.frechet_from_moments(ma, ca, mb, cb) == pytest.approx(value, rel=1e-6)
    assert scores.frechet_from_moments(mb, cb, ma, ca) == pytest.approx(value, rel=1e-6)
    rank = min(n - 1, d)
    factor = scores.factor_of(ca)
    assert factor.shape == (d, rank)
    close(factor @ factor.T, ca, 1e-12)


def test_a_covariance_that_only_pivots_take_apart_is_a_triangle_too(monkeypatch):
    """Of full rank, but so near to less that rounding stops Cholesky; pivots reach the end, in another order."""
    a, b = sets(200, 90, 64)
    covariance, expected = scores.moments(a)[1], scores.frechet_distance(b, a)
    plain = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda x: (plain(x)[0], torch.tensor(1)))
    factor = scores.factor_of(covariance)
    assert factor.shape == (64, 64) and not factor.triu(1).any()
    close(factor @ factor.T, covariance, 1e-12)
    assert scores.frechet_to_moments(b, a.double().mean(0), factor) == pytest.approx(expected, rel=1e-6)


def test_moments_of_few_samples_cost_no_more_than_their_features():
    """50 samples of 1,024 dimensions: eigenvalues of a covariance would cost 20 times as much."""
    import time

    a, b = sets(50, 60, 1024)
    (ma, ca), (mb, cb) = scores.moments(a), scores.moments(b)

    def seconds(call) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)

    from_moments = seconds(lambda: scores.frechet_from_moments(ma, ca, mb, cb))
    assert from_moments < seconds(lambda: torch.linalg.eigvalsh(ca)) / 2


@pytest.mark.parametrize("n, m, d", [(60, 40, 128), (40, 90, 128), (60, 300, 128), (140, 300, 128), (140, 50, 128)])
def test_distances_of_some_rows_are_those_of_these_rows_alone(n, m, d):
    """Of all rows and without some, against the distance of features, whichever side has more of them: to 1e-9 where
    the interval of a distance to statistics was 11 distances of their own."""
    a, b = (x.double() for x in sets(n, m, d))
    mean, factor = scores.mean_and_factor(b)
    distance = scores.distances_to_moments(a, mean, factor)
    for rows in (torch.arange(n), torch.arange(n)[::3], torch.arange(5, n), torch.tensor([7, 2])):
        assert distance(rows) == pytest.approx(scores.frechet_distance(a[rows], b), rel=1e-9)
    far = scores.distances_to_moments(a + 1e3, mean + 1e3, factor)  # a mean far off changes nothing
    assert far(torch.arange(5, n)) == pytest.approx(distance(torch.arange(5, n)), rel=1e-6)


def test_statistics_of_another_network_are_refused():
    with pytest.raises(ValueError, match=r"features \(20, 4\) have no distance to a mean \(5,\)"):
        scores.frechet_to_moments(torch.randn(20, 4), torch.zeros(5), torch.eye(5))


def test_a_set_is_at_distance_0_from_itself_however_degenerate():
    """Full rank, fewer samples than dimensions, dead features, few directions, one image repeated."""
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(5))
    dead = torch.cat([x, torch.zeros(300, 40)], 1)
    narrow = x[:, :5] @ torch.randn(5, 400, generator=torch.Generator().manual_seed(6))
    for features in (x, x[:40], dead, narrow, x[:1].repeat(50, 1)):
        assert 0 <= scores.frechet_distance(features, features) < 1e-6
    assert scores.frechet_distance(x[:1].repeat(50, 1), x[1:2].repeat(9, 1)) == pytest.approx(
        (x[0].double() - x[1].double()).square().sum().item(), rel=1e-9
    )
    alive = scores.frechet_distance(x[:150], x[150:])
    assert scores.frechet_distance(dead[:150], dead[150:]) == pytest.approx(alive, rel=1e-6)


def test_moments_are_numpys_over_more_than_one_block(monkeypatch):
    a, _ = sets(100, 1, 7)
    monkeypatch.setattr(scores, "BLOCK", 33)
    mean, cov = scores.moments(a)
    close(mean, a.double().mean(0), 1e-12)
    close(cov, torch.from_numpy(np.cov(a.double().numpy(), rowvar=False)), 1e-12)


# ------------------------------------------------------------------------------------------------------------- KID


def test_kid_equals_torchmetrics_and_torch_fidelity_on_the_same_subsets(monkeypatch):
    """Subset by subset, in one pass over all pairs and one subset at a time, in tiles smaller than the sets."""
    from torch_fidelity.metric_kid import kernel_mmd
    from torchmetrics.image.kid import poly_mmd

    a, b = sets(90, 70, 16)
    draw = torch.Generator().manual_seed(7)
    few = [(torch.randperm(90, generator=draw)[:20], torch.randperm(70, generator=draw)[:20]) for _ in range(3)]
    many = [(torch.randperm(90, generator=draw)[:50], torch.randperm(70, generator=draw)[:50]) for _ in range(30)]
    monkeypatch.setattr(scores.tiles, "__defaults__", (False, 32))
    for picks in (few, many):
        pairs = [(a[i].double(), b[j].double()) for i, j in picks]
        expected = torch.stack([poly_mmd(x, y) for x, y in pairs])
        fidelity = torch.tensor([kernel_mmd(x.numpy(), y.numpy()) for x, y in pairs])
        values = scores.squared_mmd(a.double(), b.double(), picks)
        torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(values, fidelity, rtol=1e-6, atol=1e-12)
        close(scores.squared_mmd(a, b, picks), expected, 1e-6)  # products in float32, sums in float64


def test_kid_over_subsets():
    """One subset that holds everything leaves nothing to chance; small ones scatter around it; size is reduced."""
    a, b = sets(60, 60, 16)
    whole, deviation = scores.kernel_distance(a, b, subsets=3, size=60)
    assert whole == pytest.approx(scores.squared_mmd(a, b, [(torch.arange(60),) * 2]).item(), rel=1e-9)
    assert deviation < 1e-9 and scores.kernel_distance(a, b, subsets=3) == pytest.approx((whole, 0), abs=1e-9)
    mean, spread = scores.kernel_distance(a, b, subsets=200, size=30)
    assert spread > 0 and mean == pytest.approx(whole, abs=5 * spread / 200**0.5)
    assert scores.kernel_distance(a, b, 5, 30, seed=1) == scores.kernel_distance(a, b, 5, 30, seed=1)


def test_kid_is_unbiased_where_fid_is_not():
    """Two sets of one distribution: the mean of KID over draws is 0 within its error, FID is far from 0."""
    draw = torch.Generator().manual_seed(8)
    values = [[torch.randn(60, 32, generator=draw) for _ in range(2)] for _ in range(40)]
    kid = torch.tensor([scores.kernel_distance(*pair, subsets=1)[0] for pair in values])
    assert abs(kid.mean()) < 3 * kid.std() / 40**0.5
    assert min(scores.frechet_distance(*pair) for pair in values) > 5


# ------------------------------------------------------------------------------------------------- Inception Score


@pytest.mark.parametrize("n", [200, 203])
def test_inception_score_equals_torch_fidelity_in_either_order(n):
    """The same shuffle and the same splits, also where N is no multiple of them."""
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * torch.randn(n, 20, generator=torch.Generator().manual_seed(9))
    for seed in (2020, None):
        theirs = isc_features_to_metric(logits, splits=10, shuffle=seed is not None)
        expected = theirs["inception_score_mean"], theirs["inception_score_std"]
        assert scores.inception_score(logits, seed=seed) == pytest.approx(expected, rel=1e-6)


def test_inception_score_equals_torchmetrics_on_its_own_shuffle():
    """torchmetrics shuffles by torch's global generator; its deviation divides by splits - 1."""
    from torchmetrics.image.inception import InceptionScore

    class Identity(torch.nn.Module):
        def forward(self, x):
            return x

    logits = 3 * torch.randn(200, 20, generator=torch.Generator().manual_seed(10))
    metric = InceptionScore(feature=Identity(), splits=8)
    metric.update(logits.double())
    torch.manual_seed(11)
    mean, deviation = metric.compute()
    torch.manual_seed(11)
    ours = scores.inception_score(logits[torch.randperm(200)], splits=8, seed=None)
    assert ours[0] == pytest.approx(mean.item(), rel=1e-6)
    assert ours[1] * (8 / 7) ** 0.5 == pytest.approx(deviation.item(), rel=1e-6)


def test_inception_score_of_certain_and_of_clueless_predictions():
    assert scores.inception_score(torch.zeros(40, 5), splits=4) == pytest.approx((1.0, 0.0), abs=1e-9)
    certain = 1e4 * torch.eye(10).repeat(4, 1)  # probabilities of exactly 0 count as 0 log 0 = 0
    assert scores.inception_score(certain, splits=4, seed=None)[0] == pytest.approx(10.0, rel=1e-6)


# ----------------------------------------------------------------------- precision and recall, density and coverage


def dense(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x.double()[:, None] - y.double()[None]).square().sum(2)


@pytest.mark.parametrize("block", [7, 50, 4096])
def test_precision_and_recall_follow_their_definition(block):
    """Against the definition written out with full distance matrices in float64."""
    real, fake = sets(120, 90, 8, shift=0.6)
    inside_real = dense(fake, real) < dense(real, real).sort(1).values[:, 3]
    inside_fake = dense(real, fake) < dense(fake, fake).sort(1).values[:, 3]
    expected = [inside.any(1).double().mean().item() for inside in (inside_real, inside_fake)]
    assert scores.precision_recall(real, fake, block=block) == pytest.approx(expected, abs=1e-6)
    assert scores.precision_recall(real, real, block=block) == (1.0, 1.0)
    assert scores.precision_recall(real, real + 100, block=block) == (0.0, 0.0)
    assert scores.f1(0.5, 0.25) == pytest.approx(1 / 3) and scores.f1(0.0, 0.0) == 0.0


@pytest.mark.parametrize("block", [7, 50, 4096])
def test_density_and_coverage_follow_their_definition(block):
    """Naeem et al. 2020, eq. 5 and 6, written out."""
    real, fake = sets(120, 90, 8, shift=0.6)
    radii = dense(real, real).sort(1).values[:, 5]
    inside = dense(fake, real) < radii
    expected = inside.double().sum().item() / (5 * 90), inside.any(0).double().mean().item()
    assert scores.density_coverage(real, fake, block=block) == pytest.approx(expected, abs=1e-6)
    density, coverage = scores.density_coverage(real, real + 1e-3)
    assert density > 1 and coverage == 1.0


def test_precision_and_recall_equal_torch_fidelity():
    """The same k on the same features."""
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    real, fake = sets(150, 130, 8, shift=0.5)
    expected = calculate_precision_recall_full(fake, real, neighborhood=3)
    assert scores.precision_recall(real, fake) == pytest.approx([float(x) for x in expected], abs=1e-6)


def test_a_sample_on_the_edge_of_a_ball_is_outside():
    """On a line of integers every number is exact: strict inequality, as in the papers' code."""
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0]])  # third neighbours at 3, 2, 2, 3
    fake = torch.tensor([[-3.0], [-2.0], [6.0], [5.0], [30.0]])
    assert scores.precision_recall(real, fake)[0] == 2 / 5
    assert scores.density_coverage(real, fake, k=3) == (2 / (3 * 5), 2 / 4)


def test_far_from_the_origin_distances_keep_their_precision():
    """Pooled features have a mean far above their spread, where |x|^2 - 2 x.y + |y|^2 cancels: still the counts of
    float64 differences of the same float32 features."""
    real, fake = (x + 100 for x in sets(400, 300, 8, shift=0.6))
    inside_real = dense(fake, real) < dense(real, real).sort(1).values[:, 3]
    inside_fake = dense(real, fake) < dense(fake, fake).sort(1).values[:, 3]
    expected = [inside.any(1).double().mean().item() for inside in (inside_real, inside_fake)]
    assert scores.precision_recall(real, fake) == pytest.approx(expected, abs=1e-6)


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("call", [
    lambda: scores.frechet_distance(torch.zeros(1, 3), torch.zeros(5, 3)),
    lambda: scores.kernel_distance(torch.zeros(1, 3), torch.zeros(5, 3)),
    lambda: scores.inception_score(torch.zeros(3, 4), splits=10),
    lambda: scores.precision_recall(torch.zeros(3, 4), torch.zeros(9, 4)),
    lambda: scores.density_coverage(torch.zeros(5, 4), torch.zeros(9, 4)),
    lambda: uncertainty.interval(scores.frechet_distance, torch.zeros(5, 4), torch.zeros(9, 4)),
    lambda: uncertainty.floor(scores.frechet_distance, torch.zeros(3, 4), 100),
])  # fmt: skip
def test_too_few_images_are_refused(call):
    with pytest.raises(ValueError, match=r"at least \d+ samples|as many images, not \d+"):
        call()


def test_features_that_are_no_numbers_or_of_two_networks_are_refused():
    good, bad = torch.randn(20, 4), torch.randn(20, 4)
    bad[3, 1] = math.nan
    with pytest.raises(ValueError, match=r"image 3 are not finite \(1 such"):
        scores.frechet_distance(good, bad)
    with pytest.raises(ValueError, match=r"one D, not \(20, 4\) and \(20, 3\)"):
        scores.precision_recall(good, good[:, :3])


# ------------------------------------------------------------------------------------------------------ uncertainty


def gaussians(n: int, d: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets of N Gaussian samples whose Frechet distance is 1 + d / 4: means 1 apart, deviations 1 and 1.5."""
    draw = torch.Generator().manual_seed(seed)
    a, b = torch.randn(n, d, generator=draw), 1.5 * torch.randn(n, d, generator=draw)
    b[:, 0] += 1
    return a, b


def share(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


def test_an_interval_of_a_known_distance_holds_it_as_often_as_it_says():
    """300 draws at level 0.9: the share that holds the truth is within 4 binomial errors (0.07) of 0.9."""
    hits, errors, values = [], [], []
    for seed in range(300):
        pair = gaussians(600, 3, seed)
        low, high = uncertainty.frechet_interval(*pair, level=0.9, seed=seed)
        hits.append(low < 1.75 < high)
        errors.append((high - low) / (2 * 1.833))  # Student's t of 9 degrees at 0.9
        values.append(scores.frechet_distance(*pair))
    assert 0.83 < share(hits) < 0.97
    assert np.mean(np.square(errors)) ** 0.5 == pytest.approx(np.std(values), rel=0.2)  # no wider than it must be


def test_an_interval_of_a_biased_distance_holds_its_expectation_at_this_n():
    """N = 60 in 24 dimensions, where the estimate is far above the true 7: the interval is about where other draws of
    60 land, the floor about how much of it is bias."""
    values = [scores.frechet_distance(*gaussians(60, 24, seed)) for seed in range(400)]
    expected = float(np.mean(values))
    assert expected > 8.5
    hits = []
    for seed in range(150):
        low, high = uncertainty.interval(scores.frechet_distance, *gaussians(60, 24, seed), level=0.9, seed=seed)
        hits.append(low < expected < high)
    assert share(hits) > 0.83


def test_a_bootstrap_would_miss_what_the_jackknife_holds():
    """The reason for the method: resampled sets repeat images, and all of their distances lie above the value."""
    a, b = gaussians(60, 24, 0)
    value, draw = scores.frechet_distance(a, b), torch.Generator().manual_seed(1)
    resampled = [
        scores.frechet_distance(*(x[torch.randint(60, (60,), generator=draw)] for x in (a, b))) for _ in range(40)
    ]
    assert np.quantile(resampled, 0.05) > value
    low, high = uncertainty.interval(scores.frechet_distance, a, b)
    assert low < value < high


def test_the_frechet_interval_from_downdated_moments_is_the_general_one():
    a, b = gaussians(103, 8, 2)
    general = uncertainty.interval(scores.frechet_distance, a, b, groups=7, seed=3)
    assert uncertainty.frechet_interval(a, b, groups=7, seed=3) == pytest.approx(general, rel=1e-9)


def test_the_kernel_interval_is_the_jackknife_of_the_whole_and_covers_0_for_equal_sets():
    """Against the statistic evaluated anew without each group; then 200 pairs of one distribution at level 0.9."""

    def mmd(x, y):
        k = scores.polynomial_kernel
        n, m = len(x), len(y)
        same = k(x, x).fill_diagonal_(0).sum() / (n * (n - 1)) + k(y, y).fill_diagonal_(0).sum() / (m * (m - 1))
        return (same - 2 * k(x, y).mean()).item()

    a, b = (x.double() for x in gaussians(50, 4, 4))  # the statistic itself adds up in the features' own precision
    general = uncertainty.interval(mmd, a, b[:41], groups=6, seed=5, support=(-math.inf, math.inf))
    assert uncertainty.kernel_interval(a, b[:41], groups=6, seed=5) == pytest.approx(general, rel=1e-9)
    hits = []
    for seed in range(200):
        draw = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(40, 4, generator=draw) for _ in range(2))
        low, high = uncertainty.kernel_interval(x, y, groups=10, level=0.9, seed=seed)
        hits.append(low < 0 < high)
    assert share(hits) > 0.83


def test_several_numbers_share_their_evaluations_and_stay_in_their_range():
    real, fake = sets(80, 60, 4, shift=0.2)
    calls = []

    def both(x, y):
        calls.append((len(x), len(y)))
        return scores.precision_recall(x, y)

    found = uncertainty.intervals(both, real, fake, groups=5, support=(0.0, 1.0))
    assert calls == [(80, 60)] + [(64, 48)] * 5
    for value, (low, high) in zip(scores.precision_recall(real, fake), found):
        assert 0 <= low <= value <= high <= 1
    single = uncertainty.interval(lambda x, y: both(x, y)[1], real, fake, groups=5, support=(0.0, 1.0))
    assert single == found[1]


@pytest.mark.parametrize("n, m, shift", [(80, 63, 0.2), (300, 200, 0.6), (90, 90, 0.0)])
def test_neighbour_intervals_in_one_pass_are_those_of_evaluating_anew(n, m, shift, monkeypatch):
    """Value and interval of all five numbers, against the general jackknife with the same groups, over many tiles."""
    real, fake = sets(n, m, 5, shift)
    monkeypatch.setattr(scores.tiles, "__defaults__", (False, 37))

    def five(x, y):
        precision, recall = scores.precision_recall(x, y)
        return precision, recall, scores.f1(precision, recall), *scores.density_coverage(x, y)

    expected = uncertainty.intervals(five, real, fake, groups=7, level=0.8, seed=4)
    found = uncertainty.neighbour_intervals(real, fake, groups=7, level=0.8, seed=4)
    assert list(found) == ["precision", "recall", "f1", "density", "coverage"]
    for name, value, (low, high), (ours, ends) in zip(found, five(real, fake), expected, found.values()):
        top = math.inf if name == "density" else 1.0
        assert ours == pytest.approx(value, abs=1e-9)
        assert ends == pytest.approx((low, min(high, top)), abs=1e-6), name


def test_an_interval_for_a_mean_is_students():
    from scipy import stats

    parts = torch.tensor([1.0, 2.0, 4.0, 8.0])
    expected = stats.t.interval(0.95, 3, loc=3.75, scale=stats.sem(parts.numpy()))
    assert uncertainty.mean_interval(parts) == pytest.approx(expected, rel=1e-6)


def test_the_floor_compares_disjoint_real_images_and_says_how_many():
    real = torch.arange(20.0)[:, None]

    def shared_or_short(x, y):
        return float(len(set(x.flatten().tolist()) & set(y.flatten().tolist()))) + 100 * (len(x) != len(y))

    assert uncertainty.floor(shared_or_short, real, 7) == (0.0, 7)
    assert uncertainty.floor(shared_or_short, real, 500) == (0.0, 10)
    x = torch.randn(400, 24, generator=torch.Generator().manual_seed(6))
    at_30, at_150 = (uncertainty.floor(scores.frechet_distance, x, n)[0] for n in (30, 150))
    assert at_30 > 3 * at_150 > 0  # the bias falls as 1 / N
