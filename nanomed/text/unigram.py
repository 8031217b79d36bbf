"""T5's tokenizer, from `spiece.model` alone: sentencepiece's Unigram model (Kudo 2018) read and run by hand.

A sentencepiece model is a protobuf message with the pieces, their log-probabilities, and the text normalisation as a
trie. A text is normalised, and then cut into the pieces whose probabilities have the largest product.

The `tokenizers` library has both steps too, but neither is the one that T5 was trained with. Its normaliser takes
grapheme by grapheme where sentencepiece takes the longest entry of the trie, which differs for combining characters.
Its search adds in float64 what sentencepiece adds in float32: where two ways to cut a text are equally probable, as
in "xxxxxxx", the rounding decides. Both steps here give the ids of sentencepiece to the last one.
"""

import base64
import json
import math
import re
import struct
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from nanomed.run import files
from nanomed.weights import WeightsError, WeightsNotFound

PAD, END, UNK, SPACE = "<pad>", "</s>", "<unk>", "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of pieces
T = TypeVar("T")
UNIGRAM = 1  # among the kinds of models
UNKNOWN_PENALTY = 10.0  # a character without a piece costs this much more than the least probable piece


class Piece(NamedTuple):
    text: str
    score: float  # log-probability
    kind: int = NORMAL


# ------------------------------------------------------------------------------------------------------------ the file


@dataclass(frozen=True)
class Spiece:
    """What a `spiece.model` says."""

    pieces: tuple[Piece, ...]
    charsmap: bytes = b""  # the normalisation: size of a trie, the trie, the strings that its values point at
    dummy_prefix: bool = True  # a text begins with a space
    collapse: bool = True  # spaces: none at both ends, one in between
    escape: bool = True  # a space is spelled U+2581
    byte_fallback: bool = False  # characters without a piece are spelled in bytes

    @classmethod
    def parse(cls, message: bytes) -> "Spiece":
        """From the bytes of the file (sentencepiece_model.proto). Raises ValueError with the reason."""
        pieces, said = [], {}
        for number, value in _fields(message):
            if number == 1:
                piece = dict(_fields(_message(value)))
                score = struct.unpack("<f", _message(piece.get(2, bytes(4))))[0]
                pieces.append(Piece(_message(piece.get(1, b"")).decode(), score, piece.get(3, NORMAL)))
            elif number in (2, 3):  # how it was trained, how it normalises
                said[number] = dict(_fields(_message(value)))
        trained, normal = said.get(2, {}), said.get(3, {})
        if trained.get(3, UNIGRAM) != UNIGRAM:
            raise ValueError(f"a sentencepiece model of type {trained[3]}; T5's are Unigram, type {UNIGRAM}")
        if trained.get(24):
            raise ValueError("it marks the ends of words; T5's models mark their beginnings")
        flags = [bool(normal.get(number, True)) for number in (3, 4, 5)]
        return cls(tuple(pieces), _message(normal.get(2, b"")), *flags, bool(trained.get(35)))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Spiece":
        """From a `tokenizer.json` with a Unigram model. Raises ValueError, KeyError, ... where it is something else."""
        content = json.loads(text)
        model = content["model"]
        if model.get("type", "Unigram") != "Unigram":
            raise ValueError(f"a {model['type']} model; T5's are Unigram")
        kinds = {token["id"]: CONTROL for token in content.get("added_tokens", [])} | {model["unk_id"]: UNKNOWN}
        pieces = tuple(
            Piece(text, _single(score), kinds.get(i, NORMAL)) for i, (text, score) in enumerate(model["vocab"])
        )
        normalizer = content.get("normalizer") or {}
        maps = [
            n["precompiled_charsmap"]
            for n in normalizer.get("normalizers", [normalizer])
            if "precompiled_charsmap" in n
        ]
        return cls(pieces, base64.b64decode(maps[0] or "") if maps else b"")

    def encode(self) -> bytes:
        """The bytes of a `spiece.model`."""
        message = bytearray()
        for piece in self.pieces:
            score = b"\x15" + struct.pack("<f", piece.score)  # field 2, 4 bytes
            message += _field(1, _field(1, piece.text.encode()) + score + _field(3, piece.kind))
        ids = {piece.text: i for i, piece in enumerate(self.pieces) if piece.kind in (CONTROL, UNKNOWN)}
        special = [(40, UNK), (41, "<s>"), (42, END), (43, PAD)]  # -1: the model has none
        trained = _field(3, UNIGRAM) + _field(35, int(self.byte_fallback))
        trained += b"".join(_field(number, ids.get(text, -1)) for number, text in special)
        flags = [(3, self.dummy_prefix), (4, self.collapse), (5, self.escape)]
        normal = _field(2, self.charsmap) + b"".join(_field(number, int(flag)) for number, flag in flags)
        return bytes(message) + _field(2, trained) + _field(3, normal)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message: whole numbers for varints, bytes for everything else."""
    i = 0
    while i < len(message):
        key, i = _varint(message, i)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, i = _varint(message, i)
        else:
            if wire == 2:
                size, i = _varint(message, i)
            elif wire in (1, 5):
                size = 8 if wire == 1 else 4
            else:
                raise ValueError(f"wire type {wire} at byte {i}")
            value, i = message[i : i + size], i + size
            if i > len(message):
                raise ValueError(f"it ends inside field {number}")
        yield number, value


def _varint(message: bytes, i: int) -> tuple[int, int]:
    """A number of 7 bits a byte from byte i on, and where it ends."""
    value = 0
    for shift in range(0, 64, 7):
        if i == len(message):
            raise ValueError("it ends inside a number")
        value |= (message[i] & 127) << shift
        i += 1
        if message[i - 1] < 128:
            return value, i
    raise ValueError(f"a number of more than 64 bits before byte {i}")


def _message(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where text or a table belongs")
    return value


def _field(number: int, value: int | bytes) -> bytes:
    """One field of a protobuf message, the inverse of `_fields`."""
    if isinstance(value, int):
        return _spelled(number << 3) + _spelled(value)
    return _spelled(number << 3 | 2) + _spelled(len(value)) + value


def _spelled(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers as their two's complement
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _single(value: float) -> float:
    """Rounded to float32."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


