"""BERT's tokenizer (Devlin et al. 2019): WordPiece on a `vocab.txt`, run by the `tokenizers` package.

A text is cleaned of control characters and lower-cased, accents fall away, every Chinese character is a word of its
own, and so is every punctuation mark. A word is cut into the longest piece of the vocabulary that begins it, then the
longest that goes on (`##...`), and is `[UNK]` where that leads nowhere.
"""

import json
import string
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

from nanomed.run import files
from nanomed.weights import WeightsError, WeightsNotFound

PAD, UNK, START, END, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# What a tokenizer_config.json may say about it, and what silence means.
SETTINGS = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}


class WordPiece:
    """prompts -> (ids int64 (B, L), mask bool (B, L)), true at real tokens.

    [CLS] and [SEP] stand around a prompt; what does not fit is cut and [SEP] kept. `cut` counts the prompts of the last
    call that were. Where a prompt itself says [SEP] or another of the five, it becomes that token.

    settings   as in SETTINGS; accents fall where `strip_accents` says so, or where it says nothing with the capitals
    """

    def __init__(self, vocab: dict[str, int], settings: dict | None = None):
        if lost := [token for token in SPECIAL if token not in vocab]:
            raise ValueError(f"a vocabulary without {lost[0]}")
        self.vocab, self.settings, self.cut = vocab, SETTINGS | (settings or {}), 0
        self.start_id, self.end_id, self.pad_id = vocab[START], vocab[END], vocab[PAD]
        self._tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=UNK, max_input_chars_per_word=100))
        self._tokenizer.normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=self.settings["tokenize_chinese_chars"],
            strip_accents=self.settings["strip_accents"],
            lowercase=self.settings["do_lower_case"],
        )
        self._tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])

    @classmethod
    def from_folder(cls, folder: str | Path) -> "WordPiece":
        """From `vocab.txt`, else `tokenizer.json`, and what `tokenizer_config.json` says.

        Raises WeightsNotFound where neither is there and WeightsError, naming the folder, where one is damaged.
        """
        folder, vocab = Path(folder), {}
        try:
            if (folder / "vocab.txt").is_file():  # a piece a line; only a newline ends one
                lines = (folder / "vocab.txt").read_bytes().decode("utf-8").split("\n")
                lines = [line.removesuffix("\r") for line in (lines[:-1] if not lines[-1] else lines)]
                vocab = {line: i for i, line in enumerate(lines)}
            elif (folder / "tokenizer.json").is_file():
                vocab = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
            else:
                raise WeightsNotFound(f"{folder}: neither vocab.txt nor tokenizer.json is there")
            path = folder / "tokenizer_config.json"
            config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            return cls(vocab, {name: config[name] for name in SETTINGS if name in config})
        except WeightsNotFound:
            raise
        except Exception as error:  # JSON, keys, types, and the plain Exception of tokenizers
            reason = str(error).partition("\n")[0][:200]
            raise WeightsError(f"{folder}: damaged tokenizer files ({type(error).__name__}: {reason})") from error

    def __len__(self) -> int:
        return max(self.vocab.values()) + 1

    def __call__(self, prompts: list[str], length: int = 77) -> tuple[Tensor, Tensor]:
        """Tokenize, cut or pad to `length`. Raises ValueError where a prompt is not text."""
        if length < 2:
            raise ValueError(f"length {length}: [CLS] and [SEP] alone are 2")
        found = self._encode(prompts)
        self.cut = sum(len(tokens) > length - 2 for tokens in found)
        ids = torch.full((len(prompts), length), self.pad_id)
        mask = torch.zeros(len(prompts), length, dtype=torch.bool)
        for i, tokens in enumerate(found):
            tokens = [self.start_id, *tokens[: length - 2], self.end_id]
            ids[i, : len(tokens)] = torch.tensor(tokens)
            mask[i, : len(tokens)] = True
        return ids, mask

    def lengths(self, prompts: list[str]) -> list[int]:
        """The tokens that each prompt needs, [CLS] and [SEP] included."""
        return [len(tokens) + 2 for tokens in self._encode(prompts)]

    def _encode(self, prompts: list[str]) -> list[list[int]]:
        for prompt in prompts:
            try:
                prompt.encode()
            except (AttributeError, UnicodeEncodeError) as error:  # not a string at all, or lone surrogates
                raise ValueError(f"a prompt is not text: {prompt!r}") from error
        return [found.ids for found in self._tokenizer.encode_batch_fast(prompts, add_special_tokens=False)]

    def save(self, folder: str | Path) -> None:
        """Write vocab.txt and tokenizer_config.json."""
        tokens = sorted(self.vocab, key=self.vocab.__getitem__)
        files.write_text(Path(folder) / "vocab.txt", "".join(f"{token}\n" for token in tokens))
        names = {"pad_token": PAD, "unk_token": UNK, "cls_token": START, "sep_token": END, "mask_token": MASK}
        files.write_json(Path(folder) / "tokenizer_config.json",
                         {"tokenizer_class": "BertTokenizer"} | names | self.settings)  # fmt: skip


def train_wordpiece(texts: Iterable[str], pieces: int) -> WordPiece:
    """A small vocabulary from texts, for models that train from scratch: the five special tokens, every sign as a
    beginning and as a continuation, then the most frequent words. The same texts give the same vocabulary."""
    plain = WordPiece({token: i for i, token in enumerate(SPECIAL)})._tokenizer
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in plain.pre_tokenizer.pre_tokenize_str(plain.normalizer.normalize_str(text)))
    signs = sorted({*string.ascii_lowercase, *string.digits, *string.punctuation, *"".join(words)})
    known = dict.fromkeys([*SPECIAL, *signs, *(f"##{sign}" for sign in signs)])
    longer = [word for word in sorted(words, key=lambda word: (-words[word], word)) if word not in known]
    known |= dict.fromkeys(longer[: max(pieces - len(known), 0)])
    return WordPiece({token: i for i, token in enumerate(known)})
