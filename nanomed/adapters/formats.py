"""Adapters in files: PEFT folders, `pytorch_lora_weights.safetensors` of diffusers (with its older spellings), kohya's
keys. A key that has no place in the network is an error, and alpha is always written."""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from nanomed import weights
from nanomed.adapters.layer import attach
from nanomed.adapters.lora import (
    adaptable,
    by_pattern,
    ending,
    expect_adaptable,
    expect_bare,
    layers_of,
    matches,
    state,
)
from nanomed.adapters.lora import parameters as trained
from nanomed.run import files
from nanomed.weights import WeightsError

# ------------------------------------------------------------------------------------------------------------- saving


class Stored(NamedTuple):
    """The adapter of one network without the network."""

    tensors: dict[str, Tensor]  # in PEFT's names: x.lora_A.weight, x.lora_B.weight, x.lora_magnitude_vector
    settings: dict  # in PEFT's words, as `config`
    base: str = ""  # the published name of the network below, e.g. "PixArt-alpha/PixArt-XL-2-512x512"


def stored(module: nn.Module, base: str = "") -> Stored:
    """The adapter that a network has, apart from it."""
    return Stored(state(module), config(module), base)


def save_peft(folder: str | Path, adapter: nn.Module | Stored, base_model: str = "") -> None:
    """Write a PEFT folder: `adapter_model.safetensors`, then `adapter_config.json`.

    adapter      a network that has one, or the adapter alone
    base_model   the published name of the network below, e.g. "PixArt-alpha/PixArt-XL-2-512x512"
    """
    tensors, said, base = adapter if isinstance(adapter, Stored) else stored(adapter, base_model)
    settings = {"peft_type": "LORA", "task_type": None, "base_model_name_or_path": base or None,
                "inference_mode": True, "fan_in_fan_out": False, "modules_to_save": None} | said  # fmt: skip
    tensors = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    files.write_tensors(Path(folder) / "adapter_model.safetensors", tensors)
    files.write_json(Path(folder) / "adapter_config.json", settings)


def save_diffusers(path: str | Path, modules: Mapping[str, nn.Module | Stored]) -> None:
    """Write what diffusers' `load_lora_weights` reads: one safetensors file, `<part>.<layer>.lora_A.weight`.

    path      the file, or a folder for `pytorch_lora_weights.safetensors`
    modules   {"transformer": ...} or {"unet": ..., "text_encoder": ...}: the parts by their names in the pipeline

    Ranks, alphas and targets stand in the header under "lora_adapter_metadata". Readers that do not know it (older
    versions of diffusers) take the rank for alpha: for those train with alpha = rank, or write kohya's format.
    """
    tensors: dict[str, Tensor] = {}
    settings: dict[str, object] = {}
    for part, module in modules.items():
        mine, said, _ = module if isinstance(module, Stored) else stored(module)
        tensors |= {f"{part}.{name}": tensor for name, tensor in mine.items()}
        settings |= {f"{part}.{key}": value for key, value in said.items()}
    metadata = {"lora_adapter_metadata": json.dumps(settings, sort_keys=True)}
    files.write_tensors(diffusers_file(path), tensors, metadata)


def save_kohya(path: str | Path, modules: Mapping[str, nn.Module | Stored]) -> None:
    """Write the safetensors file that ComfyUI and the web UIs read: `lora_unet_<layer_with_underscores>` and
    `.lora_down.weight`, `.lora_up.weight`, `.alpha` and, for DoRA, `.dora_scale`.

    modules   as in `save_diffusers`; text encoders become lora_te_ (lora_te1_ and lora_te2_ where there are two), any
              other part lora_unet_. The format's scale is alpha / r, so rsLoRA is written with alpha sqrt(r).
    """
    tensors: dict[str, Tensor] = {}
    prefixes = {part: kohya_prefixes(part)[part == "text_encoder" and "text_encoder_2" in modules] for part in modules}
    if len(set(prefixes.values())) < len(modules):
        raise ValueError(f"{', '.join(modules)}: kohya's format has one denoiser, so write a file for each")
    for part, module in modules.items():
        mine, said, _ = module if isinstance(module, Stored) else stored(module)
        for name in dict.fromkeys(key.partition(".lora_")[0] for key in mine):
            key = prefixes[part] + name.replace(".", "_")
            if f"{key}.alpha" in tensors:
                raise ValueError(f"two layers are {key} in kohya's spelling ({name} is one): use another format")
            a, b = mine[f"{name}.lora_A.weight"], mine[f"{name}.lora_B.weight"]
            tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
            alpha = by_pattern(said.get("alpha_pattern"), name, said["lora_alpha"])
            alpha *= math.sqrt(len(a)) if said.get("use_rslora") else 1
            exact = torch.tensor(alpha, dtype=torch.float64)  # in fp32 where that holds it, as others write it
            tensors[f"{key}.alpha"] = exact.float() if exact.float().double() == exact else exact
            if (magnitude := mine.get(f"{name}.lora_magnitude_vector")) is not None:
                tensors[f"{key}.dora_scale"] = magnitude.reshape(-1, *[1] * (a.dim() - 1))
    files.write_tensors(path, tensors)


