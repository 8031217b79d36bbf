"""Radiomic features and the Frechet radiomic distance.

Every feature against pyradiomics 3.0.1 on twelve kinds of images and masks (tests/golden/radiomics.json, with the
script that made it), to 1e-6; derived images against SimpleITK and PyWavelets in the same file, to float32, in which
those libraries keep them.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from nanomed.metrics import frd, radiomics

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
    for sigma in (2, 3, 4, 5):
        near(frd.laplacian(small, sigma / 2), f"log-sigma-{sigma}-0-mm-3D", 1e-6)