# ------------------------------------------------------------------------------------------------------ the algorithm


class Normalizer:
    """Text as the pieces spell it: characters mapped by the trie, spaces collapsed and made visible."""

    def __init__(self, model: Spiece):
        self.model = model
        self.units: tuple[int, ...] = ()  # a double-array trie over the bytes of UTF-8 (Darts)
        self.strings = b""  # what its values point at, each ending with a zero byte
        if model.charsmap:
            size = int.from_bytes(model.charsmap[:4], "little")
            if not 4 <= size <= len(model.charsmap) - 4 or size % 4:
                raise ValueError(f"a normalisation of {len(model.charsmap)} bytes with a trie of {size}")
            self.units = struct.unpack(f"<{size // 4}I", model.charsmap[4 : 4 + size])
            self.strings = model.charsmap[4 + size :]
        kept = sorted((p.text for p in model.pieces if p.kind == USER_DEFINED), key=len, reverse=True)
        self.kept = re.compile("|".join(map(re.escape, kept)).encode()) if kept else None

    def __call__(self, text: str) -> str:
        if not text:
            return ""
        if self.units or self.kept:
            text = self._mapped(text.encode()).decode(errors="replace")
        if self.model.collapse:
            text = re.sub(" {2,}", " ", text).lstrip(" ")
        space = SPACE if self.model.escape else " "
        text = (space if self.model.dummy_prefix else "") + text.replace(" ", space)
        return text.rstrip(space) if self.model.collapse else text  # U+2581 of the text itself, too, is lost at its end

    def _mapped(self, data: bytes) -> bytes:
        out = bytearray()
        i = 0
        while i < len(data):
            if self.kept and (match := self.kept.match(data, i)):
                out += match.group()
                i = match.end()
                continue
            size, new = self._longest(data, i)
            out += new if size else data[i : i + (size := _character(data[i]))]
            i += size
        return bytes(out)

    def _longest(self, data: bytes, start: int) -> tuple[int, bytes]:
        """The longest entry that data[start:] begins with: its length, and what stands for it. (0, b"") for none.

        A unit holds the byte that leads to it (bits 0-7, with bit 31 off), whether a value stands there (bit 8), and
        how far its children are (bits 10-30, in steps of 256 if bit 9 is on). The value is in the child of byte 0.
        """
        units, size, value, place = self.units, 0, 0, 0
        for i in range(start - 1, len(data)):
            if i >= start:
                place ^= data[i]
                if place >= len(units) or units[place] & 0x800000FF != data[i]:
                    break
            unit = units[place]
            place ^= (unit >> 10) << ((unit & 0x200) >> 6)
            if i >= start and unit & 0x100 and place < len(units):
                size, value = i + 1 - start, units[place] & 0x7FFFFFFF
        return size, self.strings[value : self.strings.find(b"\0", value)] if size else b""


