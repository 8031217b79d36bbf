"""An adapter as its maker wrote it, onto the networks of a system: recognised by its keys, and not by its name.

    onto.fold("style.safetensors=0.8,runs/NAME", {"transformer": ..., "text_encoder": ...})

What can be read: a file of kohya's, diffusers' (in any spelling since 2023) or PEFT's keys; a PEFT folder; a folder
with such a file or such folders; a run of train.py, and the folder that it keeps its system in. Several are folded in
the order in which they are said. A weight multiplies alpha, as it does in PEFT and diffusers, for DoRA, too.
"""

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from torch import Tensor, nn

from nanomed import weights
from nanomed.adapters import formats, lora
from nanomed.run.flags import UsageError
from nanomed.weights import WeightsError, WeightsNotFound

# Adapters that are not low-rank pairs, by the ends of their keys.
FOREIGN = {
    "LoHa": r"\.hada_(w|t)\w+",
    "LoKr": r"\.lokr_\w+",
    "OFT": r"\.b?oft_\w+(\.\w+)*",
    "IA3": r"\.ia3_l(\.\w+)?|\.on_input",
    "DyLoRA": r"\.(up|down)_list\.\d+(\.weight)?|\.lora_[AB]\.\d+",
    "LoCon with a Tucker core": r"\.lora_mid\.weight",
    "GLoRA": r"\.[ab][12]\.weight",
    "VeRA": r"\.?vera_\w+(\.\w+)*",
    'full weights, as differences ("diff")': r"\.diff(_b)?|\.[wb]_norm",
}
_KOHYA = re.compile(r"lora_(unet|te|te1|te2|prior|transformer)_.+")
FOLDERS = {"decoder": "unet", "text": "text_encoder"}  # of adapters that do not say PART or PART_lora
_HEADS = ("unet", "transformer", "prior", "text_encoder", "text_encoder_2")


class Source(NamedTuple):
    """One file of an adapter."""

    file: Path
    tensors: dict[str, Tensor]
    settings: dict  # in PEFT's words; empty where nothing says them
    part: str = ""  # the network that the file's place says it is for
    metadata: Mapping[str, str] = {}

    @property
    def kohya(self) -> bool:
        """Whether the keys are kohya's."""
        return any(_KOHYA.fullmatch(key) for key in self.tensors)


def parse(given: str) -> list[tuple[Path, float]]:
    """(path, weight) of "A,B=0.8". A whole text, or a part of it, that is a path is taken for one."""
    found = []
    for item in [given] if exists(given) else given.split(","):
        path, equals, number = item.strip().rpartition("=")
        weight = 1.0
        if not equals or exists(item.strip()):
            path = item.strip()
        else:
            try:
                weight = float(number)
            except ValueError:
                raise UsageError(f"--lora {item}: what stands behind = must be a number, such as 0.8") from None
        if not path or not math.isfinite(weight):
            raise UsageError(f"--lora {item}: say FILE, FILE=0.8, or several by comma")
        if not exists(path):
            raise WeightsNotFound(f"--lora {path}: no such file or folder")
        found.append((Path(path), weight))
    return found


def exists(path: str) -> bool:
    """Whether something is at a path, which may be any text."""
    try:
        return Path(path).exists()
    except OSError:  # a name too long to be one
        return False


# ------------------------------------------------------------------------------------------------------------ reading


def sources(path: Path) -> list[list[Source]]:
    """What is at a path: adapters that lie on each other, the lowest first, each one file or a file for each part."""
    model = path / "model" if (path / "model" / "system.json").is_file() else path
    if not path.is_dir():
        return [[_of_file(path)]]
    if (path / "adapter_config.json").is_file():
        return [[_of_peft(path)]]
    below = [_of_folders(folder) for folder in kept(model)]
    if mine := _of_folders(model):
        return [*below, mine]
    loose = sorted(path.glob("*.safetensors"))
    named = [file for file in loose if file == formats.diffusers_file(path)] or loose
    if len(named) == 1:
        return [[_of_file(named[0])]]
    if loose:
        raise WeightsError(f"{path} holds {len(loose)} files ({', '.join(f.name for f in loose[:4])}): name one")
    raise WeightsNotFound(f"{path} holds no adapter: neither adapter_config.json nor a .safetensors file is there, nor "
                          f"a folder with them")  # fmt: skip