def config(module: nn.Module) -> dict:
    """The adapter's settings in PEFT's words: r, lora_alpha, target_modules, use_dora, use_rslora, the patterns."""
    layers = layers_of(module)
    first = next(iter(layers.values()))
    rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]

    def pattern(name: str) -> str:  # PEFT also matches the ends of names; ^ stops that where another layer would match
        return f"^{name}" if any(other.endswith(f".{name}") for other in layers) else name

    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": _targets(module, layers),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": first.lora_magnitude_vector is not None,
        "use_rslora": first.rank_stabilised,
        "rank_pattern": {pattern(name): layer.rank for name, layer in layers.items() if layer.rank != rank},
        "alpha_pattern": {pattern(name): layer.alpha for name, layer in layers.items() if layer.alpha != alpha},
    }


def _targets(module: nn.Module, layers: Collection[str]) -> list[str] | str:
    """Target names that choose these layers and no others: their endings, else their names, else an expression."""
    names = [name for name, _ in module.named_modules() if ".lora_" not in name]
    for targets in (sorted({ending(name) for name in layers}), sorted(layers)):
        if {name for name in names if matches(name, targets)} == set(layers):
            return targets
    return "|".join(re.escape(name) for name in sorted(layers))


def diffusers_file(path: str | Path) -> Path:
    """The file itself, or the one that diffusers writes into a folder."""
    return Path(path) if Path(path).suffix == ".safetensors" else Path(path) / "pytorch_lora_weights.safetensors"


def kohya_prefixes(part: str) -> tuple[str, ...]:
    """How the keys of a part of a pipeline begin; the first is written."""
    return {"text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}.get(part, ("lora_unet_",))


# ------------------------------------------------------------------------------------------------------------ loading

# How files spell the tensors of a layer: PEFT (with or without the adapter's name), diffusers, old diffusers, kohya.
SPELLINGS = {
    "A": r"\.lora_A(\.\w+)?\.weight|(\.lora|\.lora_linear_layer|_lora)\.down\.weight|\.lora_down\.weight",
    "B": r"\.lora_B(\.\w+)?\.weight|(\.lora|\.lora_linear_layer|_lora)\.up\.weight|\.lora_up\.weight",
    "magnitude": r"\.lora_magnitude_vector(\.\w+)?(\.weight)?",
    "dora_scale": r"\.dora_scale",
    "alpha": r"\.alpha",
}
KEY = re.compile("(?P<path>.+?)(?:" + "|".join(f"(?P<{slot}>{text})" for slot, text in SPELLINGS.items()) + ")")
_OLD_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}  # in text encoders, 2023
# What PEFT can do besides, that changes the function computed and leaves no tensor of its own in the file.
_FOREIGN = ("lora_bias", "use_qalora", "layer_replication", "alora_invocation_tokens", "velora_config", "arrow_config")


class Part(NamedTuple):
    """What a file holds for one network."""

    module: nn.Module
    tensors: dict[str, Tensor]  # by the keys of the file
    prefix: str  # that all these keys begin with
    locate: Callable[[str], str | None]  # a path as the file spells it -> the name of a layer, or None
    settings: dict = {}  # in PEFT's words; empty where the file has none


