"""Judging the header of a safetensors file before a tensor of it is read."""

import json
import math
import re
import struct
from pathlib import Path
from typing import NamedTuple


class WeightsError(ValueError):
    """A weights file or folder that is missing, damaged, or not what a module needs. One line."""


class WeightsNotFound(WeightsError, FileNotFoundError):
    """Nowhere to be found; says where it was looked for and how to download it."""


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
    # a header of 640, 896, 1152 or 1408 bytes begins as a pickle does, but with zeros and a brace behind it
    if start.startswith(b"PK\x03\x04") or re.match(rb"\x80[\x02-\x05](?!\x00{6}\{)", start):
        return "is a zip or pickle such as torch.save writes (.bin, .pt, .pth), not safetensors"
    if start.startswith(b"\x1f\x8b"):
        return "is gzip-compressed: unpack it first"
    return None


def _judge(raw: bytes, body: int) -> dict[str, Entry]:
    """The tensors that a header names, or ValueError. `body` is the number of bytes behind it."""
    if not raw.startswith(b"{"):
        raise ValueError("its header does not begin with '{': damaged, or not safetensors")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=no_repeats, parse_constant=_no_constant)
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


def no_repeats(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object for `object_pairs_hook`; ValueError for a name that stands twice in it."""
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)[:80]!r} stands twice in it")
    return table


def _no_constant(text: str) -> None:
    raise ValueError(f"its header holds {text}")


def _whole(value: object) -> bool:
    return type(value) is int and value >= 0
