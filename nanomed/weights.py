"""Published weights: where they are, whether the files are sound, and how they get into a module.

    folder = weights.find("openai/clip-vit-large-patch14")
    encoder = weights.build(ClipText, ClipTextConfig.from_json(folder))
    weights.load(encoder, weights.read(folder, "model", prefix="text_model."))

Modules carry the names of their published files, so there is no table of names between them: the module is built on
the meta device, the file is memory-mapped, and its tensors become the parameters. Nothing here uses the network.

    python -m nanomed.weights list      what there is to download, for which system, and what is here
    python -m nanomed.weights check     the headers of all files that are here, or of the paths given
    python -m nanomed.weights verify    their SHA-256 against what the download recorded
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nanomed import files

STEMS = ("diffusion_pytorch_model", "model")  # how diffusers and transformers name a part's file
TOLERATED = ("*position_ids", "*num_batches_tracked", "*inv_freq")  # tables that files hold or not, as it happened
CHUNK = 256 << 20  # bytes of a file that are mapped at a time while its tensors are converted
SHIPPED = Path(__file__).resolve().parents[1] / "weights"  # of the checkout
M = TypeVar("M", bound=nn.Module)
C = TypeVar("C")


class WeightsError(ValueError):
    """A weights file or folder that is missing, damaged, or not what a module needs. One line."""


class WeightsNotFound(WeightsError, FileNotFoundError):
    """Nowhere to be found; says where it was looked for and how to download it."""


# -------------------------------------------------------------------------------------------------------------- find


def find(name: str | Path, weights: str | Path | None = None) -> Path:
    """The folder (or file) of a repository: a path that exists, a folder of weights, or the Hugging Face cache.

    name      a path, or a repository such as "openai/clip-vit-large-patch14"
    weights   a folder that holds `org/name` or `name`; looked at before ./weights and the checkout's weights/

    Raises WeightsNotFound, a FileNotFoundError, with the places looked at and the command that downloads it.
    """
    if Path(name).exists():
        return Path(name)
    name = str(name)
    places = []
    for root in dict.fromkeys([*([Path(weights)] if weights else []), Path("weights"), SHIPPED]):
        places += [root / name, root / name.rsplit("/", 1)[-1]]
    for place in places:
        if place.exists():
            return place
    cached = hub_cache() / f"models--{name.replace('/', '--')}"
    if snapshot := _snapshot(cached):
        return snapshot
    looked = ", ".join(str(place) for place in dict.fromkeys([*places, cached]))
    download = next((entry.download for entry in catalogue() if entry.repo == name), None)
    if not download and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        download = f"hf download {name} --local-dir weights/{name}"
    raise WeightsNotFound(f"{name} was not found at {looked}" + (f"; get it with: {download}" if download else ""))


def hub_cache() -> Path:
    """Where `hf download` keeps repositories: $HF_HUB_CACHE, $HF_HOME/hub or ~/.cache/huggingface/hub."""
    if folder := os.environ.get("HF_HUB_CACHE"):
        return Path(folder)
    return Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface") / "hub"


def _snapshot(cached: Path) -> Path | None:
    """The snapshot that `main` names, else the newest one."""
    reference = cached / "refs" / "main"
    if reference.is_file():
        commit = reference.read_text(encoding="utf-8").strip()
        if re.fullmatch(r"[0-9a-f]{4,64}", commit) and (cached / "snapshots" / commit).is_dir():
            return cached / "snapshots" / commit
    if (cached / "snapshots").is_dir():
        return max(cached.joinpath("snapshots").iterdir(), key=lambda path: path.stat().st_mtime, default=None)
    return None


# -------------------------------------------------------------------------------------------------------------- read


def read(
    path: str | Path, stem: str | None = None, prefix: str = "", dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a folder that holds one file or shards; memory-mapped.

    stem     of the file in a folder: "diffusion_pytorch_model" or "model" (the default: whichever is there). The
             `.fp16.` variant is read where there is no plain file.
    prefix   only names that begin with it; names stay whole
    dtype    convert floating-point tensors, one by one: little more than the result is ever in memory

    Raises WeightsError for a file that is missing, damaged or not a safetensors file, and for a prefix that no name
    has. Writing to a tensor does not write to the file.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    for file, mapped in _files(path, stem).items():
        header = check_header(file)
        if mapped is not None and mapped != header.keys():
            problems = _some(mapped - header.keys(), "not in it though its index says so")
            problems += _some(header.keys() - mapped, "in it though its index does not say so")
            raise WeightsError(f"{file}: {problems.rstrip('; ')}")
        parts: dict[int, list[str]] = {}
        start = 0
        for name in (name for name in header if name.startswith(prefix)):
            parts.setdefault(start // CHUNK, []).append(name)
            start += math.prod(header[name].shape) * SIZES[header[name].dtype]
        for names in parts.values():  # a new mapping each time: the pages of what was converted are given back
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in names:
                        tensor = opened.get_tensor(name)
                        tensors[name] = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
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
        return {_kept_inside(path): None}
    stems = (stem,) if stem else STEMS
    for variant in ("", ".fp16"):  # every plain spelling before any half-precision one
        for name in stems:
            file = path / f"{name}{variant}.safetensors"
            if file.exists() or file.is_symlink():
                return {_kept_inside(file): None}
            index_names = (f"{name}.safetensors.index{variant}.json", f"{name}{variant}.safetensors.index.json")
            for index in dict.fromkeys(path / index_name for index_name in index_names):
                if index.is_file():
                    return _shards(index)
    pickles = sorted(p.name for p in path.glob("*") if p.suffix in (".bin", ".pth", ".pt", ".ckpt"))
    hint = f"; {pickles[0]} is a pickle, which is not read here" if pickles else ""
    raise WeightsNotFound(f"{path} has no {' or '.join(f'{s}.safetensors' for s in stems)}{hint}")


def _shards(index: Path) -> dict[Path, set[str] | None]:
    text = _kept_inside(index).read_text(encoding="utf-8", errors="replace")
    try:
        placed = list(json.loads(text, object_pairs_hook=_no_repeats)["weight_map"].items())
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
        _kept_inside(shard)
    return shards


def _kept_inside(path: Path) -> Path:
    """The path, unless it lies in the Hugging Face cache and is a link that leaves its repository's folder."""
    for parent in path.absolute().parents:
        if parent.name.startswith("models--") and not Path(os.path.realpath(path)).is_relative_to(parent.resolve()):
            raise WeightsError(f"{path} is a link that leaves {parent}")
    return path


