"""BERT's encoder (Devlin et al. 2019), with the parameter names of the published checkpoints: Hunyuan-DiT's first
reader.

    encoder = load_bert("weights/Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers/text_encoder")
    ids, mask = tokenizer(prompts, length=77)   # WordPiece, wordpiece.py
    states = encoder(ids, mask)                 # (B, L, D)

One text at a time: every token is of the first kind (`token_type_embeddings` row 0). The pooler of the files, which
looks at the first token for sentence tasks, is left out.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomed import weights
from nanomed.weights import WeightsError


@dataclass(frozen=True)
class BertConfig:
    """The shape of a BERT; the defaults are those of Hunyuan-DiT's, a large Chinese RoBERTa."""

    vocab_size: int = 47020
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12

    @classmethod
    def from_json(cls, path: str | Path) -> "BertConfig":
        """Read a published `config.json`, or the one in a folder. What it leaves unsaid is that of bert-base-uncased.

        Raises WeightsError where it is missing, damaged, or of a BERT with other activations or positions.
        """
        unsaid = dict(vocab_size=30522, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
                      intermediate_size=3072)  # fmt: skip
        stated = weights.settings(path, "a BERT")
        known = dict(hidden_act="gelu", position_embedding_type="absolute", is_decoder=False)
        for name, value in known.items():
            if stated.get(name, value) != value:
                raise WeightsError(f"{path}: a BERT with {name} = {stated[name]!r} is not known, only {value!r}")
        return weights.configured(cls, path, "a BERT", unsaid)


class Embeddings(nn.Module):
    """LN(word + place + kind of text)."""

    def __init__(self, c: BertConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(c.vocab_size, c.hidden_size, padding_idx=0)  # whose row never trains
        self.position_embeddings = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        self.token_type_embeddings = nn.Embedding(c.type_vocab_size, c.hidden_size)
        self.LayerNorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:  # (B, L) -> (B, L, D)
        places = self.position_embeddings.weight[: ids.shape[1]]
        return self.LayerNorm(self.word_embeddings(ids) + self.token_type_embeddings.weight[0] + places)


class SelfAttention(nn.Module):
    """Of every token to all that the mask shows, before the projection."""

    def __init__(self, c: BertConfig):
        super().__init__()
        self.heads = c.num_attention_heads
        self.query = nn.Linear(c.hidden_size, c.hidden_size)
        self.key = nn.Linear(c.hidden_size, c.hidden_size)
        self.value = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, L, D); mask bool (B, 1, 1, L), True where a token may look."""
        projections = self.query, self.key, self.value
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in projections)
        x = F.scaled_dot_product_attention(q, k, v, mask)  # (B, heads, L, D / heads)
        return x.transpose(1, 2).flatten(2)


class Residual(nn.Module):
    """LN(dense(x) + before): the norm comes after the sum."""

    def __init__(self, cin: int, c: BertConfig):
        super().__init__()
        self.dense = nn.Linear(cin, c.hidden_size)
        self.LayerNorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + before)


class Attention(nn.Module):
    """With the projection, the sum and the norm behind it."""

    def __init__(self, c: BertConfig):
        super().__init__()
        self.self = SelfAttention(c)
        self.output = Residual(c.hidden_size, c)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.output(self.self(x, mask), x)


class Intermediate(nn.Module):
    """The wide half of the feed-forward network."""

    def __init__(self, c: BertConfig):
        super().__init__()
        self.dense = nn.Linear(c.hidden_size, c.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class Layer(nn.Module):
    """x <- LN(x + attention(x)), then x <- LN(x + dense(gelu(dense(x))))."""

    def __init__(self, c: BertConfig):
        super().__init__()
        self.attention = Attention(c)
        self.intermediate = Intermediate(c)
        self.output = Residual(c.intermediate_size, c)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.attention(x, mask)
        return self.output(self.intermediate(x), x)


class Stack(nn.Module):
    """The layers, under the name of the published file."""

    def __init__(self, c: BertConfig):
        super().__init__()
        self.layer = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))


class Bert(nn.Module):
    """`encoder(ids, mask)` gives the last hidden states (B, L, D). There is no dropout: it is run as published systems
    run it."""

    def __init__(self, config: BertConfig = BertConfig()):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Stack(config)
        for module in self.modules():  # BERT's own start would be 0.02; for a small one that learns, unit embeddings
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
                nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """ids int64 (B, L), mask bool (B, L) or None -> last hidden states (B, L, D).

        A token sees those that the mask leaves, on either side. Rows of padding hold something too. Raises ValueError
        for more tokens than there are places.
        """
        if ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(f"{ids.shape[1]} tokens: this BERT has {self.config.max_position_embeddings} places")
        x = self.embeddings(ids)
        if mask is not None:
            mask = mask.bool()[:, None, None, :]  # (B, 1, 1, L)
        for layer in self.encoder.layer:
            x = layer(x, mask)
        return x


# ----------------------------------------------------------------------------------------------------------- the files

OPTIONAL = ("pooler.dense.weight", "pooler.dense.bias")  # what files have besides, and no state depends on


def load_bert(path: str | Path, dtype: torch.dtype | None = None) -> Bert:
    """The encoder of a folder with `config.json` and `model.safetensors` (one file, shards, or their fp16 variant), in
    evaluation mode. dtype: convert to it while reading; None keeps the file's.

    Raises WeightsError where a file is missing, damaged or of another BERT.
    """
    encoder = weights.build(Bert, BertConfig.from_json(path))
    return weights.load(encoder, weights.read(path, "model", dtype=dtype), OPTIONAL).eval()
