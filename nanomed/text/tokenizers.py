"""CLIP's byte-pair tokenizer, from the files that every CLIP repository ships."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

from nanomed.run import files
from nanomed.weights import WeightsError, WeightsNotFound

START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def _pipeline(model: models.BPE) -> Tokenizer:
    """NFC, single spaces, lower case; words by CLIP's pattern, spelled in bytes."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


class ClipTokenizer:
    """prompts -> (ids int64 (B, L), mask bool (B, L)), true at real tokens.

    <|startoftext|> and <|endoftext|> stand around a prompt; what does not fit is cut and the end token kept. `cut`
    counts the prompts of the last call that were.

    A special token (start, end, padding) is recognised in a prompt before anything else is done to it: SDXL's second
    tokenizer pads with "!", so every "!" of a prompt becomes padding there. That is what the published systems do.

    pad      the padding token
    folded   special tokens that are looked for in the lower-cased text ("normalized" in the published files)
    """

    def __init__(
        self, vocab: dict[str, int], merges: list[tuple[str, str]], pad: str = END, folded: Iterable[str] = ()
    ):
        if lost := [token for token in (START, END, pad) if token not in vocab]:
            raise WeightsError(f"a CLIP vocabulary without {lost[0]!r}")
        self.vocab, self.merges, self.pad_id, self.folded = vocab, merges, vocab[pad], frozenset(folded)
        self.start_id, self.end_id, self.cut = vocab[START], vocab[END], 0
        self._tokenizer = _pipeline(
            models.BPE(vocab, merges, unk_token=END, continuing_subword_prefix="", end_of_word_suffix="</w>")
        )
        special = [AddedToken(token, normalized=token in self.folded, special=True) for token in (START, END, pad)]
        self._tokenizer.add_special_tokens(special)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ClipTokenizer":
        """From vocab.json and merges.txt, or tokenizer.json; the padding token from tokenizer_config.json or
        special_tokens_map.json. Raises WeightsError where they are missing or damaged."""
        folder = Path(folder)
        try:
            if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
                vocab = _json(folder / "vocab.json")
                lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
                merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
            elif (folder / "tokenizer.json").is_file():
                model = _json(folder / "tokenizer.json")["model"]
                vocab = model["vocab"]
                merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
            else:
                raise WeightsNotFound(f"{folder}: neither vocab.json and merges.txt nor tokenizer.json is there")
            config = _json(folder / "special_tokens_map.json") | _json(folder / "tokenizer_config.json")
            folded = {}
            for role in ("bos_token", "eos_token", "unk_token", "pad_token"):  # in the order in which they overrule
                token = config.get(role) or END
                name = token["content"] if isinstance(token, dict) else token
                folded[name] = isinstance(token, dict) and token.get("normalized", False)
            pad = name
            for token in config.get("added_tokens_decoder", {}).values():
                folded[token["content"]] = token.get("normalized", False)
            return cls(vocab, merges, pad, [name for name in folded if folded[name]])
        except WeightsNotFound:
            raise
        except Exception as error:  # JSON, keys, types, and the plain Exception of tokenizers
            reason = str(error).partition("\n")[0]
            raise WeightsError(f"{folder}: damaged tokenizer files ({type(error).__name__}: {reason})") from error

    def __len__(self) -> int:
        return len(self.vocab)

    def __call__(self, prompts: list[str], length: int = 77) -> tuple[Tensor, Tensor]:
        """Tokenize, cut or pad to `length`. Each distinct prompt is tokenized once."""
        if length < 2:
            raise ValueError(f"length {length}: the start and end tokens alone are 2")
        found = self._encode(prompts)
        ids = torch.full((len(prompts), length), self.pad_id)
        mask = torch.zeros(len(prompts), length, dtype=torch.bool)
        self.cut = 0
        for i, prompt in enumerate(prompts):
            tokens = found[prompt]
            self.cut += len(tokens) > length - 2
            tokens = [self.start_id, *tokens[: length - 2], self.end_id]
            ids[i, : len(tokens)] = torch.tensor(tokens)
            mask[i, : len(tokens)] = True
        return ids, mask

    def in_pieces(self, prompts: list[str], length: int, pieces: int) -> tuple[Tensor, Tensor]:
        """Tokenize into pieces of `length`, each between a start and an end token of its own and padded, as web UIs
        read long prompts: ids and mask (B, pieces, length). Pieces behind a prompt's end hold these two alone."""
        found, inner = self._encode(prompts), length - 2
        ids = torch.full((len(prompts), pieces, length), self.pad_id)
        mask = torch.zeros(len(prompts), pieces, length, dtype=torch.bool)
        for i, prompt in enumerate(prompts):
            for j in range(pieces):
                tokens = [self.start_id, *found[prompt][j * inner : (j + 1) * inner], self.end_id]
                ids[i, j, : len(tokens)] = torch.tensor(tokens)
                mask[i, j, : len(tokens)] = True
        return ids, mask

    def lengths(self, prompts: list[str]) -> list[int]:
        """The tokens that each prompt needs, start and end included."""
        found = self._encode(prompts)
        return [len(found[prompt]) + 2 for prompt in prompts]

    def _encode(self, prompts: list[str]) -> dict[str, list[int]]:
        distinct = list(dict.fromkeys(prompts))
        try:
            encoded = self._tokenizer.encode_batch_fast(distinct, add_special_tokens=False)
        except TypeError as error:  # lone surrogates, or not a string at all
            raise ValueError(f"a prompt is not text: {next(p for p in distinct if not _is_text(p))!r}") from error
        return {prompt: encoding.ids for prompt, encoding in zip(distinct, encoded)}

    def save(self, folder: str | Path) -> None:
        """Write vocab.json, merges.txt and tokenizer_config.json."""
        folder = Path(folder)
        pad = next(token for token, index in self.vocab.items() if index == self.pad_id)
        flags = {"lstrip": False, "rstrip": False, "single_word": False, "special": True}
        special = {
            str(self.vocab[token]): {"content": token, "normalized": token in self.folded, **flags}
            for token in dict.fromkeys([START, END, pad])
        }
        files.write_json(folder / "vocab.json", self.vocab)
        merges = "".join(f"{a} {b}\n" for a, b in self.merges)
        files.write_text(folder / "merges.txt", "#version: 0.2\n" + merges)
        names = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
        config = {"tokenizer_class": "CLIPTokenizer", **names, "added_tokens_decoder": special}
        files.write_json(folder / "tokenizer_config.json", config)