# ------------------------------------------------------------------------------------------------------------ header

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
MAX_HEADER, MAX_TENSORS, MAX_DIMS, MAX_SIZE = 16 << 20, 20_000, 8, 2**31
_NAME = re.compile(r"[A-Za-z0-9_.\-/]{1,255}")


class Entry(NamedTuple):
    """What a header says about one tensor."""

    dtype: str
    shape: tuple[int, ...]


def check_header(path: str | Path) -> dict[str, Entry]:
    """Read and judge the header of a safetensors file without reading a tensor; {name: (dtype, shape)}.

    Stricter than the format: at most 16 MB and 20,000 tensors, names of letters, digits and `_.-/`, no name twice, at
    most 8 dimensions below 2^31, plain dtypes, and tensors that fill the file exactly. What is not a safetensors
    file at all is recognised by its first bytes. Raises WeightsError with the file and the cause.
    """
    path = Path(path)
    if path.is_dir():
        raise WeightsError(f"{path} is a folder, not a safetensors file")
    if not path.exists():
        raise WeightsNotFound(f"{path} is missing")
    if not path.is_file():
        raise WeightsError(f"{path} is not a regular file")
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(512)
        if foreign := _foreign(start):
            raise WeightsError(f"{path} {foreign}")
        if size < 10:
            raise WeightsError(f"{path} ends after {size} bytes: not a safetensors file")
        (length,) = struct.unpack("<Q", start[:8])
        if length > MAX_HEADER:
            raise WeightsError(f"{path}: a header of {length} bytes, above {MAX_HEADER}: damaged, or not safetensors")
        if 8 + length > size:
            raise WeightsError(f"{path} ends inside its header: the download is not complete")
        file.seek(8)
        raw = file.read(length)
    try:
        return _judge(raw, size - 8 - length)
    except RecursionError:
        raise WeightsError(f"{path}: its header is nested too deeply") from None
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from None


def _foreign(start: bytes) -> str | None:
    """What a file is that is not safetensors, by its first bytes."""
    if not start:
        return "is empty: the download did not begin"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself: run `git lfs pull`, or use `hf download`"
    if re.match(rb"\s*<(!doctype|html|head|\?xml)", start, re.IGNORECASE):
        return "is a web page, not weights: the download wants a login, or its address is wrong"
    if start.startswith(b"PK\x03\x04") or re.match(rb"\x80[\x02-\x05]", start):
        return "is a zip or pickle such as torch.save writes (.bin, .pt, .pth), not safetensors"
    if start.startswith(b"\x1f\x8b"):
        return "is gzip-compressed: unpack it first"
    return None


