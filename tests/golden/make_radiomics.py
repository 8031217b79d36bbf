"""Makes radiomics.json: features by pyradiomics 3.0.1, which needs an older setuptools, so it is not a test extra.

    python -m venv V && V/bin/pip install "numpy<2.3" "setuptools<66" versioneer wheel SimpleITK PyWavelets
    V/bin/pip install --no-build-isolation pyradiomics==3.0.1
    V/bin/python tests/golden/make_radiomics.py
"""

import json
import logging
from pathlib import Path

import numpy as np
import radiomics
import SimpleITK as sitk
from radiomics import featureextractor, firstorder, glcm, gldm, glrlm, glszm, imageoperations, ngtdm

radiomics.logger.setLevel(logging.CRITICAL)
CLASSES = {
    "firstorder": firstorder.RadiomicsFirstOrder, "glcm": glcm.RadiomicsGLCM, "glrlm": glrlm.RadiomicsGLRLM,
    "glszm": glszm.RadiomicsGLSZM, "ngtdm": ngtdm.RadiomicsNGTDM, "gldm": gldm.RadiomicsGLDM,
}  # fmt: skip
OUT = Path(__file__).with_name("radiomics.json")


def slice_of(array, dtype):
    return sitk.GetImageFromArray(np.asarray(array, dtype)[None])  # one slice


def features(image, mask, width, shift):
    im, ma = slice_of(image, np.float64), slice_of(mask, np.int32)
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    box = np.array([columns[0], columns[-1], rows[0], rows[-1], 0, 0])
    im, ma = imageoperations.cropToTumorMask(im, ma, box)
    found = {}
    settings = dict(binWidth=width, voxelArrayShift=shift, force2D=True, force2Ddimension=0, label=1)
    for name, kind in CLASSES.items():
        with np.errstate(all="ignore"):
            for feature, value in kind(im, ma, **settings).execute().items():
                found[f"{name}_{feature}"] = None if np.isnan(value) else float(np.real(value))
    return found


def cases():
    draw = np.random.default_rng(17)
    y, x = np.mgrid[:18, :22]
    noise = draw.integers(0, 256, (18, 22))
    smooth = (90 + 60 * np.sin(x / 4) + 40 * np.cos(y / 3)).round().astype(int)
    full = np.ones((18, 22), int)
    disc = ((y - 9) ** 2 + (x - 11) ** 2 < 50).astype(int)
    points = ((y % 3 == 0) & (x % 3 == 0)).astype(int)
    ragged = (draw.random((18, 22)) < 0.6).astype(int)
    yield "noise", noise, full
    yield "smooth", smooth, full
    yield "constant", np.full((18, 22), 77), full
    yield "two levels", np.where((x // 3 + y // 2) % 2, 40, 200), full
    yield "a disc", smooth, disc
    yield "a ragged mask", noise, ragged
    yield "isolated pixels", noise, points
    yield "a row", noise, (y == 5).astype(int)
    yield "two parts", smooth, ((x < 5) | (x > 15)).astype(int)
    yield "below zero, in fractions", (noise - 128) * 1.37, full
    yield "two pixels, one above the other", noise, ((x == 3) & ((y == 4) | (y == 5))).astype(int)
    yield "two levels in noise", np.where(draw.random((18, 22)) < 0.5, 3, 8), disc


def filters():
    """SimpleITK's and PyWavelets' images of one picture, in pyradiomics' order: normalised, resampled, filtered."""
    draw = np.random.default_rng(3)
    y, x = np.mgrid[:24, :32]
    picture = (110 + 50 * np.sin(x / 5) + 30 * np.cos(y / 4) + draw.normal(0, 12, x.shape)).round().clip(0, 255)
    image, mask = sitk.GetImageFromArray(picture.astype(np.uint8)), sitk.GetImageFromArray(np.ones((24, 32), np.int32))
    normal = imageoperations.normalizeImage(image, normalizeScale=100)
    small, _ = imageoperations.resampleImage(
        normal, mask, resampledPixelSpacing=[2, 2], interpolator="sitkBSpline", padDistance=10, label=1
    )
    found = {"normalised": normal, "resampled": small}
    for which, name, _ in imageoperations.getLoGImage(small, mask, sigma=[2.0, 3.0, 4.0, 5.0]):
        found[name] = which
    for which, name, _ in imageoperations.getWaveletImage(small, mask):
        found[name] = which
    odd = sitk.GetImageFromArray(sitk.GetArrayFromImage(small)[:11, :15])
    for which, name, _ in imageoperations.getWaveletImage(odd, mask):
        found[f"odd {name}"] = which
    return picture.astype(int).tolist(), {k: sitk.GetArrayFromImage(v).astype(float).tolist() for k, v in found.items()}


def whole(picture):
    """The features of FRD v1's settings, all steps by pyradiomics: of one slice, so without the Laplacians."""
    extractor = featureextractor.RadiomicsFeatureExtractor(
        normalize=True, normalizeScale=100, force2D=True, binWidth=5, voxelArrayShift=300, label=1,
        interpolator="sitkBSpline", padDistance=10, resampledPixelSpacing=[2, 2, 0],
    )  # fmt: skip
    extractor.disableAllImageTypes()
    extractor.enableImageTypes(Original={}, Wavelet={})
    mask = np.ones(np.shape(picture), np.int32)
    mask[0, 0] = 0  # as the authors do against an error of pyradiomics; it is there again after resampling
    found = extractor.execute(slice_of(picture, np.uint8), slice_of(mask, np.int32))
    return {name: float(np.real(value)) for name, value in found.items() if not name.startswith("diagnostics")}


if __name__ == "__main__":
    made = []
    for name, image, mask in cases():
        for width, shift in ((5, 300), (25, 0)):
            made.append(
                {"name": name, "width": width, "shift": shift, "image": image.tolist(), "mask": mask.tolist(),
                 "features": features(image, mask, width, shift)}
            )  # fmt: skip
    picture, images = filters()
    OUT.write_text(json.dumps({"cases": made, "picture": picture, "images": images, "whole": whole(picture)}))
    print(OUT, OUT.stat().st_size)
