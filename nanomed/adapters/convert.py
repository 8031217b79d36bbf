"""Adapters from format to format, and into published weights, without a network: files hold all there is to know."""

import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from nanomed import weights
from nanomed.adapters import formats, kohya, onto
from nanomed.adapters.layer import attach
from nanomed.adapters.lora import by_pattern
from nanomed.adapters.onto import Source
from nanomed.run import files
from nanomed.run.flags import UsageError
from nanomed.weights import WeightsError

Adapters = dict[str, formats.Stored]  # of the parts of a system, by name
_NAMES = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}

# ------------------------------------------------------------------------------------------------------------- reading


def read(path: Path) -> list[Adapters]:
    """The adapters of a run, a folder or a file, those that lie below first. The names in kohya's files, which have
    lost their dots, are cut where known words end (kohya.py); WeightsError for those that are not made of them."""
    return [_adapters(some) for some in onto.sources(path)]


def _adapters(some: Sequence[Source]) -> Adapters:
    found: Adapters = {}
    for source in some:
        for prefix, (part, tensors) in onto.groups(source).items():
            settings = source.settings
            if prefix and settings:
                settings = {k[len(prefix) :]: v for k, v in settings.items() if k.startswith(prefix)}
            if source.kohya:
                tensors = _dotted(source, prefix, tensors)
                part = part or ("unet" if kohya.is_unet(next(iter(tensors))[len(prefix) :]) else "")
            found[part or "transformer"] = _stored(source, prefix, tensors, settings)
    return found


