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
