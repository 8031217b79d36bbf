"""The files of T5's tokenizer: `spiece.model`, sentencepiece's protobuf message read and written by hand, and what
lies beside it.

It holds the pieces with their log-probabilities, and the table of characters by which text is normalised. The numbers
of the fields are those of sentencepiece_model.proto (Kudo and Richardson 2018, github.com/google/sentencepiece).
"""

import base64
import json
import math
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from nanomed.weights import WeightsError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of pieces
T = TypeVar("T")
Piece = tuple[str, float, int]  # text, log-probability, kind


def parse(content: bytes) -> tuple[list[Piece], dict, dict]:
    """The pieces, how they were trained, and how text is normalised (sentencepiece_model.proto). ValueError, ..."""
    pieces, said = [], {2: b"", 3: b""}
    for number, value in _fields(content):
        if number == 1:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece.get(2, bytes(4)))[0]
            pieces.append((piece.get(1, b"").decode(), score, piece.get(3, NORMAL)))
        elif number in said:
            said[number] += value
    trained, normal = dict(_fields(said[2])), dict(_fields(said[3]))
    kinds, texts = Counter(kind for _, _, kind in pieces), Counter(text for text, _, _ in pieces)
    if not kinds[NORMAL] or kinds[UNKNOWN] != 1:
        raise ValueError(f"{len(pieces)} pieces, {kinds[UNKNOWN]} of them for what is unknown; there is to be one")
    for i, (text, score, kind) in enumerate(pieces):
        if not text or texts[text] > 1 or not math.isfinite(score) or kind not in range(NORMAL, BYTE + 1):
            raise ValueError(f"piece {i} is {text[:20]!r}, {texts[text]} times, with score {score}, kind {kind}")
    if trained.get(3, 1) != 1 or trained.get(24) or not normal.get(5, 1):
        raise ValueError(
            f"a model of type {trained.get(3, 1)}, or one that marks ends of words or leaves spaces; not T5's"
        )
    return pieces, trained, normal


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message: whole numbers for varints, bytes for everything else."""
    i = 0
    while i < len(message):
        key, i = _varint(message, i)
        size = 8 if key & 7 == 1 else 4
        if key & 7 in (0, 2):
            size, i = _varint(message, i)
        elif key & 7 not in (1, 5):
            raise ValueError(f"wire type {key & 7} at byte {i}")
        end = i + size if key & 7 else i
        if end > len(message):
            raise ValueError(f"it ends inside field {key >> 3}")
        yield key >> 3, message[i:end] if key & 7 else size
        i = end


def _varint(message: bytes, i: int) -> tuple[int, int]:
    """A number of 7 bits a byte from byte i on, the lowest first, and where it ends."""
    if not (found := re.compile(rb"[\x80-\xff]{0,9}[\x00-\x7f]").match(message, i)):
        raise ValueError(f"byte {i}: it ends inside a number, or one has more than 64 bits")
    return sum((byte & 127) << 7 * k for k, byte in enumerate(found[0])), found.end()


def from_json(content: bytes) -> bytes:
    """A `spiece.model` from a `tokenizer.json` with a Unigram model; ValueError, KeyError, ... for something else."""
    said = json.loads(content)
    model, normalizer = said["model"], said.get("normalizer") or {}
    if model.get("type", "Unigram") != "Unigram":
        raise ValueError(f"a {model['type']} model; T5's are Unigram")
    kinds = {token["id"]: CONTROL for token in said.get("added_tokens", [])} | {model["unk_id"]: UNKNOWN}
    pieces = [(text, score, kinds.get(i, NORMAL)) for i, (text, score) in enumerate(model["vocab"])]
    maps = [part.get("precompiled_charsmap") or "" for part in normalizer.get("normalizers", [normalizer])]
    return write(pieces, base64.b64decode("".join(maps)))


def write(pieces: Iterable[Piece], charsmap: bytes = b"") -> bytes:
    """A small `spiece.model`; what it leaves out has sentencepiece's defaults, which are T5's."""

    def field(number: int, value: bytes) -> bytes:  # its size in 5 bytes, be it large or small
        return bytes([number << 3 | 2, *(len(value) >> 7 * k & 127 | 128 for k in range(4)), len(value) >> 28]) + value

    said = (field(1, text.encode()) + struct.pack("<BfBB", 0x15, score, 0x18, kind) for text, score, kind in pieces)
    return b"".join(field(1, piece) for piece in said) + field(3, field(2, charsmap))


def read(path: Path, parse: Callable[[bytes], T]) -> T:
    """What `parse` makes of a file; WeightsError, naming the file, where it is damaged."""
    try:
        return parse(path.read_bytes())
    except Exception as error:  # numbers, text, JSON, keys, types: whatever a damaged file leads to
        reason = str(error).partition("\n")[0][:200]
        raise WeightsError(f"{path}: not of a T5 tokenizer, or damaged ({type(error).__name__}: {reason})") from error


def extra(content: bytes) -> dict[str, int] | int | None:
    """What a tokenizer_config.json says about special tokens behind the pieces."""
    config = json.loads(content)
    count = config.get("extra_ids")
    if count is not None and (type(count) is not int or not 0 <= count <= 10_000):
        raise ValueError(f"extra_ids {count!r}")
    return {token["content"]: int(i) for i, token in config.get("added_tokens_decoder", {}).items()} or count
