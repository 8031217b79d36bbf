"""`evaluate.py --metrics all` against the public programs for the same measures, on images of 256 pixels.

    python tests/bench/bench_measures.py                            200 against 200, a tenth of a usual evaluation
    python tests/bench/bench_measures.py --radiomics V/bin/python   with pyradiomics, which needs its own environment
                                                                    (tests/golden/make_radiomics.py says how)

Networks of random weights do the work of the published ones. Ours measures all that needs no further download, with
intervals and floors; theirs is torch-fidelity's FID, IS, KID, precision and recall in its one pass, and pyradiomics'
features of FRD v1 for a few images, taken times the images; what has no public program is counted as nothing.

100 against 100 on one thread of a machine that others kept busy, so CPU seconds: ours 51 for 21 numbers, 1.10 GB at
most; torch-fidelity's 69, and 104 of pyradiomics (0.52 a picture, without the Laplacians that ours includes): 3.4 times
ours with them, 1.36 times without, where ours still has its radiomics, intervals and floors. Before radiomics were a
sixth faster, 200 against 200 took 87 against 98 and 196.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
import conftest  # noqa: E402, F401  (lets torchvision import beside a CPU build of torch)

from nanomed.data import toy  # noqa: E402

THEIRS = """
import sys
sys.path[:0] = [sys.argv[1]]
import conftest
import torch_fidelity
found = torch_fidelity.calculate_metrics(
    input1=sys.argv[2], input2=sys.argv[3], isc=True, fid=True, kid=True, prc=True, cuda=False, verbose=False,
    feature_extractor="inception-v3-compat", feature_extractor_weights_path=sys.argv[4],
    kid_subset_size=min(1000, int(sys.argv[5])), batch_size=32)
print(found)
"""
RADIOMICS = """
import logging, sys, time
from pathlib import Path
import numpy as np, radiomics, SimpleITK as sitk
from PIL import Image
from radiomics import featureextractor
radiomics.logger.setLevel(logging.CRITICAL)
settings = dict(normalize=True, normalizeScale=100, force2D=True, binWidth=5, voxelArrayShift=300, label=1,
                interpolator="sitkBSpline", padDistance=10, resampledPixelSpacing=[2, 2, 0])
extractor = featureextractor.RadiomicsFeatureExtractor(**settings)
extractor.disableAllImageTypes()
extractor.enableImageTypes(Original={}, Wavelet={})
extractor.disableAllFeatures()
extractor.enableFeaturesByName(firstorder=[], glcm=sys.argv[2].split(), glrlm=[], glszm=[], ngtdm=[])
start, files = time.process_time(), sorted(Path(sys.argv[1]).iterdir())[:5]
for file in files:
    image = np.asarray(Image.open(file).convert("L"))
    mask = np.ones_like(image, dtype=np.int32)
    mask[0, 0] = 0
    extractor.execute(sitk.GetImageFromArray(image[None]), sitk.GetImageFromArray(mask[None]))
print((time.process_time() - start) / len(files))
"""


def measured(words: list[str]) -> tuple[float, float, str]:
    """Wall and CPU seconds of a program, and what it printed."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{words[:3]} failed:\n{done.stderr[-2000:]}")
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"  peak so far {after.ru_maxrss / 2**20:.2f} GB")
    return wall, busy, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--radiomics", default="", help="a Python that has pyradiomics")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for side, first in (("real", 0), ("fake", 50_000)):
            (root / side).mkdir()
            for i in range(args.images):
                Image.fromarray(toy.render(toy.scene(first + i), 256)).save(root / side / f"{i:05d}.png")
        from test_protocols import random_inception

        torch.save(random_inception().state_dict(), root / "inception.pth")
        sides = [str(root / "real"), str(root / "fake")]
        rows = {}
        file, cache, out = (str(root / what) for what in ("inception.pth", "cache", "out"))
        words = [sys.executable, "evaluate.py", "--real", sides[0], "--fake", sides[1], "--metrics", "all",
                 "--inception", file, "--cache", cache, "--out", out]  # fmt: skip
        rows["evaluate.py --metrics all"] = measured(words)[:2]
        names = list(json.loads((root / "out" / "results.json").read_text()))
        words = [sys.executable, "-c", THEIRS, str(ROOT / "tests"), *sides, file, str(args.images)]
        rows["torch-fidelity: FID, IS, KID, P/R"] = measured(words)[:2]
        if args.radiomics:
            from nanomed.metrics.radiomics import GLCM

            each = float(measured([args.radiomics, "-c", RADIOMICS, sides[0], " ".join(GLCM)])[2].split()[-1])
            rows[f"pyradiomics, {each:.2f} s each"] = (each * 2 * args.images,) * 2
    print(f"{args.images} against {args.images} images of 256 pixels: {len(names)} numbers of ours: {', '.join(names)}")
    for label, (wall, busy) in rows.items():
        print(f"{label:>36} {wall:9.1f} s wall {busy:9.1f} s CPU")
    ours, *others = rows.values()
    wall, busy = (sum(column) for column in zip(*others))
    print(f"theirs over ours: {wall / ours[0]:.2f} wall, {busy / ours[1]:.2f} CPU")


if __name__ == "__main__":
    main()
