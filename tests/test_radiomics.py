"""Radiomic features and the Frechet radiomic distance.

Every feature against pyradiomics 3.0.1 on twelve kinds of images and masks (tests/golden/radiomics.json, with the
script that made it), to 1e-6; derived images against SimpleITK and PyWavelets in the same file, to float32, in which
those libraries keep them.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from nanomed.metrics import frd, radiomics, scores

GOLDEN = json.loads((Path(__file__).parent / "golden" / "radiomics.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['name']}, width {case['width']}")
def test_every_feature_is_pyradiomics(case):
    image, mask = np.array(case["image"]), np.array(case["mask"])
    found = radiomics.features(image, mask, case["width"], case["shift"], everything=True)
    assert set(radiomics.ALL_NAMES) == set(case["features"]) and len(found) == len(case["features"]) == 93
    for name, value in zip(radiomics.ALL_NAMES, found):
        theirs = case["features"][name]
        if theirs is None:
            assert np.isnan(value), name
        else:
            assert abs(value - theirs) <= 1e-6 * max(1, abs(theirs)), (name, value, theirs)


# ---------------------------------------------------------------------------------------------------- derived images


def near(found, name, tolerance):
    theirs = np.array(GOLDEN["images"][name])
    assert found.shape == theirs.shape
    assert np.abs(found - theirs).max() <= tolerance * max(1, np.abs(theirs).max()), name


def test_derived_images_are_those_of_simpleitk_and_pywavelets():
    """From their own image before, so that each stands alone; the Laplacians in float32, in which ITK keeps them."""
    near(frd.normalised(np.array(GOLDEN["picture"])), "normalised", 1e-12)
    near(frd.resampled(np.array(GOLDEN["images"]["normalised"])), "resampled", 1e-9)
    small = np.array(GOLDEN["images"]["resampled"])
    for bands, image in frd.wavelet(small).items():
        near(image, f"wavelet-{bands}", 1e-12)
    for bands, image in frd.wavelet(small[:11, :15]).items():
        near(image, f"odd wavelet-{bands}", 1e-12)
    for sigma in (2, 3, 4, 5):
        near(frd.laplacian(small, sigma / 2), f"log-sigma-{sigma}-0-mm-3D", 1e-6)


# --------------------------------------------------------------------------------------------------------- distances


def test_from_pixels_to_features_all_steps_are_pyradiomics():
    """Normalised, resampled, wavelets, levels, tables, in one: the 385 features that pyradiomics gives for a picture
    under FRD v1's settings. (It leaves the Laplacians out for one slice; they are compared as images above.)"""
    image = np.stack([np.array(GOLDEN["picture"], dtype=np.uint8)] * 3, 2)
    found = frd.features(image)["v1"].reshape(9, 77)
    theirs = GOLDEN["whole"]
    for row, kind in ((0, "original"), (5, "wavelet-LH"), (6, "wavelet-HL"), (7, "wavelet-HH"), (8, "wavelet-LL")):
        for name, value in zip(radiomics.NAMES, found[row]):
            expected = theirs[f"{kind}_{name}"]
            assert abs(value - expected) <= 1e-6 * max(1, abs(expected)), (kind, name)


def test_all_features_of_an_image_are_those_of_its_nine_images():
    image = np.stack([np.array(GOLDEN["picture"], dtype=np.uint8)] * 3, 2)  # grey, so that mode L changes nothing
    found = frd.features(image)
    assert found["v1"].shape == (9 * 77,) and found["v0"].shape == (93,)
    small = frd.resampled(frd.normalised(np.array(GOLDEN["picture"])))
    images = [small, *(frd.laplacian(small, sigma / 2) for sigma in (2, 3, 4, 5)), *frd.wavelet(small).values()]
    for i, one in enumerate(images):
        mine = radiomics.features(one, width=5, shift=300, area=4)
        assert np.array_equal(found["v1"][77 * i : 77 * (i + 1)], mine)
    plain = radiomics.features(np.array(GOLDEN["picture"], dtype=float), width=25, everything=True)
    assert np.array_equal(found["v0"], plain)


def test_grey_weighs_the_colours_as_pillows_mode_l():
    """Which the authors' code uses: ITU-R 601 in 16 bits."""
    draw = np.random.default_rng(0).integers(0, 256, (20, 24, 3))
    red, green, blue = np.moveaxis(draw, 2, 0)
    luma = (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16
    assert np.array_equal(frd.grey(draw.astype(np.uint8)), luma)
    assert np.array_equal(frd.features(draw.astype(np.uint8))["v0"],
                          radiomics.features(luma.astype(float), width=25, everything=True))  # fmt: skip


def test_odd_sides_and_one_grey_level_have_features_and_tiny_images_are_refused():
    found = frd.features(np.full((33, 41, 3), 9, np.uint8))
    assert np.isfinite(found["v0"]).all() and np.isfinite(found["v1"]).all()
    with pytest.raises(ValueError, match="7 x 9 pixels has no texture; 8"):
        frd.features(np.zeros((9, 7, 3), np.uint8))
    for image, mask in ((np.zeros((4, 4)), np.zeros((4, 4))), (np.zeros((4, 4)), np.ones((4, 5)))):
        with pytest.raises(ValueError, match="no features"):
            radiomics.features(image, mask)
    with pytest.raises(ValueError, match="not finite"):
        radiomics.features(np.full((4, 4), np.nan))


def test_v1_is_the_logarithm_of_the_distance_in_deviations_of_the_real_images():
    """Independent columns have a closed form: sum of (difference of means / s)^2 + (1 - s_fake / s)^2."""
    draw = torch.Generator().manual_seed(4)
    base = torch.randn(500, 6, generator=draw, dtype=torch.float64)
    base = torch.linalg.qr(base - base.mean(0))[0] * 499**0.5  # uncorrelated columns of deviation 1
    scale, mean = torch.tensor([1e-3, 1, 50, 2, 9, 1e6]).double(), torch.tensor([1.0, 2, 3, 4, 5, 6]).double()
    real, fake = base * scale + mean, base * scale * 1.5 + mean + scale * 0.2
    n = 500 / 499  # the package's deviation is over N, the covariance over N - 1
    expected = math.log(6 * (0.2**2 * n + 0.5**2 * n))
    assert frd.distance_v1(real, fake) == pytest.approx(expected, abs=1e-9)
    odd = torch.cat([real, torch.full((500, 1), 7.0), torch.full((500, 1), float("nan"))], 1)
    assert frd.distance_v1(odd, torch.cat([fake, fake[:, :2]], 1)) == pytest.approx(expected, abs=1e-9)
    assert frd.distance_v1(real, real) < math.log(1e-9)
    with pytest.raises(ValueError, match="no radiomic feature varies"):
        frd.distance_v1(torch.ones(9, 3), torch.ones(9, 3))


def test_v0_scales_every_feature_by_its_range_over_both_sets():
    real = torch.tensor([[0.0, 5.0, 1.0], [1.0, 5.0, float("nan")], [2.0, 5.0, 3.0]]).double()
    fake = torch.tensor([[2.0, 5.0, 1.0], [3.0, 5.0, 1.0], [4.0, 5.0, 2.0]]).double()
    a = torch.tensor([[0.0, 0.5, 0.0], [0.25, 0.5, 0.5], [0.5, 0.5, 1.0]]).double() * frd.RANGE_V0
    b = torch.tensor([[0.5, 0.5, 0.0], [0.75, 0.5, 0.0], [1.0, 0.5, 0.5]]).double() * frd.RANGE_V0
    assert frd.distance_v0(real, fake) == pytest.approx(scores.frechet_distance(a, b), rel=1e-12)
