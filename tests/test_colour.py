"""Colour drift: closed forms on flat images, torch and scipy on random ones."""

import colorsys

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from nanomed.metrics.colour import BINS, drift, measure


def random_images(seed: int, n: int = 6, low: int = 0, high: int = 256) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(5, 40, (n, 2))
    return [rng.integers(low, high, (int(h), int(w), 3), dtype=np.uint8) for h, w in sizes]


def flat(*colour: int, size: tuple[int, int] = (4, 6)) -> np.ndarray:
    return np.broadcast_to(np.uint8(colour), (*size, 3)).copy()


def test_statistics_equal_torch_per_image_and_channel():
    """Mean and unbiased standard deviation of each image, as eq. 4 takes them, to 1e-9."""
    images = random_images(0)
    found = measure(images)
    for i, image in enumerate(images):
        x = torch.from_numpy(image).double().flatten(0, 1)  # (H W, 3)
        assert found.means[i] == pytest.approx(x.mean(0).numpy(), rel=1e-9)
        assert found.stds[i] == pytest.approx(x.std(0, correction=1).numpy(), rel=1e-9)


def test_hldf_is_equation_4_between_the_averages_of_the_sets():
    """With pixels in [-1, 1], computed by torch from the definition; a third of it is the released code's mean."""
    real, fake = random_images(1, 5), random_images(2, 8, 30, 200)

    def averages(images: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        scaled = [torch.from_numpy(x).double().flatten(0, 1) / 127.5 - 1 for x in images]
        return torch.stack([x.mean(0) for x in scaled]).mean(0), torch.stack([x.std(0) for x in scaled]).mean(0)

    (m, s), (n, t) = averages(real), averages(fake)
    found = drift(measure(real), measure(fake))
    assert found["hldf"] == pytest.approx(((m - n).square() + (s - t).square()).sum().item(), rel=1e-9)
    released = torch.nn.functional.mse_loss(m, n) + torch.nn.functional.mse_loss(s, t)
    assert found["hldf"] / 3 == pytest.approx(released.item(), rel=1e-9)
    assert found["mean"] == pytest.approx(((n - m) * 127.5).tolist(), rel=1e-9)
    assert found["mean_abs"] == pytest.approx((n - m).abs().mean().item() * 127.5, rel=1e-9)
    assert found["std_abs"] == pytest.approx((t - s).abs().mean().item() * 127.5, rel=1e-9)


def test_flat_images_have_a_closed_form():
    """Red 10 brighter: the mean moves by it, nothing else but the histograms by as much."""
    found = drift(measure([flat(100, 50, 50)]), measure([flat(110, 50, 50), flat(110, 50, 50)]))
    assert found["mean"] == [10, 0, 0] and found["std"] == [0, 0, 0]
    assert found["hldf"] == pytest.approx((10 / 127.5) ** 2) and found["mean_abs"] == pytest.approx(10 / 3)
    assert found["channels_w1"] == [10, 0, 0]
    assert found["saturation_tv"] == 1  # 0.5 and 0.545: other bins
    assert found["saturation_w1"] == pytest.approx((int(60 * BINS / 110) - BINS // 2) / BINS)


def test_equal_sets_do_not_drift_and_a_set_in_another_order_is_equal():
    images = random_images(3)
    found = drift(measure(images), measure(images[::-1]))
    for value in found.values():
        assert np.abs(value).max() < 1e-12


def test_saturation_equals_colorsys():
    """Every pixel in the bin that its HSV saturation names; black has none."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (8, 9, 3), dtype=np.uint8)
    image[0, :3] = [[0, 0, 0], [255, 255, 255], [255, 0, 0]]
    expected = np.zeros(BINS)
    for r, g, b in image.reshape(-1, 3).tolist():
        saturation = colorsys.rgb_to_hsv(r, g, b)[1] if max(r, g, b) else 0.0
        expected[min(int(saturation * BINS + 1e-9), BINS - 1)] += 1 / 72
    assert measure([image]).saturation == pytest.approx(expected, abs=1e-12)


def test_histogram_distances_equal_scipy():
    real, fake = measure(random_images(4, 4)), measure(random_images(5, 7, 20, 180))
    found = drift(real, fake)
    for c in range(3):
        levels = np.arange(256)
        expected = wasserstein_distance(levels, levels, real.channels[c], fake.channels[c])
        assert found["channels_w1"][c] == pytest.approx(expected, rel=1e-9)
    bins = np.arange(BINS) / BINS
    expected = wasserstein_distance(bins, bins, real.saturation, fake.saturation)
    assert found["saturation_w1"] == pytest.approx(expected, rel=1e-9)


def test_every_image_weighs_the_same_whatever_its_size():
    small, large = flat(200, 0, 0, size=(2, 2)), flat(0, 0, 100, size=(50, 50))
    found = measure(iter([small, large]))
    assert found.n == 2 and found.channels[0, 200] == found.channels[0, 0] == 0.5
    assert found.channels.sum(1) == pytest.approx([1, 1, 1]) and found.saturation.sum() == pytest.approx(1)


def test_a_grey_set_lost_all_saturation():
    """What a report must show: washed-out colours at equal brightness."""
    images = random_images(6, 4)
    grey = [np.broadcast_to(x.mean(2, keepdims=True).astype(np.uint8), x.shape) for x in images]
    found = drift(measure(images), measure(grey))
    mean = (measure(images).saturation * (np.arange(BINS) / BINS)).sum()
    assert found["saturation_w1"] == pytest.approx(mean, rel=1e-9) and mean > 0.3
    assert found["mean_abs"] < 2


@pytest.mark.parametrize("image", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((1, 1, 3), np.uint8)])
def test_what_is_not_uint8_rgb_is_refused_by_its_number(image):
    with pytest.raises(ValueError, match="image 1: "):
        measure([flat(1, 2, 3), image])


def test_no_image_at_all_is_refused():
    with pytest.raises(ValueError, match="no image"):
        measure([])