def _character(lead: int) -> int:
    """Bytes of the character in UTF-8 that begins with byte `lead`."""
    return 1 if lead < 0xC0 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4


class Unigram:
    """`unigram(text)` gives the ids of the most probable pieces; as sentencepiece, bit for bit."""

    def __init__(self, model: Spiece):
        normal = [piece.score for piece in model.pieces if piece.kind == NORMAL]
        unknown = [i for i, piece in enumerate(model.pieces) if piece.kind == UNKNOWN]
        if not normal or len(unknown) != 1:
            raise ValueError(f"{len(normal)} pieces, {len(unknown)} of them for what is unknown; there is to be one")
        self.model, self.normalize, self.unknown = model, Normalizer(model), unknown[0]
        self.scores = [piece.score for piece in model.pieces]
        self.unknown_score = _single(min(normal) - UNKNOWN_PENALTY)
        self.prefixes: dict[str, int] = {}  # beginnings of pieces: the id of a whole piece, else -1
        seen: set[str] = set()
        for i, (text, score, kind) in enumerate(model.pieces):
            if not text or text in seen or not math.isfinite(score) or kind not in range(NORMAL, BYTE + 1):
                raise ValueError(f"piece {i} is {text[:20]!r}, for the second time or with score {score}, kind {kind}")
            seen.add(text)
            if kind == USER_DEFINED:
                self.scores[i] = -0.1  # above any probable path
            if kind in (NORMAL, USER_DEFINED):
                for end in range(1, len(text)):
                    self.prefixes.setdefault(text[:end], -1)
                self.prefixes[text] = i
        self.bytes: list[int] = []
        if model.byte_fallback:
            ids = {piece.text: i for i, piece in enumerate(model.pieces) if piece.kind == BYTE}
            self.bytes = [ids[f"<0x{byte:02X}>"] for byte in range(256)]

    def __call__(self, text: str) -> list[int]:
        """Viterbi search from left to right over the normalised text."""
        text = self.normalize(text)
        find, scores = self.prefixes.get, self.scores
        score = array("f", bytes(4 * len(text) + 4))  # of the best path to each place; float32, as in sentencepiece
        begin = [-1] * (len(text) + 1)  # of the last piece of that path
        last = [self.unknown] * (len(text) + 1)  # the id of that piece
        total = array("f", [0.0])  # an array of one: sums are rounded to float32 before they are compared
        for start in range(len(text)):
            single = False
            for end in range(start + 1, len(text) + 1):
                piece = find(text[start:end])
                if piece is None:
                    break
                if piece >= 0:
                    single = single or end == start + 1
                    total[0] = score[start] + scores[piece]
                    if begin[end] < 0 or total[0] > score[end]:
                        score[end], begin[end], last[end] = total[0], start, piece
            if not single:
                end = start + 1
                total[0] = score[start] + self.unknown_score
                if begin[end] < 0 or total[0] > score[end]:
                    score[end], begin[end], last[end] = total[0], start, self.unknown
        return self._spelled(text, begin, last)

    def _spelled(self, text: str, begin: list[int], last: list[int]) -> list[int]:
        """The path from right to left, turned around: neighbouring unknown characters as one, or each in bytes."""
        ids: list[int] = []
        end = len(text)
        while end:
            if last[end] != self.unknown:
                ids.append(last[end])
            elif self.bytes:
                ids += [self.bytes[byte] for byte in reversed(text[begin[end] : end].encode())]
            elif ids[-1:] != [self.unknown]:
                ids.append(self.unknown)
            end = begin[end]
        return ids[::-1]


