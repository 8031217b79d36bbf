"""The protocol imageclef2024 against the organisers' computation, restated with the functions it is made of: np.resize,
np.cov, scipy's sqrtm and a loop over groups. And why its values are small."""

import numpy as np
import pytest
import torch
from conftest import close
from scipy.linalg import sqrtm

from nanomed.metrics import clef
from nanomed.metrics.networks import inception


def softmax_sets(n: int, m: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(n + m)
    bias = torch.randn(classes, generator=draw)
    real = (2 * torch.randn(n, classes, generator=draw)).softmax(1)
    return real, (2 * torch.randn(m, classes, generator=draw) + bias).softmax(1)


# ---------------------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("shape", [
    (256, 256, 3), (720, 576, 3), (299, 299, 3), (16, 16, 3), (1, 1, 3), (300, 299, 3), (256, 256), (64, 64, 4),
])  # fmt: skip
def test_rewrapping_is_numpys_resize_bit_for_bit(shape):
    """Short images repeat, long ones are cut; grey and transparent ones are read as the bytes they are."""
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    expected = np.resize(image, (299, 299, 3))
    found = clef.rewrap(image)
    assert found.dtype == np.uint8 and np.array_equal(found, expected)
    turned = np.rot90(image)  # not contiguous
    assert np.array_equal(clef.rewrap(turned), np.resize(turned, (299, 299, 3)))


def test_a_long_image_is_not_copied_and_its_lower_rows_do_not_count():
    """720 x 576: 268,203 values are the first 124 rows and most of the next; 1280 x 1024 ends in row 70."""
    for height, width, rows in ((576, 720, 124), (1024, 1280, 69), (1072, 1920, 46)):
        image = np.zeros((height, width, 3), np.uint8)
        image[rows + 1 :] = 255
        assert np.shares_memory(clef.rewrap(image), image)
        assert not clef.rewrap(image).any()
        image[rows] = 9
        assert clef.rewrap(image)[-1, -1, -1] == 9
    with pytest.raises(ValueError, match="no pixels"):
        clef.rewrap(np.zeros((0, 5, 3), np.uint8))


def test_the_classifier_sees_minus_one_to_one_channels_first_in_batches():
    """Keras's preprocessing of Inception: x / 127.5 - 1. Any classifier can be plugged in; order and sizes are kept."""
    rng = np.random.default_rng(1)
    images = [
        rng.integers(0, 256, (*size, 3), np.uint8) for size in ((20, 30), (400, 310), (20, 30), (7, 5), (299, 299))
    ]
    images[0][:], images[2][:] = 0, 255
    batches = []

    def classify(x):
        batches.append(len(x))
        return torch.cat([x.mean((2, 3)), x[:, :, 0, 1]], 1).softmax(1)

    p = clef.probabilities(classify, iter(images), batch=2)
    assert batches == [2, 2, 1] and p.dtype == torch.float64
    resized = np.stack([np.resize(image, (299, 299, 3)) for image in images]).astype(np.float64) / 127.5 - 1
    expected = torch.from_numpy(np.concatenate([resized.mean((1, 2)), resized[:, 0, 1]], 1)).softmax(1)
    close(p, expected, 1e-6)
    assert clef.prepare(images[:1]).unique().item() == -1 and clef.prepare(images[2:3]).unique().item() == 1
    with pytest.raises(ValueError, match="no images"):
        clef.probabilities(classify, [])


def test_the_inception_at_hand_gives_its_thousand_classes():
    """Outputs 1 to 1000 of 1008, with the bias that the Inception Score of the FID world leaves out."""
    torch.manual_seed(0)
    network = inception.Inception().requires_grad_(False)
    torch.nn.init.normal_(network.fc.bias)
    network.fast()
    image = np.random.default_rng(2).integers(0, 256, (64, 64, 3), np.uint8)
    p = clef.probabilities(clef.of_inception(network), [image, image // 2])
    assert p.shape == (2, 1000)
    logits = network(clef.prepare([image, image // 2]))[1] + network.fc.bias
    close(p, logits[:, 1:1001].softmax(1), 1e-6)


# ---------------------------------------------------------------------------------------------------------- numbers


def test_their_fid_is_the_frechet_distance_of_probabilities():
    real, fake = softmax_sets(400, 300, 20)
    a, b = real.double().numpy(), fake.double().numpy()
    sa, sb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = sqrtm(sa @ sb).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sa + sb - 2 * root)
    assert clef.frechet(real, fake) == pytest.approx(expected, rel=1e-4)  # sqrtm of a singular product: 1e-5 at best
    assert clef.frechet(real, real) < 1e-6


def test_it_is_at_most_2_and_two_sets_without_a_class_in_common_reach_it():
    """Disjoint certainties over k classes: |dm|^2 = 2 / k and traces 2 (1 - 1/k) with n / (n - 1), no common part."""
    n, half = 500, 250
    certain = torch.eye(1000, dtype=torch.float64)[:n]
    covariance = n / (n - 1)
    worst = clef.frechet(certain, torch.eye(1000, dtype=torch.float64)[n:])
    assert worst == pytest.approx(2 / n + 2 * (1 - 1 / n) * covariance, rel=1e-9)
    assert worst <= 2 * covariance
    one = torch.eye(10, dtype=torch.float64)[[0] * half]
    other = torch.eye(10, dtype=torch.float64)[[1] * half]
    assert clef.frechet(one, other) == pytest.approx(2.0, rel=1e-9)
    for seed in range(5):
        real, fake = softmax_sets(100 + seed, 90, 1000)
        assert 0 <= clef.frechet(real, fake) <= 2 * 90 / 89


def test_doubts_spread_alike_are_near_0_however_different_the_images():
    """Why published values are near 0.1: an ImageNet classifier is unsure of all endoscopic images alike."""
    real, fake = softmax_sets(500, 500, 1000)
    assert clef.frechet(real, fake) < 0.1


@pytest.mark.parametrize("n", [100, 107])
def test_their_inception_score_is_of_contiguous_groups(n):
    """floor(N / 10) images a group in the given order, the remainder left out; mean, deviation and median."""
    p = softmax_sets(n, 5, 30)[0]
    expected = []
    for i in range(10):
        part = p.double().numpy()[i * (n // 10) : (i + 1) * (n // 10)]
        divergence = part * (np.log(part + 1e-16) - np.log(part.mean(0, keepdims=True) + 1e-16))
        expected.append(np.exp(divergence.sum(1).mean()))
    close(clef.group_scores(p), torch.tensor(expected), 1e-9)
    stated = np.mean(expected), np.std(expected), np.median(expected)
    assert clef.inception_score(p) == pytest.approx(stated, rel=1e-9)


def test_certain_predictions_score_the_number_of_classes_and_order_matters():
    sorted_by_class = torch.eye(10).repeat_interleave(10, 0)
    assert clef.inception_score(sorted_by_class)[0] == pytest.approx(1.0, abs=1e-9)
    assert clef.inception_score(torch.eye(10).repeat(10, 1))[0] == pytest.approx(10.0, rel=1e-6)


def test_logits_features_and_too_few_images_are_refused():
    real, fake = softmax_sets(20, 20, 10)
    for bad in (3 * real, real - 0.5):
        with pytest.raises(ValueError, match="rows must be >= 0 and sum to 1"):
            clef.frechet(bad, fake)
    with pytest.raises(ValueError, match="at least 10 samples"):
        clef.inception_score(real[:9])