def load_peft(folder: str | Path, module: nn.Module) -> list[nn.Parameter]:
    """Give `module`, which has none, the adapter of a PEFT folder. Freezes the rest, returns what trains, as `inject`.

    `adapter_model.safetensors` is read or, where only that is there, `adapter_model.bin` (as plain tensors). Raises
    WeightsError for what is damaged, incomplete, of another shape, not LoRA, or names a layer that is not there; the
    network is then as it was.
    """
    folder, settings = Path(folder), peft_settings(folder)
    file, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if not file.exists() and pickled.exists():
        file, tensors = pickled, weights.read_pickle(pickled)
    else:
        tensors = weights.read(file)
    tensors = unfused(module, tensors, file)
    return place(file, tensors, [Part(module, tensors, "", by_name(module), settings)])


def peft_settings(folder: str | Path) -> dict:
    """What an `adapter_config.json` says. Raises WeightsError where it is missing, damaged, or not of a LoRA."""
    about = Path(folder) / "adapter_config.json"
    if not about.is_file():
        raise weights.WeightsNotFound(f"{about} is missing: an adapter's folder holds it beside its tensors")
    settings = parse(about.read_text(encoding="utf-8", errors="replace"), str(about))
    if settings.get("peft_type") != "LORA":
        raise WeightsError(f"{about}: not a LoRA but {settings.get('peft_type')}")
    return settings