# ------------------------------------------------------------------------------------------------------ the tokenizer


class T5Tokenizer:
    """prompts -> (ids int64 (B, L), mask bool (B, L)), true at real tokens.

    `</s>` stands behind a prompt; what does not fit is cut and `</s>` kept. `cut` counts the prompts of the last call
    that were. Padding is on the right.

    Where a prompt itself says `</s>`, `<pad>`, `<unk>` or `<extra_id_0>`, it becomes that token, and the text on
    either side is tokenized by itself. This is what the published systems do (Hugging Face's tokenizers, slow and
    fast); sentencepiece alone takes such a word for letters and signs.

    extra   special tokens that the model lacks: a table with their ids, or how many `<extra_id_n>` follow its pieces,
            the last one first; None for T5's 100, or 0 where the pieces include them (mT5)
    """

    def __init__(self, model: Spiece, extra: dict[str, int] | int | None = None):
        self.unigram = Unigram(model)
        ids = {piece.text: i for i, piece in enumerate(model.pieces)}
        if END not in ids:
            raise ValueError(f"there is no {END} among its pieces")
        if extra is None:
            extra = 0 if any("<extra_id_" in text for text in ids) else 100
        if isinstance(extra, int):
            extra = {f"<extra_id_{extra - 1 - i}>": len(ids) + i for i in range(extra)}
        self.extra = {text: i for text, i in extra.items() if text not in ids}
        if odd := [text for text, i in self.extra.items() if not text or type(i) is not int or not 0 <= i < 1 << 31]:
            raise ValueError(f"the special token {odd[0]!r} has the id {extra[odd[0]]!r}")
        outside = {piece.text: ids[piece.text] for piece in model.pieces if piece.kind in (CONTROL, UNKNOWN)}
        self.special = {text: i for text, i in outside.items() if text in (PAD, END, UNK) or "<extra_id_" in text}
        self.special |= self.extra
        self.end_id, self.pad_id, self.cut = ids[END], ids.get(PAD, 0), 0
        names = sorted(self.special, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, names))})")

    @classmethod
    def from_folder(cls, folder: str | Path) -> "T5Tokenizer":
        """From `spiece.model`, else `tokenizer.json`; special tokens from added_tokens.json and tokenizer_config.json.

        Raises WeightsNotFound where neither is there and WeightsError, naming the file, where one is damaged.
        """
        folder = Path(folder)
        extra: dict[str, int] | int | None = None
        if (path := folder / "tokenizer_config.json").is_file():
            extra = _read(path, _extra)
        if (path := folder / "added_tokens.json").is_file():
            extra = _read(path, lambda content: dict(json.loads(content))) or extra
        if (path := folder / "spiece.model").is_file():
            return _read(path, lambda content: cls(Spiece.parse(content), extra))
        if (path := folder / "tokenizer.json").is_file():
            return _read(path, lambda content: cls(Spiece.from_json(content), extra))
        raise WeightsNotFound(f"{folder}: neither spiece.model nor tokenizer.json is there")

    def __len__(self) -> int:
        """Rows that an embedding needs at least; the published ones have more (32,128 for 32,100)."""
        return max(len(self.unigram.model.pieces), *(i + 1 for i in self.special.values()))

    def __call__(self, prompts: list[str], length: int = 120) -> tuple[Tensor, Tensor]:
        """Tokenize, cut or pad to `length`. Each distinct prompt is tokenized once."""
        if length < 1:
            raise ValueError(f"length {length}: {END} alone is 1")
        found = self._encode(prompts)
        ids = torch.full((len(prompts), length), self.pad_id)
        mask = torch.zeros(len(prompts), length, dtype=torch.bool)
        self.cut = 0
        for i, prompt in enumerate(prompts):
            tokens = found[prompt]
            self.cut += len(tokens) > length - 1
            tokens = [*tokens[: length - 1], self.end_id]
            ids[i, : len(tokens)] = torch.tensor(tokens)
            mask[i, : len(tokens)] = True
        return ids, mask

    def lengths(self, prompts: list[str]) -> list[int]:
        """The tokens that each prompt needs, the end included."""
        found = self._encode(prompts)
        return [len(found[prompt]) + 1 for prompt in prompts]

    def _encode(self, prompts: list[str]) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for prompt in prompts:
            if prompt in found:
                continue
            try:
                prompt.encode()
            except (AttributeError, UnicodeEncodeError) as error:  # not a string at all, or lone surrogates
                raise ValueError(f"a prompt is not text: {prompt!r}") from error
            ids = found[prompt] = []
            for i, part in enumerate(self._special.split(prompt)):  # text, special, text, special, ..., text
                ids += [self.special[part]] if i % 2 else self.unigram(part)
        return found

    def save(self, folder: str | Path) -> None:
        """Write spiece.model, added_tokens.json and tokenizer_config.json."""
        folder = Path(folder)
        with files.atomic(folder / "spiece.model") as temporary:
            temporary.write_bytes(self.unigram.model.encode())
        files.write_json(folder / "added_tokens.json", self.extra)
        names = {"eos_token": END, "unk_token": UNK, "pad_token": PAD}
        extra = [text for text in self.special if text.startswith("<extra_id_")]
        config = {
            "tokenizer_class": "T5Tokenizer",
            **names,
            "extra_ids": len(extra),
            "additional_special_tokens": extra,
        }
        files.write_json(folder / "tokenizer_config.json", config)