def _json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _is_text(value: object) -> bool:
    try:
        return bool(value.encode("utf-8")) or value == ""
    except (AttributeError, UnicodeEncodeError):
        return False


def train_bpe(texts: Iterable[str], merges: int) -> ClipTokenizer:
    """A small CLIP-style vocabulary from texts: 256 bytes, the same at a word's end, the merges, two special tokens.

    Sennrich et al. 2016: the most frequent pair of neighbours becomes one symbol, `merges` times or until all words
    are whole. Of equally frequent pairs the first in the alphabet is taken: the same texts give the same vocabulary.
    """
    pipeline = _pipeline(models.BPE())
    words: Counter[str] = Counter()
    for text in texts:
        pieces = pipeline.pre_tokenizer.pre_tokenize_str(pipeline.normalizer.normalize_str(text))
        words.update(word for word, _ in pieces)
    spelled = {(*word[:-1], f"{word[-1]}</w>"): count for word, count in words.items()}
    pairs: list[tuple[str, str]] = []
    while len(pairs) < merges:
        counts: Counter[tuple[str, str]] = Counter()
        for symbols, count in spelled.items():
            for pair in zip(symbols, symbols[1:]):
                counts[pair] += count
        if not counts:
            break
        pairs.append(min(counts, key=lambda pair: (-counts[pair], pair)))
        spelled = {_joined(symbols, pairs[-1]): count for symbols, count in spelled.items()}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = alphabet + [f"{symbol}</w>" for symbol in alphabet]
    tokens = dict.fromkeys([*base, *("".join(pair) for pair in pairs), START, END])
    return ClipTokenizer({token: i for i, token in enumerate(tokens)}, pairs)


def _joined(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """`symbols` with every occurrence of `pair`, from the left, as one symbol."""
    out: list[str] = []
    for symbol in symbols:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return tuple(out)
