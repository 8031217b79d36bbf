"""Authenticity and the Vendi score against their definitions, pair by pair, and on sets whose answer is known."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import eigvalsh
from scipy.spatial.distance import cdist

from nanomed.metrics import diversity


def cloud(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + 0.3


def authenticity_by_hand(real: np.ndarray, fake: np.ndarray) -> float:
    among = cdist(real, real)
    np.fill_diagonal(among, np.inf)
    across = cdist(fake, real)
    return float(np.mean([row.min() > among[row.argmin()].min() for row in across]))


@pytest.mark.parametrize("n, m, d", [(40, 25, 6), (33, 70, 3), (64, 64, 50), (2, 1, 4)])
@pytest.mark.parametrize("block", [7, 1024])
def test_authenticity_is_its_definition_in_tiles_of_any_size(n, m, d, block):
    real, fake = cloud(n, d, 0), 0.8 * cloud(m, d, 1)
    expected = authenticity_by_hand(real.double().numpy(), fake.double().numpy())
    assert diversity.authenticity(real, fake, block) == expected


def test_copies_are_not_authentic_and_strangers_are():
    real = cloud(50, 8, 2)
    assert diversity.authenticity(real, real) == 0
    assert diversity.authenticity(real, real + 1e-3) == 0
    assert diversity.authenticity(real, real + 100) == 1
    assert diversity.authenticity(real, torch.cat([real[:25], real[:25] + 100])) == 0.5
    assert 0.4 < diversity.authenticity(cloud(2000, 4, 3), cloud(2000, 4, 4)) < 0.6


def test_the_nearest_real_sample_is_found_wherever_it_lies():
    real, fake = cloud(90, 5, 5), cloud(31, 5, 6)
    distances, indices = diversity.closest(real, fake, block=16)
    across = torch.from_numpy(cdist(fake.double().numpy(), real.double().numpy()))
    assert torch.equal(indices, across.argmin(1))
    assert torch.allclose(distances.double().sqrt(), across.amin(1), rtol=1e-4)


def vendi_by_hand(features: np.ndarray) -> float:
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    values = eigvalsh(unit @ unit.T / len(unit))
    values = values[values > 1e-15]
    return float(np.exp(-(values * np.log(values)).sum()))


@pytest.mark.parametrize("n, d", [(30, 50), (50, 30), (1500, 12), (1, 4), (20, 20)])
def test_vendi_is_its_definition_from_whichever_matrix_is_smaller(n, d):
    features = cloud(n, d, n)
    assert diversity.vendi(features) == pytest.approx(vendi_by_hand(features.double().numpy()), rel=1e-9)


def test_vendi_counts_different_samples():
    """1 for one image many times, the number of kinds for orthogonal kinds, and the length of a sample is nothing."""
    axes = torch.eye(6)
    assert diversity.vendi(axes[:1].repeat(9, 1)) == pytest.approx(1)
    assert diversity.vendi(axes) == pytest.approx(6)
    assert diversity.vendi(axes.repeat(5, 1)) == pytest.approx(6)
    uneven = torch.cat([axes[:1].repeat(3, 1), axes[1:2]])  # shares 3/4 and 1/4
    assert diversity.vendi(uneven) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    features = cloud(20, 9, 7)
    assert diversity.vendi(features * torch.rand(20, 1).add(0.1)) == pytest.approx(diversity.vendi(features), rel=1e-6)


def test_what_has_no_answer_is_refused():
    with pytest.raises(ValueError, match="at least 2 samples"):
        diversity.authenticity(cloud(1, 3, 0), cloud(5, 3, 1))
    with pytest.raises(ValueError, match="one D"):
        diversity.authenticity(cloud(4, 3, 0), cloud(5, 2, 1))
    with pytest.raises(ValueError, match="features of image 1 are all 0"):
        diversity.vendi(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="not finite"):
        diversity.vendi(torch.tensor([[1.0, math.nan]]))


# ------------------------------------------------------------------------------------------------------ F-beta curves


def bins(shares, n=1000):
    return torch.cat([torch.full((round(share * n),), i) for i, share in enumerate(shares)])[:, None]


def test_the_curve_of_known_shares_is_its_definition():
    """Sajjadi et al. 2018, eq. 7, by hand for two bins: all real in the first, half of the fakes: precision reaches a
    half with the full recall, and no more."""
    real, fake = bins([1.0, 0.0]), bins([0.5, 0.5])
    points = diversity.curve(real, fake)
    slopes = torch.linspace(1e-6, math.pi / 2 - 1e-6, 1001, dtype=torch.float64).tan()
    assert torch.allclose(points[:, 0], slopes.clamp(max=0.5), atol=1e-12)
    assert torch.allclose(points[:, 1], (0.5 / slopes).clamp(max=1.0), atol=1e-12)
    for beta in (8, 1 / 8):  # the best point is precision 0.5 with recall 1
        assert diversity.f_beta(points, beta) == pytest.approx((1 + beta**2) * 0.5 / (beta**2 * 0.5 + 1), abs=2e-3)
    assert diversity.f_beta(points, 8) > 0.98 > 0.51 > diversity.f_beta(points, 1 / 8)


def test_a_missing_half_costs_recall_and_a_foreign_half_costs_precision():
    half, whole = bins([1.0, 0.0]), bins([0.5, 0.5])
    lacks, adds = diversity.curve(whole, half), diversity.curve(half, whole)
    assert diversity.f_beta(lacks, 8) == pytest.approx(diversity.f_beta(adds, 1 / 8), abs=2e-3)
    assert diversity.f_beta(lacks, 8) < 0.52 and diversity.f_beta(lacks, 1 / 8) > 0.98


def test_equal_sets_fill_the_square_and_disjoint_ones_nothing():
    same = bins([0.25, 0.75])
    assert diversity.f_beta(diversity.curve(same, same), 8) == pytest.approx(1, abs=2e-3)
    assert diversity.curve(bins([1.0]), bins([0.0, 1.0])).max() == 0


def test_clusters_find_separated_groups_whatever_the_start():
    draw = torch.Generator().manual_seed(0)
    centres = 100 * torch.eye(4)
    real, fake = (centres[torch.arange(80) % n] + torch.randn(80, 4, generator=draw) for n in (4, 2))
    a, b = diversity.clusters(real, fake, 4, repeats=3)
    points = diversity.curve(a, b)
    assert a.shape == b.shape == (80, 3)
    assert diversity.f_beta(points, 1 / 8) > 0.98 and diversity.f_beta(points, 8) < 0.52
    again = diversity.clusters(real, fake, 4, repeats=3)
    assert torch.equal(a, again[0]) and torch.equal(b, again[1])