def _read(path: Path, parse: Callable[[bytes], T]) -> T:
    try:
        return parse(path.read_bytes())
    except Exception as error:  # numbers, text, JSON, keys, types: whatever a damaged file leads to
        reason = str(error).partition("\n")[0][:200]
        raise WeightsError(f"{path}: not of a T5 tokenizer, or damaged ({type(error).__name__}: {reason})") from error


def _extra(content: bytes) -> dict[str, int] | int | None:
    """What a tokenizer_config.json says about special tokens behind the pieces."""
    config = json.loads(content)
    if table := {token["content"]: int(i) for i, token in config.get("added_tokens_decoder", {}).items()}:
        return table
    count = config.get("extra_ids")
    if count is not None and (type(count) is not int or not 0 <= count <= 10_000):
        raise ValueError(f"extra_ids {count!r}")
    return count


def train_unigram(texts: Iterable[str], pieces: int) -> T5Tokenizer:
    """A small T5-style vocabulary from texts, for models that train from scratch.

    All characters and the most frequent words, each with the logarithm of its share; words that are left out are
    spelled. No normalisation but that of spaces. The same texts give the same vocabulary.
    """
    normalize = Normalizer(Spiece(()))
    words: Counter[str] = Counter()
    for text in texts:
        words.update(re.findall(f"{SPACE}[^{SPACE}]*", normalize(text)))
    letters: Counter[str] = Counter()
    for word, count in words.items():
        for letter in word:
            letters[letter] += count
    total = letters.total() + words.total()
    kept = sorted(letters, key=lambda letter: (-letters[letter], letter))
    longer = sorted((word for word in words if len(word) > 1), key=lambda word: (-words[word], word))
    kept += longer[: max(pieces - len(kept) - 3, 0)]
    counts = words | letters
    special = [Piece(PAD, 0.0, CONTROL), Piece(END, 0.0, CONTROL), Piece(UNK, 0.0, UNKNOWN)]
    scored = [Piece(text, _single(math.log(counts[text] / total))) for text in kept]
    return T5Tokenizer(Spiece((*special, *scored)))