def _judge(raw: bytes, body: int) -> dict[str, Entry]:
    """The tensors that a header names, or ValueError. `body` is the number of bytes behind it."""
    if not raw.startswith(b"{"):
        raise ValueError("its header does not begin with '{': damaged, or not safetensors")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_repeats, parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise ValueError("its header is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"its header is not JSON ({error.msg} at byte {error.pos})") from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ is not a table of strings")
    if len(header) > MAX_TENSORS:
        raise ValueError(f"{len(header)} tensors, above {MAX_TENSORS}")
    spans = []
    for name, entry in header.items():
        if not _NAME.fullmatch(name):
            raise ValueError(f"a tensor is named {name[:80]!r}")
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{name} is not described by dtype, shape and data_offsets alone")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in SIZES:
            raise ValueError(f"{name} has the dtype {str(dtype)[:20]!r}; known are {', '.join(SIZES)}")
        if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_whole(n) and n < MAX_SIZE for n in shape):
            raise ValueError(f"{name} has the shape {str(shape)[:80]}")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_whole, offsets)):
            raise ValueError(f"{name} has the data_offsets {str(offsets)[:80]}")
        if offsets[1] - offsets[0] != math.prod(shape) * SIZES[dtype]:
            raise ValueError(f"{name} has {offsets[1] - offsets[0]} bytes for the shape {shape} of {dtype}")
        spans.append((*offsets, name))
        header[name] = Entry(dtype, tuple(shape))
    end = 0
    for first, last, name in sorted(spans):
        if first != end:
            raise ValueError(f"{name} begins at byte {first}, not where the tensor before it ends ({end})")
        end = last
    if end > body:
        raise ValueError(f"{body} bytes of tensors where the header names {end}: the download is not complete")
    if end < body:
        raise ValueError(f"{body - end} bytes behind the last tensor")
    return header


def _no_repeats(pairs: list[tuple[str, object]]) -> dict:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)[:80]!r} stands twice in it")
    return table


def _no_constant(text: str) -> None:
    raise ValueError(f"its header holds {text}")


def _whole(value: object) -> bool:
    return type(value) is int and value >= 0


# -------------------------------------------------------------------------------------------------------------- load


def build(make: Callable[..., M], *args, **kwargs) -> M:
    """`make(*args, **kwargs)` on the meta device: the names and shapes of a module, and no memory for its weights.

    A table that no file holds (sinusoids, masks, positions) must not be a buffer then, for `load` could not fill it:
    the modules here compute such tables where they use them.
    """
    with torch.device("meta"), _Unfilled():
        return make(*args, **kwargs)


class _Unfilled(TorchFunctionMode):
    """Leaves out normal draws: they fill nothing on the meta device, and the first imports as much as torch itself."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (Tensor.normal_, nn.init.normal_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def load(module: M, tensors: Mapping[str, Tensor], optional: Iterable[str] = ()) -> M:
    """Make `tensors` the weights of `module`, which may be on the meta device; returns the module.

    Names and shapes must agree exactly. `optional` (names or patterns with *) may be in the file without a place in
    the module; so may position_ids, num_batches_tracked and inv_freq, which may be absent too. The tensors are not
    copied and keep their dtype; whether a parameter trains is left as it was.

    Raises WeightsError that lists what is missing, not expected, or of another shape.
    """
    expected = module.state_dict()
    spared = (*TOLERATED, *optional)
    missing = [n for n in expected.keys() - tensors.keys() if not any(fnmatchcase(n, p) for p in TOLERATED)]
    unexpected = [n for n in tensors.keys() - expected.keys() if not any(fnmatchcase(n, p) for p in spared)]
    taken = {name: tensors[name] for name in expected if name in tensors}
    shapes = [f"{name} {tuple(tensor.shape)} for {tuple(expected[name].shape)}"
              for name, tensor in taken.items() if tensor.shape != expected[name].shape]  # fmt: skip
    if missing or unexpected or shapes:
        problems = _some(missing, "missing") + _some(unexpected, "not expected") + _some(shapes, "of another shape")
        raise WeightsError(f"these are not the weights of this {type(module).__name__}: {problems.rstrip('; ')}")
    for name in expected.keys() - tensors.keys():
        if name.endswith("num_batches_tracked"):
            taken[name] = torch.zeros((), dtype=torch.int64)
    module.load_state_dict(taken, strict=False, assign=True)
    if empty := [name for name, t in [*module.named_parameters(), *module.named_buffers()] if t.is_meta]:
        raise WeightsError(f"{type(module).__name__}: {_some(empty, 'still on the meta device').rstrip('; ')}")
    return module


def _some(names: Collection[str], what: str, most: int = 6) -> str:
    """`3 missing (a, b, c); `, or nothing for no names."""
    if not names:
        return ""
    names = sorted(names)
    return f"{len(names)} {what} ({', '.join(names[:most])}{', ...' if len(names) > most else ''}); "


def fingerprint(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of the weights, in the order of the names.

    The same on every device and whichever file they came from; any other bit is another fingerprint.
    """
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights

    def digest(item: tuple[str, Tensor]) -> str:
        name, tensor = item
        tensor = tensor.detach().cpu().contiguous()
        content = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy()).hexdigest()
        return f"{name} {tensor.dtype} {tuple(tensor.shape)} {content}\n"

    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter free
        return hashlib.sha256("".join(pool.map(digest, sorted(state.items()))).encode()).hexdigest()


