"""T5's tokenizer: a `spiece.model` read by hand (spiece.py) and run by the `tokenizers` package (Unigram, Kudo 2018).

Every string is as transformers has it, which runs the same search. Of the recorded strings only "<extra_id_0> test" and
"</s> inside" come out otherwise than from sentencepiece alone: here the special words are tokens. Beside them differ:
clusters of combining characters; NUL and what the table maps behind it; and equally probable cuts of one sign or word
repeated, from "A" 12 times, "*" 13, "_" 16, "." 26 and "x" 43 times on T5's pieces. None of these is a prompt.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import models, normalizers
from torch import Tensor

from nanomed.run import files
from nanomed.text import spiece
from nanomed.text.spiece import CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from nanomed.weights import WeightsError, WeightsNotFound

PAD, END, UNK, SPACE = "<pad>", "</s>", "<unk>", "\u2581"


class T5Tokenizer:
    """prompts -> (ids int64 (B, L), mask bool (B, L)), true at real tokens; `</s>` behind a prompt, padding behind it.

    What does not fit is cut and `</s>` kept; `cut` counts the prompts of the last call that were. Where a prompt
    itself says `</s>`, `<pad>`, `<unk>` or `<extra_id_0>`, it becomes that token, and the text on either side is
    tokenized by itself. This is what the published systems do; sentencepiece alone takes the word for letters.

    content  the bytes of a spiece.model; ValueError, KeyError, ... with the reason where they are not one of T5's
    extra    special tokens that the model lacks: a table with their ids, or how many `<extra_id_n>` follow its pieces,
             the last one first; None for T5's 100, or 0 where the pieces include them (mT5)
    """

    def __init__(self, content: bytes, extra: dict[str, int] | int | None = None):
        self.content, self.cut = content, 0
        self.pieces, trained, normal = spiece.parse(content)
        ids = {text: i for i, (text, _, _) in enumerate(self.pieces)}
        if END not in ids:
            raise ValueError(f"there is no {END} among its pieces")
        self.end_id, self.pad_id = ids[END], ids.get(PAD, 0)
        if extra is None:
            extra = 0 if any("<extra_id_" in text for text in ids) else 100
        if isinstance(extra, int):
            extra = {f"<extra_id_{extra - 1 - i}>": len(ids) + i for i in range(extra)}
        self.extra = {text: i for text, i in extra.items() if text not in ids}
        if odd := [text for text, i in self.extra.items() if not text or type(i) is not int or not 0 <= i < 1 << 31]:
            raise ValueError(f"the special token {odd[0]!r} has the id {extra[odd[0]]!r}")
        named = [text for text, _, kind in self.pieces if kind in (CONTROL, UNKNOWN)]
        self.special = {text: ids[text] for text in named if text in (PAD, END, UNK) or "<extra_id_" in text}
        self.special |= self.extra
        self._special = _any_of(self.special)
        self._kept = _any_of(text for text, _, kind in self.pieces if kind == USER_DEFINED)
        self._prefix, self._collapse = (normal.get(number, 1) for number in (3, 4))  # a space first; no two spaces
        charsmap = normal.get(2, b"")  # the size of a trie, the trie, the strings that its values point at
        size = int.from_bytes(charsmap[:4], "little")
        if charsmap and (not 4 <= size <= len(charsmap) - 4 or size % 4):
            raise ValueError(f"a normalisation of {len(charsmap)} bytes with a trie of {size}")
        self._charsmap = normalizers.Precompiled(charsmap) if charsmap else None
        self._unknown = [kind for _, _, kind in self.pieces].index(UNKNOWN)
        self._bytes = [ids[f"<0x{byte:02X}>"] for byte in range(256)] if trained.get(35) else []
        table = list(self.pieces)
        for i, (text, score, kind) in enumerate(self.pieces):
            if kind == USER_DEFINED:  # above any probable path
                score = -0.1
            elif kind != NORMAL:  # never found in a text: normalised, it has no space
                text, score = f" {text}", 0.0
            table[i] = (text, score)
        self._model = models.Unigram(table, self._unknown)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "T5Tokenizer":
        """From `spiece.model`, else `tokenizer.json`; special tokens from added_tokens.json and tokenizer_config.json.

        Raises WeightsNotFound where neither is there and WeightsError, naming the file, where one is damaged.
        """
        folder, extra = Path(folder), None
        if (path := folder / "tokenizer_config.json").is_file():
            extra = spiece.read(path, spiece.extra)
        if (path := folder / "added_tokens.json").is_file():
            extra = spiece.read(path, lambda content: dict(json.loads(content))) or extra
        if (path := folder / "spiece.model").is_file():
            return spiece.read(path, lambda content: cls(content, extra))
        if (path := folder / "tokenizer.json").is_file():
            return spiece.read(path, lambda content: cls(spiece.from_json(content), extra))
        raise WeightsNotFound(f"{folder}: neither spiece.model nor tokenizer.json is there")

    def __len__(self) -> int:
        """Rows that an embedding needs at least; the published ones have more (32,128 for 32,100)."""
        return max(len(self.pieces), *(i + 1 for i in self.special.values()))

    def __call__(self, prompts: list[str], length: int = 120) -> tuple[Tensor, Tensor]:
        """Tokenize, cut or pad to `length`. Raises ValueError where a prompt is not text."""
        if length < 1:
            raise ValueError(f"length {length}: {END} alone is 1")
        found = [self.encode(prompt) for prompt in prompts]
        self.cut = sum(len(tokens) >= length for tokens in found)
        ids = torch.full((len(prompts), length), self.pad_id)
        mask = torch.arange(length) <= torch.tensor([len(tokens) for tokens in found], dtype=torch.int64)[:, None]
        for i, tokens in enumerate(found):
            tokens = [*tokens[: length - 1], self.end_id]
            ids[i, : len(tokens)] = torch.tensor(tokens)
        return ids, mask

    def lengths(self, prompts: list[str]) -> list[int]:
        """The tokens that each prompt needs, the end included."""
        return [len(self.encode(prompt)) + 1 for prompt in prompts]

    def encode(self, prompt: str) -> list[int]:
        """The ids of a prompt, without the end."""
        try:
            prompt.encode()
        except (AttributeError, UnicodeEncodeError) as error:  # not a string at all, or lone surrogates
            raise ValueError(f"a prompt is not text: {prompt!r}") from error
        ids: list[int] = []
        for i, part in enumerate(self._special.split(prompt)):  # text, special, text, special, ..., text
            for token in [] if i % 2 else self._model.tokenize(self.normalize(part)):
                spelled = self._bytes and token.id == self._unknown
                ids += [self._bytes[byte] for byte in token.value.encode()] if spelled else [token.id]
            ids += [self.special[part]] if i % 2 else []
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens left out."""
        special = {self.pad_id, self.end_id, self._unknown, *self.special.values()}
        words = (self.pieces[i][0] for i in ids if i < len(self.pieces) and i not in special)
        return "".join(words).replace(SPACE, " ").removeprefix(" ")

    def normalize(self, text: str) -> str:
        """Text as the pieces spell it: characters mapped by the model's own table, spaces single and visible."""
        parts = self._kept.split(text) if self._charsmap else []  # text, symbol of the user's, text, ..., text
        try:
            parts[::2] = map(self._charsmap.normalize_str, parts[::2]) if parts else []
        except BaseException as error:  # Rust panics where the table leads nowhere, which is no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise WeightsError(f"the normalisation in spiece.model is damaged ({str(error)[:200]})") from error
        given, text = text, "".join(parts) if parts else text
        if self._collapse:
            text = re.sub(" +", " ", text).lstrip(" ")
        first = self._prefix and (text or given and not self._collapse)
        text = (SPACE if first else "") + text.replace(" ", SPACE)
        return text.rstrip(SPACE) if self._collapse else text

    def save(self, folder: str | Path) -> None:
        """Write spiece.model, as it was read, added_tokens.json and tokenizer_config.json."""
        with files.atomic(Path(folder) / "spiece.model") as temporary:
            temporary.write_bytes(self.content)
        files.write_json(Path(folder) / "added_tokens.json", self.extra)
        extra = [text for text in self.special if text.startswith("<extra_id_")]
        config = {"tokenizer_class": "T5Tokenizer", "eos_token": END, "unk_token": UNK, "pad_token": PAD}
        config |= {"extra_ids": len(extra), "additional_special_tokens": extra}
        files.write_json(Path(folder) / "tokenizer_config.json", config)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Splits a string at each of these, the longest first; at none where there are none."""
    return re.compile(f"({'|'.join(map(re.escape, sorted(texts, key=len, reverse=True))) or '(?!)'})")


def train_unigram(texts: Iterable[str], pieces: int) -> T5Tokenizer:
    """A small T5-style vocabulary from texts, for models that train from scratch.

    All characters and the most frequent words, each with the logarithm of its share; words that are left out are
    spelled. No normalisation but that of spaces. The same texts give the same vocabulary.
    """
    words = Counter(SPACE + word for text in texts for word in text.replace(SPACE, " ").split(" ") if word)
    letters: Counter[str] = Counter()
    for word, count in words.items():
        letters.update({letter: count * word.count(letter) for letter in word})
    counts, total = words | letters, words.total() + letters.total()
    kept, longer = (sorted(some, key=lambda text: (-counts[text], text)) for some in (letters, words))
    kept += longer[: max(pieces - len(kept) - 3, 0)]
    special = [(PAD, 0.0, CONTROL), (END, 0.0, CONTROL), (UNK, 0.0, UNKNOWN)]
    return T5Tokenizer(spiece.write(special + [(text, math.log(counts[text] / total), NORMAL) for text in kept]))
