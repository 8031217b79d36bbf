"""The systems of the papers: `build` makes one from a preset, `load` reads one, `recipe` says how it is trained.

A new system is one file beside this one and one line in `FILES`. May import the networks, `diffusion`, `adapters`,
`data` (for the grammar), `weights` and `run`; must not know training loops or metrics.
"""

import importlib
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from nanomed.systems.base import System

FILES = {  # preset -> file in this folder
    "msdm": "msdm", "msdm-tiny": "msdm", "msdm-tiny-64": "msdm", "pixart": "pixart", "medart": "medart",
    "medart-skin": "medart", "medart-tiny": "medart", "kandinsky2": "kandinsky2", "kandinsky2-tiny": "kandinsky2_tiny",
}  # fmt: skip
PUBLISHED = ("pixart", "kandinsky2")  # presets that `load` also reads as they were published


def _file(preset: str) -> ModuleType:
    if preset not in FILES:
        raise ValueError(f"no model named {preset!r}: choose one of {', '.join(FILES)}")
    return importlib.import_module(f"nanomed.systems.{FILES[preset]}")


def build(preset: str, weights: str | None = None, random: bool = False, **options) -> "System":
    """A system from a preset, its trained parts fresh and its published parts read from files.

    `random` leaves the published parts untrained too, for dry runs and benchmarks; `options` override the preset.
    """
    return _file(preset).build(preset, weights, random, **options)


def recipe(preset: str, stage: str = "") -> dict:
    """Training settings of a preset: of one stage, or ("") those common to all."""
    return _file(preset).RECIPES[preset].get(stage, {})


def flags(preset: str) -> tuple[str, ...]:
    """The flags of train.py that are settings of a preset's system, not of its training."""
    return _file(preset).FLAGS


def load(
    name: str | Path,
    weights: str | None = None,
    dtype: "torch.dtype | None" = None,
    device: "str | torch.device" = "cpu",
) -> "System":
    """Read a trained system: a run folder, a folder that `System.save` wrote, or a name under `weights/`; or a
    published one by the name of its preset.

    `weights` is where published files are looked for besides the usual places (see nanomed/weights.py).
    """
    from nanomed import weights as files
    from nanomed.run import runs
    from nanomed.systems.base import read_config

    if name in PUBLISHED:
        return _file(name).load_published(weights, dtype).to(device)
    folder = runs.model_folder(name) if runs.is_run(name) else files.find(str(name), weights)
    kind = read_config(folder)["system"]
    return _file(kind).load(folder, weights, dtype).to(device)
