"""The systems of the papers: `build` makes one from a preset, `load` reads one, `recipe` says how it is trained.

A new system is one file beside this one and one line in `FILES`. May import the networks, `diffusion`, `adapters`,
`data` (for the grammar), `weights` and `run`; must not know training loops or metrics.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from nanomed.systems.base import System

FILES = {  # preset -> file in this folder and class in it
    "msdm": "msdm.MSDM", "msdm-tiny": "miniatures.msdm.MSDMTiny", "msdm-tiny-64": "miniatures.msdm.MSDM",
    "pixart": "pixart.PixArt",
    "medart": "medart.MedArt", "medart-skin": "medart.MedArt",
    "medart-tiny": "miniatures.medart.MedArtTiny",
    "kandinsky2": "kandinsky2.Kandinsky2", "kandinsky2-tiny": "miniatures.kandinsky2.Kandinsky2Tiny",
    "hunyuan": "hunyuan.Hunyuan", "hunyuan-tiny": "miniatures.hunyuan.Hunyuan",
    "dit-s8": "dit.ClassDiT", "dit-tiny": "dit.ClassDiT",
    "sd14": "sd.StableDiffusion14", "sd15": "sd.StableDiffusion", "sdxl": "sdxl.SDXL",
    "kandinsky3": "kandinsky3.Kandinsky3",
    "sd-tiny": "miniatures.unets.SDTiny", "kandinsky3-tiny": "miniatures.unets.Kandinsky3Tiny",
}  # fmt: skip
# Presets that `load` also reads as they were published.
PUBLISHED = ("pixart", "kandinsky2", "hunyuan", "dit-s8", "sd14", "sd15", "sdxl", "kandinsky3")


def _file(preset: str) -> ModuleType:
    from nanomed.run.flags import UsageError

    if preset == "captioner-tiny":
        raise UsageError("--model captioner-tiny: it writes captions, and is no system: nanomed.captions.load reads it")
    if preset not in FILES:
        raise UsageError(f"--model {preset}: choose one of {', '.join(FILES)}")
    return importlib.import_module(f"nanomed.systems.{FILES[preset].rpartition('.')[0]}")


def _class(preset: str) -> "type[System]":
    return getattr(_file(preset), FILES[preset].rpartition(".")[2])


def build(preset: str, weights: str | None = None, random: bool = False, **options) -> "System":
    """A system from a preset, its trained parts fresh and its published parts read from files.

    `random` leaves the published parts untrained too, for dry runs and benchmarks; `options` override the preset.
    """
    return _class(preset).build(weights, random, **_file(preset).PRESETS[preset] | options)


def recipe(preset: str, stage: str = "") -> dict:
    """Training settings of a preset: of one stage, or ("") those common to all, and what its system sets by itself."""
    return _file(preset).RECIPES[preset].get(stage, {})


def stages_with_recipes(preset: str) -> list[str]:
    """The stages for which the preset sets something, by name."""
    return [*filter(None, _file(preset).RECIPES[preset])]


def options(preset: str) -> tuple[type, ...]:
    """The dataclasses of train.py's flags that only this preset's system has."""
    return _file(preset).OPTIONS


def settings(preset: str) -> dict:
    """What the preset's constructor takes by name, with the values that hold when nothing is said."""
    return _class(preset).settings() | _file(preset).PRESETS[preset]


def chosen(preset: str, said: Mapping[str, Any]) -> dict:
    """Of flags of train.py those that are settings of the preset's constructor. Its `steps` are those of drawing, and
    --steps are those of training."""
    return {name: value for name, value in said.items() if name in settings(preset) and name != "steps"}


def load(
    name: str | Path,
    weights: str | None = None,
    dtype: "torch.dtype | None" = None,
    device: "str | torch.device" = "cpu",
    lora: str = "",
) -> "System":
    """Read a trained system: a run folder, a folder that `System.save` wrote, or a name under `weights/`; or a
    published one by the name of its preset.

    weights   where published files are looked for besides the usual places (see nanomed/weights/places.py)
    lora      adapters to fold in: "FILE_OR_FOLDER=0.8", several by comma
    """
    from nanomed import weights as files
    from nanomed.run import runs
    from nanomed.systems.assembly import read_config

    if name in PUBLISHED:
        system = _class(str(name)).published(weights, dtype)
    else:
        folder = runs.model_folder(name) if runs.is_run(name) else files.find(str(name), weights)
        said = read_config(folder)
        # version 0.1 wrote "medart" for the miniature, too, which alone has a VAE of its own
        name = "medart-tiny" if said["system"] == "medart" and "vae" in said else said["system"]
        system = _class(name).saved(folder, weights, dtype)
    if lora:
        system.add_lora(lora)
    return system.to(device)