def kept(model: Path) -> list[Path]:
    """The folders of what lies folded below the adapters of a saved system, the lowest first."""
    return sorted((model / "below").glob("[0-9]*"), key=lambda folder: int(folder.name))


def _of_folders(folder: Path) -> list[Source]:
    """The PEFT folders in a folder; their names say for which network they are."""
    found = []
    for about in sorted(folder.glob("*/adapter_config.json")):
        name = about.parent.name.removesuffix("_lora")
        found.append(_of_peft(about.parent)._replace(part=FOLDERS.get(name, name)))
    return found


def _of_peft(folder: Path) -> Source:
    settings = formats.peft_settings(folder)
    file = folder / "adapter_model.safetensors"
    if not file.exists() and (folder / "adapter_model.bin").exists():
        return Source(folder / "adapter_model.bin", weights.read_pickle(folder / "adapter_model.bin"), settings)
    return _judged(Source(file, weights.read(file), settings))


def _of_file(file: Path) -> Source:
    if file.name.startswith("adapter_model.") and (file.parent / "adapter_config.json").is_file():
        return _of_peft(file.parent)
    if file.suffix in (".bin", ".pt", ".pth"):
        return _judged(Source(file, weights.read_pickle(file), {}))
    tensors = weights.read(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
    settings = formats.parse(metadata.get("lora_adapter_metadata", "{}"), f"{file}: its metadata")
    source = Source(file, tensors, settings, metadata=metadata)
    if not settings and any(key.startswith("base_model.model.") for key in tensors):
        raise WeightsNotFound(f"{file}: PEFT's keys, whose alpha stands in adapter_config.json: name the folder that "
                              f"holds both")  # fmt: skip
    return _judged(source)


def _judged(source: Source) -> Source:
    """The source, unless it is an adapter of another kind."""
    for kind, pattern in FOREIGN.items():
        keys = [key for key in source.tensors if re.search(f"(?:{pattern})$", key)]
        if keys:
            raise WeightsError(f"{source.file}: {kind}, in {len(keys)} keys ({keys[0]}, ...), which is not read here: "
                               f"LoRA, LoCon, rsLoRA and DoRA are")  # fmt: skip
    if not any(formats.KEY.fullmatch(key) for key in source.tensors):
        raise WeightsError(f"{source.file}: no adapter, its keys are {', '.join(sorted(source.tensors)[:3])}, ...")
    return source


def groups(source: Source) -> dict[str, tuple[str, dict[str, Tensor]]]:
    """{how keys begin: (the part that this says, or "", and these tensors)}."""
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in source.tensors.items():
        if source.kohya:
            match = re.match(r"lora_(?:unet|te1?|te2|prior|transformer)_", key)
            found[match[0] if match else ""][key] = tensor
        else:
            head = key.partition(".")[0]
            found[f"{head}." if head in _HEADS and not source.settings.get("peft_type") else ""][key] = tensor
    said = {"lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
    return {prefix: (source.part or said.get(prefix, prefix[:-1] if prefix.endswith(".") else ""), tensors)
            for prefix, tensors in found.items()}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- placing


def attach(some: Iterable[Source], modules: Mapping[str, nn.Module], weight: float = 1.0) -> list[str]:
    """Give networks, which have none, an adapter; returns their names. Raises WeightsError for what has no place."""
    given: list[str] = []
    for source in some:
        parts: list[formats.Part] = []
        names: list[str] = []
        for prefix, (said, tensors) in groups(source).items():
            name, part, fits = _place(source, prefix, said, tensors, modules)
            parts.append(part)
            if not fits:
                continue  # `place` refuses it, key by key
            if name in given + names:
                raise WeightsError(f"{source.file}: two adapters for {name}")
            names.append(name)
        whole = {key: tensor for part in parts for key, tensor in part.tensors.items()}
        formats.place(source.file, whole, parts)
        given += names
    for layer in [layer for name in given for layer in lora.layers_of(modules[name]).values() if weight != 1]:
        layer.alpha = float(layer.alpha) * weight  # type: ignore[assignment, arg-type]
    return given


def _place(
    source: Source, prefix: str, said: str, tensors: dict[str, Tensor], modules: Mapping[str, nn.Module]
) -> tuple[str, formats.Part, bool]:
    """The network that all these keys have a place in; where there is none, the one that comes nearest, to complain,
    and False."""
    settings = source.settings
    if prefix.endswith(".") and settings:  # diffusers' header is one table for all parts
        settings = {key[len(prefix) :]: value for key, value in settings.items() if key.startswith(prefix)}
    best: tuple[int, str, formats.Part] | None = None
    fits = []
    for name in sorted(modules, key=lambda name: name != said):
        module = modules[name]
        mine = tensors if source.kohya else formats.unfused(module, tensors, source.file)
        locate = formats.by_underscores(module, source.file) if source.kohya else formats.by_name(module)
        matches = [formats.KEY.fullmatch(key, len(prefix)) for key in mine]
        placed = sum(bool(match and locate(match["path"])) for match in matches)
        part = formats.Part(module, mine, prefix, locate, settings)
        if placed == len(mine):
            fits.append((name, part))
            if name == said:
                break
        if best is None or placed > best[0]:
            best = placed, name, part
    if len(fits) > 1:
        raise WeightsError(f"{source.file}: its keys fit {' and '.join(name for name, _ in fits)} alike; write it with "
                           f"the part's name before the keys, as diffusers does")  # fmt: skip
    if fits:
        return *fits[0], True
    assert best is not None
    return best[1], best[2], False


def fold(given: str, modules: Mapping[str, nn.Module]) -> list[dict]:
    """Fold adapters into networks for good. Returns what was folded, as a drawing's settings say it."""
    said = []
    for path, weight in parse(given):
        for some in sources(path):
            for name in attach(some, modules, weight):
                lora.fold(modules[name])
            tensors = {f"{i} {key}": t for i, source in enumerate(some) for key, t in source.tensors.items()}
            said.append({"file": path.name, "weight": weight, "sha256": weights.fingerprint(tensors)})
    return said


class Kept(NamedTuple):
    """An adapter that a run keeps, so that it goes on without the file."""

    part: str
    adapter: formats.Stored
    below: int | None  # at which place it is folded; None: it is trained further


def keep(given: str, modules: Mapping[str, nn.Module], further: Collection[str] = ()) -> list[Kept]:
    """What a run is to keep of adapters: all are folded, but for the last one, as far as it is for parts that are to be
    trained `further`. The networks are left as they were.

    Raises UsageError where the last one has nothing to be trained further.
    """
    found = []
    every = [(some, weight) for path, weight in parse(given) for some in sources(path)]
    for i, (some, weight) in enumerate(every):
        for name in attach(some, modules, weight):
            goes_on = i == len(every) - 1 and name in further
            found.append(Kept(name, formats.stored(modules[name]), None if goes_on else i))
            lora.remove(modules[name])
    if further and all(one.below is not None for one in found):
        raise UsageError(f"--lora {given}: it has nothing for {', '.join(further)}, which this run trains; say --rank, "
                         f"and it is folded below a new one")  # fmt: skip
    return found


def write(found: Iterable[Kept], run: Path) -> None:
    """Into a run, as PEFT folders: model/below/N/PART, above those that are there, and start/PART."""
    first = len(kept(run / "model"))
    for part, adapter, below in found:
        place = run / "start" if below is None else run / "model" / "below" / str(first + below)
        formats.save_peft(place / part, adapter)
