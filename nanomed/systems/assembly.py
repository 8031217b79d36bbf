"""How a system comes by its parts: read from where they are published, made fresh, or left untrained; written and read
back. The same for all systems, so that their own files need only a table of parts.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from nanomed import weights
from nanomed.adapters import formats, lora, onto
from nanomed.run import files

DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"  # the stems of a part's weights file
Read = Callable[[Path, torch.dtype | None], Any]  # a published folder and the dtype to convert to -> a module


@dataclass(frozen=True)
class Part:
    """A network of a system.

    make     its shapes as keyword arguments -> the module with fresh weights; none: the published shapes
    read     its published folder -> the module with its weights; None: it is published nowhere
    stem     of its weights file
    source   the repository it is published in, where that is not the system's own
    folder   where it lies in the repository, where that is not its name
    """

    make: Callable[..., nn.Module]
    read: Read | None = None
    stem: str = DIFFUSERS
    source: str = ""
    folder: str | None = None


@dataclass
class Found:
    """What a system is made of, before it is one: the first argument of every constructor."""

    modules: dict[str, nn.Module]
    tokenizers: dict[str, Any]
    shapes: dict[str, dict]  # of the parts that were made here; they are saved whole, the others are published
    base: str = ""  # the published repository or folder that the others come from


class Assembled(nn.Module):
    """A module whose parts are plain attributes with published names (`vae`, `unet`, `text_encoder`, ...).

    defaults    its settings and what they are where nothing is said, beside those of the classes above. A constructor
                takes them by name; each is an attribute of that name and stands in `system.json`
    parts       name of a part -> how it is made and where it is published
    tokenizers  attribute -> (how a folder with it is read, the repository where that is not the system's own)
    name        of the preset that reads it back
    repository  the system's own, as far as it is published
    denoiser    name of the part that works on latents; its device and dtype are the system's
    stages      name of a stage -> the parts it trains, in the order of the paper
    adapters    part -> the layers of it that an adapter takes hold of (lora.py's `targets`)
    adapter_folders  part -> the folder of its adapter in a saved system, where that is not PART_lora
    """

    defaults: dict[str, Any] = {}
    name: str
    parts: dict[str, Part]
    tokenizers: dict[str, tuple[Callable[[Path], Any], str]] = {}
    repository: str = ""
    denoiser: str
    stages: dict[str, tuple[str, ...]]
    adapters: dict[str, tuple[str, ...]] = {}
    adapter_folders: dict[str, str] = {}

    def __init__(self, found: Found, **settings: Any):
        super().__init__()
        for name, module in found.modules.items():
            self.add_module(name, module)
        for name in self.tokenizers:
            setattr(self, name, found.tokenizers.get(name))
        self.shapes, self.base = found.shapes, found.base
        self.loras: list[dict] = []  # what `add_lora` has folded
        self._folded: set[str] = set()  # parts in which what lies below a run's adapters is folded
        known = self.settings()
        if unknown := {*settings} - {*known}:
            raise TypeError(f"{self.name} has no setting {', '.join(sorted(unknown))}; it has {', '.join(known)}")
        for name, value in (known | settings).items():
            setattr(self, name, copy(value))  # a table may be changed, and those of the class stay

    @classmethod
    def complete(cls, shapes: dict[str, dict], tokenizers: dict[str, Any], settings: dict) -> dict[str, dict]:
        """The shapes of fresh parts with what follows from each other, from the vocabulary or from the settings."""
        return shapes

    @classmethod
    def new_tokenizers(cls, shapes: dict[str, dict], weights_folder: str | Path | None) -> dict[str, Any]:
        """The tokenizers of a system that learns to read from nothing, or that needs no words at all."""
        return {}

    @classmethod
    def stated(cls, place: Callable[[str], Path]) -> dict:
        """Settings that published folders state; `place` says where what has a name (a part, "scheduler") lies."""
        return {}

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """`defaults`, with those of the classes above that this one does not change."""
        found: dict[str, Any] = {}
        for above in reversed(cls.__mro__):
            found |= vars(above).get("defaults", {})
        return found

    @classmethod
    def build(
        cls,
        weights_folder: str | Path | None = None,
        random: bool = False,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> Self:
        """A system before its training. A part whose shapes are among the settings, by its name, is fresh; the others
        are read from where they are published, or with `random` are zeros of the published shapes that take no memory
        until they are written to (dry runs, benchmarks).

        Raises WeightsError where a published file is missing, damaged or of another system.
        """
        def make(name: str, shape: dict) -> nn.Module:
            return cls.parts[name].make(**shape).to(dtype)

        def other(name: str, place: Callable[[str], Path]) -> nn.Module:
            return zeros(cls.parts[name].make, dtype) if random else cls.parts[name].read(place(name), dtype)

        return cls._assemble(settings, weights_folder, make, other, stated=not random)

    @classmethod
    def published(cls, weights_folder: str | Path | None = None, dtype: torch.dtype | None = None, **settings) -> Self:
        """The system as it is published, ready to draw. `weights_folder` is its folder, or where that one lies."""
        return cls.build(weights_folder, dtype=dtype, **settings).eval()

    @classmethod
    def saved(cls, folder: str | Path, weights_folder: str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Read what `save` wrote, on the published parts where it has any; adapters are folded into the weights."""
        def make(name: str, shape: dict) -> nn.Module:
            return weights.build(cls.parts[name].make, **shape)

        def other(name: str, place: Callable[[str], Path]) -> nn.Module:
            return cls.parts[name].read(place(name), dtype)

        said = cls.understood({name: value for name, value in read_config(folder).items() if name != "system"})
        system = cls._assemble(said, weights_folder, make, other, written=Path(folder))
        system.read_parts(folder, dtype)
        system.fold()
        return system.eval()

    @classmethod
    def _assemble(
        cls,
        settings: dict,
        weights_folder: str | Path | None,
        make: Callable[[str, dict], nn.Module],
        other: Callable[[str, Callable[[str], Path]], nn.Module],
        stated: bool = True,
        written: Path | None = None,
    ) -> Self:
        """A system of parts that `make` makes, of the shapes among the settings, and of those that `other` has.

        stated    whether to ask the published folders what they state
        written   the folder of a saved system, where tokenizers of its own making lie
        """
        shapes = {name: dict(settings[name]) for name in cls.parts if name in settings}
        given = {name: value for name, value in settings.items() if name not in (*shapes, "base")}
        places = Places(cls, weights_folder, settings.get("base", ""))
        tokenizers = {}
        for name, (read, source) in cls.tokenizers.items():
            if owner(name) not in shapes and stated:
                tokenizers[name] = read(places(name, source))
            elif owner(name) in shapes and written is not None:
                tokenizers[name] = read(written / name)
        if len(tokenizers) < len(cls.tokenizers):
            tokenizers = cls.new_tokenizers(shapes, weights_folder)
        shapes = cls.complete(shapes, tokenizers, given)
        modules = {name: make(name, shapes[name]) if name in shapes else other(name, places) for name in cls.parts}
        said = cls.stated(places) if stated and len(shapes) < len(modules) else {}
        return cls(Found(modules, tokenizers, shapes, places.base(shapes)), **said | given)

    @classmethod
    def understood(cls, settings: dict) -> dict:
        """The settings of a `system.json` as this version names them: where older versions wrote something else."""
        return settings

    def config(self) -> dict:
        """What `system.json` says: everything but the weights."""
        settings = {name: getattr(self, name) for name in self.settings()}
        return json.loads(json.dumps({"system": self.name, "base": self.base} | self.shapes | settings))

    def add_lora(self, given: str) -> None:
        """Fold adapters into the parts that they are for: "FILE", "FILE=0.8", several by comma (onto.py)."""
        self.loras += onto.fold(given, dict(self.named_children()))

    def fold_below(self, folder: str | Path, part: str) -> None:
        """Fold into a part, once, what a run in `folder` has below its own adapter."""
        if part not in self._folded:
            self._folded.add(part)
            for below in onto.kept(Path(folder)):
                if (below / part).is_dir():
                    formats.load_peft(below / part, self.get_submodule(part))
                    lora.fold(self.get_submodule(part))

    def adapter_folder(self, part: str) -> str:
        """Where the adapter of a part lies in a saved system, as a PEFT folder."""
        return self.adapter_folders.get(part, f"{part}_lora")

    def save(self, folder: str | Path, parts: Iterable[str] = ()) -> None:
        """Write `system.json` and one folder for each of the given parts, or all, as published systems are laid out:
        its weights, or its adapter alone where it has one. A part that is published and does not train is not written.
        `system.json` comes last."""
        folder = Path(folder)
        trained = {part for stage in self.stages.values() for part in stage}
        for name in self.tokenizers:
            if owner(name) in self.shapes:
                getattr(self, name).save(folder / name)
        for name, module in self.named_children():
            if parts and name not in parts:
                continue
            if lora.adapted(module):
                formats.save_peft(folder / self.adapter_folder(name), module, self.base)
            elif name in self.shapes or name in trained:
                for below in onto.kept(folder):  # it is in these weights now
                    shutil.rmtree(below / name, ignore_errors=True)
                tensors = dict(module.named_parameters())  # no part has buffers; `state_dict` would give FSDP2's shares
                files.write_tensors(folder / name / f"{self.parts[name].stem}.safetensors", tensors)
        files.write_json(folder / "system.json", self.config())

    def read_parts(self, folder: str | Path, dtype: torch.dtype | None = None, parts: Iterable[str] = ()) -> None:
        """Load the given parts, or all, from where `save` wrote them, strictly; adapters come on top."""
        folder = Path(folder)
        for name, module in list(self.named_children()):
            if parts and name not in parts:
                continue
            adapter = folder / self.adapter_folder(name)
            adapted = name in self.adapters and (adapter / "adapter_config.json").is_file()
            stem = self.parts[name].stem
            there = (folder / name / f"{stem}.safetensors").is_file()
            if there or name in self.shapes and not adapted:
                weights.load(module, weights.read(folder / name, stem=stem, dtype=dtype))
                self._folded.discard(name)
            self.fold_below(folder, name)
            if adapted:
                formats.load_peft(adapter, module)


class Places:
    """Where the published files of a system lie: `places("vae")` is the folder of its VAE.

    weights_folder   the system's own folder, or one that holds it and others (`weights.find`)
    base             the repository or folder that a saved system stands on, in place of the class's own
    """

    def __init__(self, system: type[Assembled], weights_folder: str | Path | None, base: str = ""):
        self.system, self.weights_folder = system, weights_folder
        self.repository = base if system.repository and base else system.repository

    def __call__(self, name: str, source: str = "") -> Path:
        part = self.system.parts.get(name)
        source = source or (part.source if part else "")
        inside = part.folder if part and part.folder is not None else name
        return (weights.find(source, self.weights_folder) if source else self.own()) / inside

    def own(self) -> Path:
        """The system's own published folder."""
        here = Path(self.weights_folder or "")
        if self.weights_folder and (here / self.system.denoiser / "config.json").is_file():
            return here
        return weights.find(self.repository, self.weights_folder)

    def base(self, shapes: Mapping[str, dict]) -> str:
        """What the published parts come from, in words that are found on other machines too where they can be: the name
        of a repository where the folder's path ends in it, else the path."""
        sources = [part.source or self.repository for name, part in self.system.parts.items() if name not in shapes]
        named = []
        for source in dict.fromkeys(sources):
            if source == self.repository:
                try:
                    path = self.own().absolute()
                except weights.WeightsNotFound:  # of a dry run
                    named.append(source)
                    continue
                org, name = path.parts[-2:]
                source = f"{org}/{name}" if org == self.system.repository.split("/")[0] else str(path)
            named.append(source)
        return ", ".join(named)


def owner(tokenizer: str) -> str:
    """The part that reads a tokenizer's tokens: text_encoder_2 of tokenizer_2."""
    return tokenizer.replace("tokenizer", "text_encoder")


def zeros(make: Callable[..., nn.Module], dtype: torch.dtype | None = None) -> nn.Module:
    """A module of the published shapes without a file: its weights are pages of the system that nobody has touched, and
    take no memory until they are written to."""
    dtype = dtype or torch.float32
    width = torch.empty((), dtype=dtype).element_size()

    def zero(shape: torch.Size) -> Tensor:
        return torch.frombuffer(mmap(-1, max(shape.numel(), 1) * width), dtype=dtype, count=shape.numel()).view(shape)

    module = weights.build(make)
    return weights.load(module, {name: zero(tensor.shape) for name, tensor in module.state_dict().items()})


def read_config(folder: str | Path) -> dict:
    """The `system.json` of a saved system."""
    path = Path(folder) / "system.json"
    if not path.is_file():
        raise weights.WeightsNotFound(f"{path} is missing: this is not a folder that train.py has saved a system in")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or "system" not in found:
        raise weights.WeightsError(f"{path} is damaged: no JSON object that names a system")
    return found