# --------------------------------------------------------------------------------------------------------- catalogue


class Published(NamedTuple):
    """A repository or file that some system reads."""

    repo: str
    use: str
    licence: str
    gigabytes: float
    include: tuple[str, ...] = ()  # the files that are needed, where the repository holds more
    url: str = ""  # of a file that is not on Hugging Face

    @property
    def download(self) -> str:
        if self.url:
            return f"curl -L --create-dirs -o weights/{self.repo} {self.url}"
        include = "".join(f' --include "{pattern}"' for pattern in self.include)
        return f"hf download {self.repo}{include} --local-dir weights/{self.repo}"


def catalogue() -> list[Published]:
    """The table of weights/README.md; empty where nanomed runs without its checkout."""
    readme = SHIPPED / "README.md"
    rows = []
    for line in readme.read_text(encoding="utf-8").splitlines() if readme.is_file() else []:
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if line.startswith("|") and len(cells) == 5 and re.fullmatch(r"[0-9.]+", cells[3]):
            include = cells[4].strip("`").split() if cells[4].startswith("`") else ()
            url = cells[4].strip("<>") if cells[4].startswith("<") else ""
            rows.append(Published(*cells[:3], float(cells[3]), tuple(include), url))
    return rows


def digests(folder: Path) -> dict[Path, str | None]:
    """Every weights file below `folder` with the SHA-256 that the download recorded for it, where it did.

    `hf download` names the blobs of its cache by it, and writes it beside files of a --local-dir; the PyTorch files
    of torchvision and pytorch-fid carry its first 8 digits in their names.
    """
    found: dict[Path, str | None] = {}
    paths = [folder] if folder.is_file() else sorted(folder.rglob("*"))
    for path in paths:
        if path.suffix not in (".safetensors", ".bin", ".pth") or not path.is_file():
            continue
        candidates = [path.resolve().name]
        for parent in path.parents:
            record = parent / ".cache/huggingface/download" / f"{path.relative_to(parent)}.metadata"
            if record.is_file():  # commit, hash, time
                candidates += record.read_text(encoding="utf-8").splitlines()[1:2]
        if match := re.search(r"-([0-9a-f]{8})\.pth$", path.name):
            candidates.append(match.group(1))
        found[path] = next((c for c in candidates if re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{8}", c)), None)
    return found


def _main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m nanomed.weights", description="What, where, and whether whole.")
    parser.add_argument("verb", choices=("list", "check", "verify"))
    parser.add_argument("names", nargs="*", help="repositories or paths; default: all of the catalogue that is here")
    parser.add_argument("--weights", help="a folder of weights, besides weights/ and the Hugging Face cache")
    args = parser.parse_args(arguments)
    say = sys.stdout.write
    here: dict[str, Path] = {}
    for name in args.names or [item.repo for item in catalogue()]:
        try:
            here[name] = find(name, args.weights)
        except WeightsNotFound as error:
            if args.names:
                say(f"{error}\n")
                return 4
    if args.verb == "list":
        for item in catalogue():
            if not args.names or item.repo in args.names:
                place = here.get(item.repo)
                say(f"{item.repo}\n    {item.use}; {item.licence}; {item.gigabytes} GB\n")
                say(f"    here: {place}\n" if place else f"    {item.download}\n")
        return 0
    bad = 0
    for path, digest in {path: digest for folder in here.values() for path, digest in digests(folder).items()}.items():
        try:
            if args.verb == "verify":
                actual = files.sha256(path)
                if digest and not actual.startswith(digest):
                    raise WeightsError(f"{path}: SHA-256 {actual}, but {digest} was to be downloaded: fetch it again")
                say(f"{path}: {'as downloaded' if digest else 'nothing recorded to compare with'}, SHA-256 {actual}\n")
            elif path.suffix == ".safetensors":
                header = check_header(_kept_inside(path))
                count = sum(math.prod(tensor.shape) for tensor in header.values())
                say(f"{path}: sound, {len(header)} tensors, {count:,} values\n")
            else:
                say(f"{path}: a pickle, {len(read_pickle(path))} tensors\n")
        except WeightsError as error:
            bad += 1
            say(f"{error}\n")
    if not here:
        say("no published weights are here: `python -m nanomed.weights list` says what to download\n")
    return 4 if bad else 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