def load_diffusers(path: str | Path, modules: Mapping[str, nn.Module]) -> list[nn.Parameter]:
    """Give networks the adapters of a diffusers file, in any of its spellings since 2023.

    path      the file, or a folder with `pytorch_lora_weights.safetensors`
    modules   the parts by their names in the file: {"unet": ..., "text_encoder": ...}. With one part the name need not
              agree: Med-Art's `text_lora/` holds a T5 adapter under "unet.", the oldest files have no part at all

    alpha is that of the header ("lora_adapter_metadata") or of `.alpha` keys; where there is neither, each layer's
    rank, as diffusers reads it. A part the file does not mention stays bare; a part that is not in `modules` is an
    error. Returns and raises as `load_peft`.
    """
    file = diffusers_file(path)
    tensors = weights.read(file)
    with safe_open(file, framework="pt") as opened:
        metadata = parse((opened.metadata() or {}).get("lora_adapter_metadata", "{}"), f"{file}: its metadata")
    parts = []
    for name, module in modules.items():
        prefixes = [f"{name}."] if len(modules) > 1 else [f"{name}.", "unet.", "transformer.", "prior.", ""]
        for prefix in prefixes:
            mine = {key: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            if mine:
                settings = {k[len(prefix) :]: v for k, v in metadata.items() if prefix and k.startswith(prefix)}
                parts.append(Part(module, mine, prefix, by_name(module), settings))
                break
    return place(file, tensors, parts)


def by_name(module: nn.Module) -> Callable[[str], str | None]:
    """Paths with dots: as they are, or in a spelling of 2023."""
    layers = adaptable(module)

    def locate(path: str) -> str | None:
        path = path.removeprefix("base_model.model.").replace(".processor.", ".")
        head, _, last = path.rpartition(".")
        spellings = [path, f"{path}.0"] + ([f"{head}.{_OLD_NAMES[last]}"] if last in _OLD_NAMES else [])
        spellings += [f"text_model.{spelling}" for spelling in spellings]
        spellings += [spelling.removeprefix("text_model.") for spelling in spellings]
        return next((spelling for spelling in spellings if spelling in layers), None)

    return locate


# Tencent's own Hunyuan-DiT projects to queries, keys and values at once; diffusers' layers in its order.
_FUSED = {"Wqkv": ("to_q", "to_k", "to_v"), "kv_proj": ("to_k", "to_v"), "q_proj": ("to_q",), "out_proj": ("to_out.0",)}


def unfused(module: nn.Module, tensors: dict[str, Tensor], file: str | Path) -> dict[str, Tensor]:
    """The adapter of a fused layer as adapters of the layers that `module` has in its place: the common A, and of B and
    the magnitude each its rows. What names a layer that is there stays as it is."""
    layers, locate, split = adaptable(module), by_name(module), {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        head, _, last = match["path"].rpartition(".") if match else ("", "", "")
        names = [f"{head}.{name}" for name in _FUSED.get(last, ())]
        if not names or locate(match["path"]) or not all(locate(name) in layers for name in names):
            split[key] = tensor
            continue
        whole = match["A"] or match["alpha"]
        if not whole and (tensor.dim() == 0 or len(tensor) % len(names)):
            raise WeightsError(f"{file}: {key} is {tuple(tensor.shape)}, which is not {len(names)} layers of one size")
        parts = [tensor] * len(names) if whole else tensor.chunk(len(names))
        split |= {name + key[len(match["path"]) :]: part for name, part in zip(names, parts)}
    return split


def by_underscores(module: nn.Module, path: str | Path) -> Callable[[str], str | None]:
    """Paths whose dots have become underscores, which only the layers at hand can undo."""
    names: dict[str, set[str]] = defaultdict(set)
    layers = adaptable(module)
    others = _stability_names(layers)
    for name in layers:
        for spelling in (name, f"text_model.{name}", name.removeprefix("text_model."), others.get(name, name)):
            names[spelling.replace(".", "_")].add(name)

    def locate(key: str) -> str | None:
        found = names.get(key, ())
        if len(found) > 1:
            raise WeightsError(f"{path}: {key} may be {' or '.join(sorted(found))}")
        return next(iter(found), None)

    return locate


# Layers of a U-Net in diffusers' names and in Stability's (and OpenAI's guided-diffusion before them).
_IN_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
              "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
_AT_ENDS = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
            "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
            "conv_in": "input_blocks.0.0", "conv_out": "out.2"}  # fmt: skip
_LEVEL = re.compile(
    r"(down_blocks|mid_block|up_blocks)(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)"
)


def _stability_names(layers: Collection[str]) -> dict[str, str]:
    """What the layers of a U-Net are called in Stability's code, which counts blocks through all levels: a residual
    block, its transformer and an upsampler share a number, conv_in and each downsampler have one of their own. How
    many there are, the names tell."""
    parts: dict[tuple[str, int], dict[str, int]] = defaultdict(Counter)  # (side, level) -> kind -> how many
    for name in layers:
        if match := _LEVEL.match(name):
            side, level, kind, place = match.groups(default="0")
            counts = parts[side, int(level)]
            counts[kind] = max(counts[kind], int(place) + 1)

    def renamed(side: str, level: int, kind: str, place: int, rest: str) -> str:
        before = [counts for (where, i), counts in parts.items() if where == side and i < level]
        done, here = sum(counts["resnets"] for counts in before), parts[side, level]
        inside = _IN_RESNET.get(rest, rest) if kind == "resnets" else rest
        if side == "mid_block":
            return f"middle_block.{2 * place if kind == 'resnets' else 1}.{inside}"
        if kind == "downsamplers":
            return f"input_blocks.{1 + done + len(before) + here['resnets']}.0.op"
        if kind == "upsamplers":
            return f"output_blocks.{done + here['resnets'] - 1}.{2 if here['attentions'] else 1}.{rest}"
        column = int(kind == "attentions")
        if side == "down_blocks":
            return f"input_blocks.{1 + done + len(before) + place}.{column}.{inside}"
        return f"output_blocks.{done + place}.{column}.{inside}"

    found = {name: _AT_ENDS[name] for name in layers if name in _AT_ENDS}
    for name in layers:
        if match := _LEVEL.match(name):
            side, level, kind, place = match.groups(default="0")
            found[name] = renamed(side, int(level), kind, int(place), name[match.end() + 1 :])
    return found


def place(file: str | Path, tensors: dict[str, Tensor], parts: Sequence[Part]) -> list[nn.Parameter]:
    """Attach what a file holds to the layers it names. Everything is judged before anything is changed."""
    plans, unknown = [], list(tensors.keys() - {key for part in parts for key in part.tensors})
    for part in parts:
        expect_bare(part.module)
        found: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for key, tensor in part.tensors.items():
            match = KEY.fullmatch(key, len(part.prefix))
            name = part.locate(match["path"]) if match else None
            if name is None:
                unknown.append(key)
                continue
            slot = next(slot for slot in SPELLINGS if match[slot])
            if slot in found[name]:
                raise WeightsError(f"{file}: {name} has two tensors {slot}, one of them {key}")
            found[name][slot] = tensor
        plans.append((part, found))
    if unknown:
        names = ", ".join(sorted(unknown)[:6]) + (", ..." if len(unknown) > 6 else "")
        networks = " and ".join(dict.fromkeys(type(part.module).__name__ for part in parts)) or "what was given"
        raise WeightsError(f"{file}: {len(unknown)} keys ({names}) have no place in {networks}; nothing was loaded")
    for _, found in plans:
        if len({"magnitude" in slots or "dora_scale" in slots for slots in found.values()}) > 1:
            raise WeightsError(f"{file}: DoRA in some layers of a network and not in others")
    ready = []
    for part, found in plans:
        for name, slots in found.items():
            layer = part.module.get_submodule(name)
            ready.append((layer, _adapter(f"{file}: {name}", name, layer, slots, part.settings)))
    for part, _ in plans:
        part.module.requires_grad_(False)
    for layer, adapter in ready:
        attach(layer, *adapter)
    return [param for part, _ in plans for param in trained(part.module)]


def _adapter(where: str, name: str, layer: nn.Module, slots: dict[str, Tensor], settings: dict) -> tuple:
    """Judge the tensors of one layer; what `attach` takes."""
    expect_adaptable(where, layer)
    weight = layer.get_parameter("weight")
    if not {"A", "B"} <= slots.keys():
        raise WeightsError(f"{where} has {' and '.join(sorted(slots))}, but an adapter is A and B at least")
    a, b = slots["A"], slots["B"]
    rank = a.shape[0] if a.dim() else 0
    shape_a, shape_b = (rank, *weight.shape[1:]), (weight.shape[0], rank, *[1] * (weight.dim() - 2))
    for factor, tensor, shape in (("A", a, shape_a), ("B", b, shape_b)):
        # 1x1 convolutions and linear layers are the same, and files of one are read into the other
        if rank < 1 or _squeezed(tensor.shape) != _squeezed(shape) or not tensor.is_floating_point():
            raise WeightsError(f"{where}: {factor} is {tensor.dtype} {tuple(tensor.shape)}, the layer asks for {shape}")
    magnitude = slots.get("magnitude", slots.get("dora_scale"))
    if magnitude is not None:
        by_input = "dora_scale" in slots and magnitude.dim() > 1 and magnitude.shape[0] != weight.shape[0]
        if magnitude.numel() != weight.shape[0] or by_input:
            raise WeightsError(f"{where}: the DoRA magnitude is {tuple(magnitude.shape)}, not one per output channel")
    if bool(settings.get("use_dora", magnitude is not None)) != (magnitude is not None):
        raise WeightsError(f"{where}: DoRA magnitudes and the setting use_dora contradict each other")
    if foreign := [key for key in _FOREIGN if settings.get(key)]:
        raise WeightsError(f"{where}: made with {', '.join(foreign)}, which is not LoRA as it is known here")
    alpha = alpha_of(where, name, rank, slots.get("alpha"), settings)

    def own(tensor: Tensor, shape: Sequence[int]) -> Tensor:  # never a view of the mapped file, which may be replaced
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return tensor.reshape(shape).to(device=weight.device, dtype=dtype, copy=True)

    magnitude = None if magnitude is None else own(magnitude, (-1,))
    return own(a, shape_a), own(b, shape_b), magnitude, alpha, bool(settings.get("use_rslora"))


def alpha_of(where: str, name: str, rank: int, given: Tensor | None, settings: dict) -> float:
    """A layer's alpha by its own tensor or the settings, which must agree with the rank; by neither, the rank."""
    try:
        said = by_pattern(settings.get("rank_pattern"), name, settings["r"]) if settings else rank
        alpha = by_pattern(settings.get("alpha_pattern"), name, settings["lora_alpha"]) if settings else rank
        alpha = float(alpha if given is None else given)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, re.error) as error:
        raise WeightsError(f"{where}: rank and alpha are not said ({type(error).__name__}: {error})") from error
    if said != rank or not math.isfinite(alpha):
        raise WeightsError(f"{where}: rank {rank}, but its settings say rank {said} and alpha {alpha:g}")
    return alpha


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape of at least two sizes without the kernel's, where that is 1x1."""
    return tuple(shape[:2]) if len(shape) == 4 and tuple(shape[2:]) == (1, 1) else tuple(shape)


def parse(text: str, where: str) -> dict:
    """A JSON object; WeightsError with `where` for what is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{where} is not a table of settings")
    return value
