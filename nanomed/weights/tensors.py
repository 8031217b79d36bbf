"""Reading files: tensors of safetensors, memory-mapped; settings of `config.json`; plain pickles where there is nothing
else."""

import dataclasses
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Collection, Mapping
from inspect import signature
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanomed.run import files
from nanomed.run.progress import progress
from nanomed.weights.header import SIZES, WeightsError, WeightsNotFound, check_header, no_repeats

STEMS = ("diffusion_pytorch_model", "model")  # how diffusers and transformers name a part's file
CHUNK = 256 << 20  # bytes of a file that are mapped at a time while its tensors are converted
C = TypeVar("C")


def read(
    path: str | Path, stem: str | None = None, prefix: str | tuple[str, ...] = "", dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a folder that holds one file or shards; memory-mapped.

    stem     of the file in a folder: "diffusion_pytorch_model" or "model" (the default: whichever is there). The
             `.fp16.` variant is read where there is no plain file.
    prefix   only names that begin with it, or with one of several; names stay whole
    dtype    convert floating-point tensors, one by one: little more than the result is ever in memory

    Raises WeightsError for a file that is missing, damaged or not a safetensors file, and for a prefix that no name
    has. Writing to a tensor does not write to the file.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    for file, mapped in _files(path, stem).items():
        header = check_header(file)
        if mapped is not None and mapped != header.keys():
            problems = some(mapped - header.keys(), "not in it though its index says so")
            problems += some(header.keys() - mapped, "in it though its index does not say so")
            raise WeightsError(f"{file}: {problems.rstrip('; ')}")
        parts: dict[int, list[str]] = {}
        start = 0
        for name in (name for name in header if name.startswith(prefix)):
            parts.setdefault(start // CHUNK, []).append(name)
            start += math.prod(header[name].shape) * SIZES[header[name].dtype]
        # A new mapping each time: the pages of what was converted are given back.
        for names in progress(list(parts.values()), f"reading {file.name}", "part"):
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in names:
                        tensor = opened.get_tensor(name)
                        tensor = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
                        tensors[name] = tensor.clone() if files.WINDOWS else tensor  # none replaces a mapped file there
            except (SafetensorError, RuntimeError, ValueError) as error:
                raise WeightsError(f"{file}: {error}") from error
    if not tensors:
        raise WeightsError(f"{path}: no tensor" + (f" has a name that begins with {prefix!r}" if prefix else ""))
    return tensors


def configured(
    cls: type[C], path: str | Path, what: str, unsaid: Mapping | None = None, inside: str = "", **more: object
) -> C:
    """The dataclass that a published `config.json` describes, given the file or its folder.

    what     which network it must be of, for messages: "a T5"
    unsaid   what the format means where it is silent, as far as that is not the default of `cls`
    inside   name of the nested part to read where there is one, such as "text_config" of a whole CLIP
    more     fields that the file says in another way

    Raises WeightsError where it is missing, damaged, or does not fit.
    """
    stated = settings(path, what)
    names = {field.name for field in dataclasses.fields(cls)}
    try:
        stated = stated.get(inside, stated)
        said = {name: value for name, value in stated.items() if name in names and value is not None}
        return cls(**{**(unsaid or {}), **said, **more})
    except (ValueError, AttributeError, TypeError) as error:
        raise WeightsError(f"{path}: not the configuration of {what} ({error})") from error


def settings(path: str | Path, what: str) -> dict:
    """What a published JSON file says; of a folder, its `config.json`. Messages say `what` it must describe. Raises
    WeightsError."""
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise WeightsError(f"{path} is missing: it is to describe {what}")
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(stated, dict):
            raise ValueError("no table of names and values")
    except ValueError as error:
        raise WeightsError(f"{path}: not the configuration of {what} ({error})") from error
    return stated


def arguments(path: str | Path, make: Callable, known: Mapping) -> dict:
    """What a published `config.json` says about the arguments of `make`; of a folder, its own.

    known   what it may say besides shapes, with the value that is known here: with another one it would be another
            network, of the very same names

    Raises WeightsError.
    """
    stated = settings(path, f"a {make.__name__}")
    for name, value in known.items():
        if stated.get(name, value) != value:
            raise WeightsError(f"{path}: {name} is {stated[name]!r}, which is not known here: {value!r} is")
    return {name: stated[name] for name in signature(make).parameters if name in stated}


def read_pickle(path: str | Path, prefix: str = "", dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors of a `.bin` or `.pth` file, for the few repositories that have nothing else. No code in it is run."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path} is missing")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        tensors = {name: tensor for name, tensor in content.items() if name.startswith(prefix)}
        if odd := [name for name, tensor in tensors.items() if not isinstance(tensor, Tensor)]:
            raise TypeError(f"{odd[0]} is not a tensor")
    except Exception as error:  # torch raises all sorts here; which one says nothing to a user
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise WeightsError(f"{path}: not a plain pickle of tensors, and nothing else is opened ({reason})") from error
    return {name: t.to(dtype) if dtype and t.is_floating_point() else t for name, t in tensors.items()}


def _files(path: Path, stem: str | None) -> dict[Path, set[str] | None]:
    """The files to read, each with the names that an index says are in it (None: no index)."""
    if not path.is_dir():
        if not path.exists() and not path.is_symlink():
            raise WeightsNotFound(f"{path} is missing")
        return {kept_inside(path): None}
    stems = (stem,) if stem else STEMS
    for variant in ("", ".fp16"):  # every plain spelling before any half-precision one
        for name in stems:
            file = path / f"{name}{variant}.safetensors"
            if file.exists() or file.is_symlink():
                return {kept_inside(file): None}
            index_names = (f"{name}.safetensors.index{variant}.json", f"{name}{variant}.safetensors.index.json")
            for index in dict.fromkeys(path / index_name for index_name in index_names):
                if index.is_file():
                    return _shards(index)
    pickles = sorted(p.name for p in path.glob("*") if p.suffix in (".bin", ".pth", ".pt", ".ckpt"))
    hint = f"; {pickles[0]} is a pickle, which is not read here" if pickles else ""
    raise WeightsNotFound(f"{path} has no {' or '.join(f'{s}.safetensors' for s in stems)}{hint}")


def _shards(index: Path) -> dict[Path, set[str] | None]:
    text = kept_inside(index).read_text(encoding="utf-8", errors="replace")
    try:
        placed = list(json.loads(text, object_pairs_hook=no_repeats)["weight_map"].items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{index}: not an index of shards ({type(error).__name__}: {error})") from error
    shards: dict[Path, set[str] | None] = {}
    for name, shard in placed:
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.safetensors", str(shard)):
            raise WeightsError(f"{index}: {name} is said to be in {shard!r}, which is not a file of this folder")
        shards.setdefault(index.parent / shard, set()).add(name)
    for shard in shards:
        if not shard.exists():
            raise WeightsError(f"{shard} is missing, though {index.name} names it: the download is not complete")
        kept_inside(shard)
    return shards


def kept_inside(path: Path) -> Path:
    """The path, unless it lies in the Hugging Face cache and is a link that leaves its repository's folder."""
    for parent in path.absolute().parents:
        if parent.name.startswith("models--") and not Path(os.path.realpath(path)).is_relative_to(parent.resolve()):
            raise WeightsError(f"{path} is a link that leaves {parent}")
    return path


def some(names: Collection[str], what: str, most: int = 6) -> str:
    """`3 missing (a, b, c); `, or nothing for no names."""
    if not names:
        return ""
    names = sorted(names)
    return f"{len(names)} {what} ({', '.join(names[:most])}{', ...' if len(names) > most else ''}); "
