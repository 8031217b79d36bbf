"""T5 whole (Raffel et al. 2020), encoder and decoder: what Med-Art shortens captions with ("simplify: ...").

    model = load("weights/google-t5/t5-large")
    model.generate(["simplify: An endoscopic image of ..."], beams=4, min_length=90, max_length=120)

v1.0 (t5-small, -base, -large) has ReLU and reads its words out by the embedding, after the states are multiplied by
d_model^-0.5; v1.1 has gated GELU and a head of its own, without that factor.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomed import weights
from nanomed.captions.beams import Search, beam_search
from nanomed.captions.networks.decoder import Cache
from nanomed.text.t5 import EMBEDDINGS, FeedForwardLayer, RMSNorm, SelfAttention, T5Config, T5Encoder, relative_buckets
from nanomed.text.unigram import T5Tokenizer

REPEATED = (EMBEDDINGS, "decoder.embed_tokens.weight")  # what files may repeat `shared.weight` as, or call it
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"  # in the first releases


@dataclass(frozen=True)
class T5WholeConfig(T5Config):
    """The shapes of a whole T5: those of the encoder, and what the decoder adds."""

    num_decoder_layers: int = 0  # 0: as many as the encoder's
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool | None = None  # by d_model^-0.5, before they are read out; None: where tied
    decoder_start_token_id: int = 0

    @classmethod
    def from_json(cls, path: str | Path) -> "T5WholeConfig":
        """Read a published `config.json`, or the one in a folder. What it leaves unsaid is that of t5-small."""
        unsaid = dict(d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, feed_forward_proj="relu")
        return weights.configured(cls, path, "a T5", unsaid)


class CausalAttention(SelfAttention):
    """Attention to what is written so far; buckets of distance all lie behind the query."""

    def bias(self, length: int, before: int, dtype: torch.dtype) -> Tensor:
        """(1, heads, L, before + L) for L new places behind `before` others, lowest where a column comes later."""
        table = self.relative_attention_bias
        device = table.weight.device
        columns = torch.arange(before + length, device=device)
        distance = columns - columns[before:, None]  # (L, before + L), key less query
        bias = table(relative_buckets(distance.clamp(max=0), 2 * table.num_embeddings, self.furthest))
        bias = bias.permute(2, 0, 1)[None].to(dtype)
        return bias.masked_fill(distance > 0, torch.finfo(dtype).min)

    def forward(self, x: Tensor, bias: Tensor, cache: Cache, layer: int) -> Tensor:
        """x (B, L, D), the new places -> the same; the cache holds the others."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.d_kv)).transpose(1, 2) for proj in (self.q, self.k, self.v))
        k, v = cache.update(layer, k, v)
        x = F.scaled_dot_product_attention(q, k, v, bias, scale=1.0)
        return self.o(x.transpose(1, 2).flatten(2))


class CrossAttention(SelfAttention):
    """Attention to the encoder's states, whose keys and values are made once."""

    def remember(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """States (N, S, D) -> keys and values (N, heads, S, d_kv)."""
        return tuple(proj(states).unflatten(-1, (-1, self.d_kv)).transpose(1, 2) for proj in (self.k, self.v))

    def forward(self, x: Tensor, remembered: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """x (N * beams, L, D), remembered of N texts, mask bool (N, 1, 1, S). The beams of a text ask side by side, as
        so many places, so that nothing is repeated for them."""
        k, v = remembered
        q = self.q(x).unflatten(-1, (-1, self.d_kv)).unflatten(0, (len(k), -1))  # (N, beams, L, heads, d_kv)
        beams, length = q.shape[1:3]
        q = q.flatten(1, 2).transpose(1, 2)  # (N, heads, beams * L, d_kv)
        x = F.scaled_dot_product_attention(q, k, v, mask, scale=1.0).transpose(1, 2).flatten(2)
        return self.o(x.unflatten(1, (beams, length)).flatten(0, 1))


class CausalLayer(nn.Module):
    """`layer.0` of a decoder block: attention to what is written so far."""

    def __init__(self, c: T5Config, relative: bool):
        super().__init__()
        self.SelfAttention = CausalAttention(c, relative)
        self.layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon)


class CrossLayer(nn.Module):
    """`layer.1` of a decoder block: attention to the encoder's states."""

    def __init__(self, c: T5Config):
        super().__init__()
        self.EncDecAttention = CrossAttention(c, relative=False)
        self.layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon)


class DecoderBlock(nn.Module):
    """Three layers, each normed first and added; only the first block has the table of distances."""

    def __init__(self, c: T5Config, relative: bool):
        super().__init__()
        self.layer = nn.ModuleList([CausalLayer(c, relative), CrossLayer(c), FeedForwardLayer(c)])