def _dotted(source: Source, prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of kohya's keys with the dots of their layers' names."""
    paths = {}
    for key in tensors:
        if not (match := formats.KEY.fullmatch(key, len(prefix))):
            raise WeightsError(f"{source.file}: {key} is no tensor of a LoRA")
        paths[key] = match["path"]
    names = kohya.named(dict.fromkeys(paths.values()), source.file)
    found = {f"{prefix}{names[paths[key]]}{key[len(prefix) + len(paths[key]) :]}": t for key, t in tensors.items()}
    if len(found) < len(tensors):
        raise WeightsError(f"{source.file}: two of its layers are the same one")
    return found


def _stored(source: Source, prefix: str, tensors: Mapping[str, Tensor], settings: dict) -> formats.Stored:
    named: dict[str, Tensor] = {}
    alphas: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = formats.KEY.fullmatch(key, len(prefix))
        slot = next((slot for slot in formats.SPELLINGS if match and match[slot]), "")
        if not match or slot not in (*_NAMES, "alpha", "dora_scale"):
            raise WeightsError(f"{source.file}: {key} is no tensor of a LoRA")
        layer = match["path"].removeprefix("base_model.model.")
        if slot == "alpha":
            alphas[layer] = tensor
        elif slot == "dora_scale":
            scales[layer] = tensor
        else:
            named[f"{layer}.{_NAMES[slot]}"] = tensor
    layers = sorted({name.partition(".lora_")[0] for name in named})
    if odd := [name for name in layers if not {f"{name}.lora_A.weight", f"{name}.lora_B.weight"} <= named.keys()]:
        raise WeightsError(f"{source.file}: {odd[0]} has not both A and B")
    for name in layers:
        a, b = (named[f"{name}.lora_{factor}.weight"] for factor in "AB")
        if a.dim() < 2 or b.dim() < 2 or a.shape[0] != b.shape[1] or not a.numel() * b.numel() or not (
            a.is_floating_point() and b.is_floating_point()
        ):
            raise WeightsError(f"{source.file}: A and B of {name} are {a.dtype} {tuple(a.shape)} and {b.dtype} "
                               f"{tuple(b.shape)}, which is no LoRA")  # fmt: skip
    said = {name: formats.alpha_of(f"{source.file}: {name}", name, len(named[f"{name}.lora_A.weight"]),
                                   alphas.get(name), settings) for name in layers}  # fmt: skip
    for layer, scale in scales.items():
        outs = len(named.get(f"{layer}.lora_B.weight", ()))
        if scale.numel() != outs or scale.dim() > 1 and len(scale) != outs:
            raise WeightsError(f"{source.file}: the DoRA magnitude of {layer} is {tuple(scale.shape)}, not one per "
                               f"output channel")  # fmt: skip
        named[f"{layer}.{_NAMES['magnitude']}"] = scale.flatten()
    if not settings:
        ranks = {name: len(named[f"{name}.lora_A.weight"]) for name in layers}
        settings = _settings(ranks, said)
        settings["use_dora"] = any("magnitude" in name for name in named)
    return formats.Stored(named, settings, settings.get("base_model_name_or_path") or "")


def _settings(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict:
    """In PEFT's words, for layers that are named in full."""
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank, "lora_alpha": alpha, "target_modules": sorted(ranks), "lora_dropout": 0.0, "bias": "none",
        "use_rslora": False, "rank_pattern": {f"^{name}": r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{name}": a for name, a in alphas.items() if a != alpha},
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- writing


def write(adapters: Adapters, to: str, out: Path, dtype: torch.dtype | None = None) -> list[Path]:
    """Write adapters in a format: "peft" (a folder; one in it for each part where there are several), "diffusers" or
    "kohya" (a file; a file for each denoiser where there are several). Returns what was written."""
    free(out)
    adapters = {part: one._replace(tensors=_converted(one.tensors, dtype)) for part, one in adapters.items()}
    if to == "peft":
        folders = {part: out if len(adapters) == 1 else out / part for part in adapters}
        for part, folder in folders.items():
            formats.save_peft(folder, adapters[part])
        return [*folders.values()]
    out = out if out.suffix == ".safetensors" else out.with_name(f"{out.name}.safetensors")
    free(out)
    if to == "diffusers":
        formats.save_diffusers(out, adapters)
        return [out]
    texts = {part: one for part, one in adapters.items() if part.startswith("text_encoder")}
    denoisers = [part for part in adapters if part not in texts]
    if len(denoisers) < 2:
        formats.save_kohya(out, adapters)
        return [out]
    outs = {part: out.with_name(f"{out.stem}-{part}.safetensors") for part in denoisers}
    for place in outs.values():
        free(place)
    for i, (part, place) in enumerate(outs.items()):
        formats.save_kohya(place, {part: adapters[part]} | (texts if i == 0 else {}))
    return [*outs.values()]


def free(out: Path) -> None:
    """Refuse a place where something is."""
    if out.is_file() or out.is_dir() and any(out.iterdir()):
        raise UsageError(f"--out {out} is there already: choose another name or remove it")


def _converted(tensors: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) if dtype else tensor for name, tensor in tensors.items()}


# ------------------------------------------------------------------------------------------------------------- merging


def merge(source: Path, out: Path, weights_folder: str | None = None, dtype: torch.dtype | None = None) -> list[Path]:
    """Write the published repositories that a run or an adapter stands on, whole, with what was trained in them: the
    adapters merged, and parts that trained without one in the place of the published ones. What did not change is
    linked where the disk allows it, else copied. Returns the folders.
    """
    free(out)
    model = source / "model" if (source / "model" / "system.json").is_file() else source
    layers = read(source) if _has_adapters(source) else []
    said = _json(model / "system.json") if (model / "system.json").is_file() else {}
    whole = {folder.name: folder for folder in model.glob("*/") if said and any(folder.glob("*.safetensors"))
             and not (folder / "adapter_config.json").is_file()}  # fmt: skip
    base = said.get("base") or next((one.base for some in layers for one in some.values() if one.base), "")
    if not base:
        raise UsageError(f"{source}: it does not say on which published weights it stands, so nothing can be "
                         f"merged")  # fmt: skip
    changed = {part: None for some in layers for part in some} | {part: None for part in whole}
    here, names = Path(weights_folder or ""), base.split(", ")
    if len(names) == 1 and any((here / part / "config.json").is_file() for part in changed):  # the repository itself
        names = [str(here)]
    repositories = [weights.find(name, weights_folder) for name in names]
    places = {folder: out if len(repositories) == 1 else out / folder.name for folder in repositories}
    homes = {}
    for part in changed:
        homes[part] = next((folder for folder in repositories if (folder / part / "config.json").is_file()), None)
        if homes[part] is None:
            raise WeightsError(f"{base}: none has a folder {part}, for which {source} has weights")
    with files.atomic(out) as temporary:
        for folder, place in places.items():
            taken = {folder / part for part, home in homes.items() if home == folder}
            _linked(folder, temporary / place.relative_to(out), taken)
        for part, home in homes.items():
            assert home is not None
            file = weights_file(home / part)
            tensors = weights.read(whole.get(part, home / part))
            for some in layers:
                if part in some:
                    tensors = merged(tensors, some[part], f"{home / part}")
            place = temporary / places[home].relative_to(out) / part
            files.write_tensors(place / file, _converted(tensors, dtype) if dtype else tensors)
    return list(places.values())


def _has_adapters(path: Path) -> bool:
    return path.is_file() or any(path.rglob("adapter_config.json")) or not (path / "model").is_dir()


def merged(tensors: Mapping[str, Tensor], adapter: formats.Stored, where: str) -> dict[str, Tensor]:
    """The weights of a network with an adapter in them, in their own dtype."""
    found, said = dict(tensors), adapter.settings
    for name in dict.fromkeys(key.partition(".lora_")[0] for key in adapter.tensors):
        if f"{name}.weight" not in tensors:
            raise WeightsError(f"{where}: no layer {name}, which the adapter is for")
        weight = tensors[f"{name}.weight"]
        a, b = (adapter.tensors[f"{name}.lora_{factor}.weight"].float() for factor in "AB")
        if weight.dim() not in (2, 4) or a.shape[1] != weight.shape[1] or b.shape[0] != weight.shape[0]:
            raise WeightsError(f"{where}: {name} is {tuple(weight.shape)}, not what the adapter is for")
        magnitude = adapter.tensors.get(f"{name}.lora_magnitude_vector")
        layer: nn.Module = nn.Linear(1, 1) if weight.dim() == 2 else nn.Conv2d(1, 1, 1)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        alpha = by_pattern(said.get("alpha_pattern"), name, said["lora_alpha"])
        magnitude = None if magnitude is None else magnitude.float().flatten()
        attach(layer, a, b, magnitude, alpha, bool(said.get("use_rslora")))
        found[f"{name}.weight"] = layer.merged_weight()
    return found


def weights_file(folder: Path) -> str:
    """What the one weights file of a part is called."""
    names = {path.name.split(".")[0].split("-0")[0] for path in folder.iterdir() if ".safetensors" in path.name}
    return f"{'model' if names == {'model'} else 'diffusion_pytorch_model'}.safetensors"


def _linked(folder: Path, out: Path, taken: set[Path]) -> None:
    """The files of a repository under another name, without the weights of the parts that are `taken`, without pickles
    and what lies hidden."""
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        weighty = ".safetensors" in path.name or path.suffix in (".bin", ".ckpt", ".pt")
        if not path.is_file() or inside.parts[0].startswith(".") or weighty and path.parent in taken:
            continue
        place = out / inside
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(os.path.realpath(path), place)
        except OSError:  # another disk, or one that knows no links
            shutil.copyfile(path, place)


def _json(path: Path) -> dict:
    return formats.parse(path.read_text(encoding="utf-8", errors="replace"), str(path))


# ------------------------------------------------------------------------------------------------------------- showing


def show(path: Path) -> list[str]:
    """Lines that say what an adapter is: format, and of each part rank, alpha, layers, dtype, base."""
    lines = []
    every = onto.sources(path)
    for i, some in enumerate(every):
        if len(every) > 1:
            lines.append("on top" if i == len(every) - 1 else f"below, folded at place {i}")
        for source in some:
            try:
                lines += _shown(source)
            except (TypeError, ValueError, AttributeError, RuntimeError, re.error) as error:
                told = f"{source.file}: rank and alpha are not said ({type(error).__name__}: {error})"
                raise WeightsError(told) from error
    return lines


def _shown(source: Source) -> list[str]:
    kind = "kohya" if source.kohya else "PEFT" if source.settings.get("peft_type") else "diffusers"
    lines = [f"{source.file}: {kind}"]
    for prefix, (part, tensors) in onto.groups(source).items():
        settings = source.settings
        if prefix.endswith(".") and settings:
            settings = {k[len(prefix) :]: v for k, v in settings.items() if k.startswith(prefix)}
        matches = {key: formats.KEY.fullmatch(key, len(prefix)) for key in tensors}
        ranks, given, dora, values = {}, {}, False, 0
        for key, match in matches.items():
            if match and match["A"]:
                ranks[match["path"]] = len(tensors[key])
            elif match and match["alpha"]:
                given[match["path"]] = float(tensors[key])
            dora = dora or bool(match and (match["magnitude"] or match["dora_scale"]))
            values += tensors[key].numel() if match and not match["alpha"] else 0
        said = settings.get("lora_alpha")
        alphas = {}
        for name, rank in ranks.items():
            plain = name.removeprefix("base_model.model.")
            stated = rank if said is None else by_pattern(settings.get("alpha_pattern"), plain, said)
            alphas[name] = given.get(name, stated)
        how = ["DoRA"] if dora else []
        how += ["rsLoRA, scale alpha / sqrt(rank)"] if settings.get("use_rslora") else []
        unsaid = "" if given or said is not None else " (not said: taken for the rank)"
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
        base = settings.get("base_model_name_or_path") or source.metadata.get("ss_sd_model_name") or "not said"
        name = part or (prefix.rstrip("_.") or "a network that the keys do not name")
        odd = [key for key, match in matches.items() if match is None]
        lines.append(f"  {name}: rank {_range(ranks.values())}, alpha {_range(alphas.values())}{unsaid}, "
                     f"{len(ranks)} layers, {values:,} values, {' and '.join(dtypes)}{', ' if how else ''}"
                     f"{', '.join(how)}; base: {base}")  # fmt: skip
        lines += [f"  {len(odd)} keys that are no LoRA: {', '.join(odd[:4])}"] if odd else []
    return lines


def _range(values) -> str:
    low, high = min(values, default=math.nan), max(values, default=math.nan)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
