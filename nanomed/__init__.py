"""Text-to-image diffusion for medical images, from scratch in readable PyTorch.

import nanomed
system = nanomed.load("weights/msdm-tiny")
images = system(["Generate an image containing a polyp."], seed=0)                # a list of PIL images
nanomed.evaluate("real", images, metrics="colour")                                # what results.json holds
"""

import os
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version

# What PyTorch's libraries read once, when they are loaded. Threads that wait look for work a few microseconds and then
# give their core to others: for milliseconds, as they would, training stops beside a busy neighbour, and not at all
# (OMP_WAIT_POLICY=passive), waking up costs small networks on two cores 40% of their speed. And what MPS cannot do goes
# to the CPU, by name.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

try:
    __version__ = _version("nanomed")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0.0.0"


def __getattr__(name: str):
    if name == "load":  # torch is imported when a system is, not when the package is
        from nanomed.systems import load

        return load
    if name == "evaluate":
        from nanomed.evaluation.notebook import evaluate

        return evaluate
    raise AttributeError(f"module 'nanomed' has no attribute {name!r}")