class DecoderStack(nn.Module):
    """What the published names call `decoder`."""

    def __init__(self, c: T5WholeConfig):
        super().__init__()
        layers = c.num_decoder_layers or c.num_layers
        self.block = nn.ModuleList(DecoderBlock(c, relative=i == 0) for i in range(layers))
        self.final_layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon)


class T5(T5Encoder):
    """The encoder with its decoder: `logits(states, mask, ids)`, step by step with a cache, or `write` by beams."""

    def __init__(self, config: T5WholeConfig):
        super().__init__(config)
        self.decoder = DecoderStack(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def remember(self, states: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The keys and values that every layer makes of the encoder's states (N, S, D)."""
        return [block.layer[1].EncDecAttention.remember(states) for block in self.decoder.block]

    def logits(self, ids: Tensor, remembered: list, mask: Tensor, cache: Cache | None = None) -> Tensor:
        """ids (N * beams, L), those that the cache does not hold yet -> logits (N * beams, L, V) of the next ones.

        remembered, mask   what `remember` made of the encoder's states of N texts, and their mask bool (N, S)
        """
        cache = cache or Cache()
        x, seen = self.shared(ids), mask.bool()[:, None, None]
        bias = self.decoder.block[0].layer[0].SelfAttention.bias(ids.shape[1], cache.length, x.dtype)
        for i, (block, pair) in enumerate(zip(self.decoder.block, remembered)):
            before, across, feed_forward = block.layer
            x = x + before.SelfAttention(before.layer_norm(x), bias, cache, i)
            x = x + across.EncDecAttention(across.layer_norm(x), pair, seen)
            x = x + feed_forward.DenseReluDense(feed_forward.layer_norm(x))
        cache.length += ids.shape[1]
        x = self.decoder.final_layer_norm(x)
        c = self.config
        if c.tie_word_embeddings if c.scale_decoder_outputs is None else c.scale_decoder_outputs:
            x = x * c.d_model**-0.5
        return F.linear(x, (self.shared if c.tie_word_embeddings else self.lm_head).weight)

    def write(self, ids: Tensor, mask: Tensor, **how) -> tuple[Tensor, Tensor]:
        """Texts (N, S) with their mask -> the best sequence of each, ids (N, L) with the start token, and its
        score (N). `how` as in `beams.Search`."""
        remembered, cache = self.remember(self(ids, mask)), Cache()

        def step(tokens: Tensor, rows: Tensor | None) -> Tensor:
            if rows is not None:
                cache.reorder(rows)
            return self.logits(tokens, remembered, mask, cache)[:, -1]

        start = torch.full((len(ids),), self.config.decoder_start_token_id, device=ids.device)
        return beam_search(step, start, 1, Search(**how))


class Shortener:
    """A whole T5 with its tokenizer."""

    def __init__(self, network: T5, tokenizer: T5Tokenizer):
        self.network, self.tokenizer = network, tokenizer

    def generate(self, texts: list[str], longest: int = 512, **how) -> list[str]:
        """What T5 writes of each text, of which `longest` tokens are read. `how` as in `beams.Search`."""
        length = min(longest, max(self.tokenizer.lengths(texts)))
        device = self.network.shared.weight.device
        ids, mask = (tensor.to(device) for tensor in self.tokenizer(texts, length))
        return [self.tokenizer.decode(row) for row in self.network.write(ids, mask, **how)[0].tolist()]


def load(path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Shortener:
    """The whole T5 of a folder, with the tokenizer beside it. Raises WeightsError."""
    path = weights.find(path)
    config = T5WholeConfig.from_json(path)
    tensors = weights.read(path, "model", dtype=dtype)
    network = weights.load(weights.build(T5, config), whole(tensors, config), (UNUSED,)).eval()
    return Shortener(network.requires_grad_(False).to(device), T5Tokenizer.from_folder(path))


def whole(tensors: dict[str, Tensor], config: T5WholeConfig) -> dict[str, Tensor]:
    """The tensors of a T5 file under the names of T5: the embedding once, and a head where it is not the embedding."""
    kept = {name: tensor for name, tensor in tensors.items() if name not in REPEATED}
    for name in REPEATED:
        if name in tensors:
            kept.setdefault("shared.weight", tensors[name])
    if config.tie_word_embeddings:
        kept.pop("lm_head.weight", None)
    elif "shared.weight" in kept:  # transformers' later files leave out a head that equals the embedding
        kept.setdefault("lm_head.weight", kept["shared.weight"])
    return kept
