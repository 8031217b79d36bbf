"""One decoder-only transformer for Llama 3 and 3.1, Mistral, Qwen 2 and 2.5, and Gemma 2, with the published names.

    model = load_decoder("weights/Qwen/Qwen2.5-7B-Instruct", dtype=torch.bfloat16)
    logits = model(ids, mask)                      # (B, L, V)
    cache = Cache(); model(ids, mask, cache=cache)  # later calls give the new tokens only, and the whole mask

The families differ in few places: Qwen has biases at q, k and v; Mistral and Gemma 2 (every other layer) look back
through a window; Gemma 2 has four norms a layer, whose weights are stored less one, soft caps and scaled embeddings.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomed import weights
from nanomed.weights import WeightsError

FAMILIES = ("llama", "mistral", "qwen2", "gemma2")
ACTIVATIONS = {"silu": F.silu, "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh")}


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder; the defaults are those of Llama 3 8B."""

    model_type: str = "llama"
    vocab_size: int = 128256
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_stretch: tuple[float, float, float, float] | None = None  # Llama 3.1: factor, low, high, first trained length
    tie_word_embeddings: bool = False
    sliding_window: int | None = None  # tokens that a windowed layer sees, itself included
    query_pre_attn_scalar: float | None = None  # scores are divided by its root; None: by that of head_dim
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None

    def windowed(self, layer: int) -> bool:
        """Whether a layer looks back through a window: all of Mistral, every other one of Gemma 2."""
        return self.sliding_window is not None and (self.model_type != "gemma2" or layer % 2 == 0)

    @classmethod
    def from_settings(cls, said: dict, what: str = "config.json") -> "DecoderConfig":
        """Of a published configuration. Raises WeightsError for what this file does not compute."""
        family = said.get("model_type", "llama")
        if family not in FAMILIES:
            raise WeightsError(f"{what}: model_type {family!r} is not one of {', '.join(FAMILIES)}")
        gemma = family == "gemma2"
        unsaid: dict = dict(rope_theta=10000.0, rms_norm_eps=1e-6)
        unsaid["num_key_value_heads"] = said.get("num_attention_heads", 32)
        if family in ("llama", "mistral"):
            unsaid |= dict(vocab_size=32000, intermediate_size=11008)
        if family == "mistral":
            unsaid |= dict(intermediate_size=14336, num_key_value_heads=8, sliding_window=4096)
        if gemma:
            unsaid |= dict(head_dim=256, tie_word_embeddings=True, sliding_window=4096, query_pre_attn_scalar=256,
                           attn_logit_softcapping=50.0, final_logit_softcapping=30.0)  # fmt: skip
        fields = {field.name for field in dataclasses.fields(cls)}
        stated = {name: value for name, value in said.items() if name in fields}
        stated = {name: v for name, v in stated.items() if v is not None or "soft" in name or name == "sliding_window"}
        stated["hidden_act"] = said.get("hidden_activation") or said.get("hidden_act") or "silu"
        if gemma and "hidden_activation" not in said:
            stated["hidden_act"] = "gelu_pytorch_tanh"  # "gelu" of the first files means it
        rope = said.get("rope_parameters") or said.get("rope_scaling") or {}
        if (kind := rope.get("rope_type", rope.get("type", "default"))) not in ("default", "llama3"):
            raise WeightsError(f"{what}: rope_type {kind!r} is not known here")
        if kind == "llama3":
            names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            try:
                stated["rope_stretch"] = tuple(float(rope[name]) for name in names)
            except (KeyError, TypeError, ValueError) as error:
                raise WeightsError(f"{what}: rope_type llama3 needs the numbers {', '.join(names)}") from error
        if "rope_theta" in rope:
            stated["rope_theta"] = rope["rope_theta"]
        if family == "qwen2":
            if said.get("use_sliding_window"):
                raise WeightsError(f"{what}: use_sliding_window of Qwen is not known here")
            stated["sliding_window"] = None
        for name in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
            if said.get(name):
                raise WeightsError(f"{what}: {name} is not known here")
        try:
            config = cls(**unsaid | stated)
            if not gemma and "head_dim" not in stated:
                config = dataclasses.replace(config, head_dim=config.hidden_size // config.num_attention_heads)
        except TypeError as error:
            raise WeightsError(f"{what}: not the configuration of a language model ({error})") from error
        if config.hidden_act not in ACTIVATIONS:
            raise WeightsError(f"{what}: hidden_act {config.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}")
        return config


class Cache:
    """Keys and values of the tokens so far, layer by layer, in blocks that double when they are full.

    room   tokens that are expected; a block has place for them from the start
    """

    def __init__(self, room: int = 0) -> None:
        self.blocks: list[list[Tensor]] = []
        self.room = room
        self.length = 0  # tokens that every layer holds

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, heads, new, d) -> those of all tokens, views of the block."""
        if layer == len(self.blocks):
            self.blocks.append([k.new_empty(*x.shape[:2], 0, x.shape[3]) for x in (k, v)])
        end = self.length + k.shape[2]
        for i, new in enumerate((k, v)):
            block = self.blocks[layer][i]
            if block.shape[2] < end:
                room = self.room if end <= self.room else max(end + 64, 2 * block.shape[2])
                grown = new.new_empty(*new.shape[:2], room, new.shape[3])
                grown[:, :, : self.length] = block[:, :, : self.length]
                block = self.blocks[layer][i] = grown
            block[:, :, self.length : end] = new
        return self.blocks[layer][0][:, :, :end], self.blocks[layer][1][:, :, :end]

    def reorder(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        for pair in self.blocks:  # one layer after the other, so that no two caches are there at a time
            pair[:] = [block.index_select(0, rows) for block in pair]


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps) * weight; Gemma's weight is stored less one, and multiplied in float32."""

    def __init__(self, width: int, eps: float, less_one: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width) if less_one else torch.ones(width))
        self.eps, self.less_one = eps, less_one

    def forward(self, x: Tensor) -> Tensor:
        if self.less_one:
            return F.rms_norm(x.float(), x.shape[-1:], 1 + self.weight.float(), self.eps).to(x.dtype)
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def rotations(
    places: Tensor, width: int, theta: float, dtype: torch.dtype, stretch: tuple | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, 1, L, width) of places (B, L): pair i turns by place / theta^(2 i / width).

    stretch   (factor, low, high, length) of Llama 3.1: pairs that turn less than `low` times over `length` places turn
              `factor` times as slowly, those that turn more than `high` times as ever, and between them it is a mean
    """
    speeds = 1 / theta ** (torch.arange(0, width, 2, device=places.device).float() / width)
    if stretch is not None:
        factor, low, high, length = stretch
        kept = ((length * speeds / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        speeds = kept * speeds + (1 - kept) * speeds / factor
    angles = (places[..., None].float() * speeds).repeat(1, 1, 2)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (i, i + d / 2) of x (B, heads, L, d)."""
    first, second = x.chunk(2, dim=-1)
    return x * turn[0] + torch.cat([-second, first], dim=-1) * turn[1]


class Places(NamedTuple):
    """Where the tokens of a pass stand, and what they see."""

    turn: tuple[Tensor, Tensor]  # `rotations`, (B, 1, L, d) each
    seen: Tensor | None  # bool (B, 1, L, K), True where a token may look; None: at itself and all before it

    def last(self) -> "Places":
        """Of the last token alone. It sees all where nothing says what it sees."""
        cos, sin = self.turn
        return Places((cos[:, :, -1:], sin[:, :, -1:]), None if self.seen is None else self.seen[:, :, -1:])


class Attention(nn.Module):
    """Queries in groups, each with keys and values of its own (Ainslie et al. 2023), turned by their places."""

    def __init__(self, c: DecoderConfig):
        super().__init__()
        bias = c.model_type == "qwen2"
        self.head_dim, self.cap = c.head_dim, c.attn_logit_softcapping
        self.groups = c.num_attention_heads // c.num_key_value_heads
        self.scale = (c.query_pre_attn_scalar or c.head_dim) ** -0.5
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=bias)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x: Tensor, places: Places, cache: Cache | None, layer: int, last: bool) -> Tensor:
        """x (B, L, D) -> the same; `last`: what the last place gathers, (B, 1, D), of the keys and values of all."""
        asking = x[:, -1:] if last else x
        q, k, v = (p(y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for p, y in ((self.q_proj, asking), (self.k_proj, x), (self.v_proj, x)))  # fmt: skip
        k = rotate(k, places.turn)
        turn, seen = places.last() if last else places
        q = rotate(q, turn)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        if self.cap is None and q.shape[2] == 1:  # the heads of a group ask side by side, and nothing is repeated
            q = q.unflatten(1, (-1, self.groups)).squeeze(3)  # (B, key heads, groups, d)
            x = F.scaled_dot_product_attention(q, k, v, seen, scale=self.scale).flatten(1, 2)[:, :, None]
        elif self.cap is None:
            x = F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None, scale=self.scale,
                                               enable_gqa=self.groups > 1)  # fmt: skip
        else:  # cap tanh(score / cap), which no fused attention has
            k, v = (y.repeat_interleave(self.groups, dim=1) for y in (k, v))
            scores = self.cap * torch.tanh(q @ k.mT * self.scale / self.cap)
            scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
            x = scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v
        return self.o_proj(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """down(act(gate x) * up x)."""

    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.activation = ACTIVATIONS[c.hidden_act]
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """x + attention(norm x), x + mlp(norm x); Gemma 2 norms what is added, too."""

    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.gemma = c.model_type == "gemma2"
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, self.gemma)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, self.gemma)
        if self.gemma:
            self.pre_feedforward_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, True)
            self.post_feedforward_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, True)

    def forward(self, x: Tensor, places: Places, cache: Cache | None, layer: int, last: bool = False) -> Tensor:
        """x (B, L, D) -> the same; `last`: the last place alone, (B, 1, D)."""
        added = self.self_attn(self.input_layernorm(x), places, cache, layer, last)
        x = x[:, -1:] if last else x
        if self.gemma:
            x = x + self.post_attention_layernorm(added)
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        x = x + added
        return x + self.mlp(self.post_attention_layernorm(x))


class Stack(nn.Module):
    """What the published names call `model`: all but the head."""

    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, c.model_type == "gemma2")


class Decoder(nn.Module):
    """`decoder(ids, mask)` gives logits (B, L, V) for the token after each."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.model = Stack(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def embed(self, ids: Tensor) -> Tensor:
        """Ids (B, L) -> what the first layer reads (B, L, D), before Gemma's scale."""
        return self.model.embed_tokens(ids)

    def forward(
        self, ids: Tensor, mask: Tensor | None = None, cache: Cache | None = None, last: bool = False
    ) -> Tensor:
        """ids int64 (B, L), or embeddings (B, L, D) in their place; mask bool (B, K), True where there is text, over
        the cached tokens and these; places count text only, so padding on the left changes nothing. None: all is text.

        last   logits of the last place only, (B, 1, V): of the others, the last layer then makes keys and values alone
        """
        c = self.config
        x = self.embed(ids) if ids.dim() == 2 else ids
        before = cache.length if cache is not None else 0
        total = before + x.shape[1]
        columns = torch.arange(total, device=x.device)
        places = columns[None, before:] if mask is None else (mask.long().cumsum(1) - 1).clamp(min=0)[:, before:]
        if c.model_type == "gemma2":
            x = x * torch.tensor(math.sqrt(c.hidden_size), dtype=x.dtype, device=x.device)
        turn = rotations(places, c.head_dim, c.rope_theta, x.dtype, c.rope_stretch)
        rows = columns[before:, None]
        windowed = c.sliding_window is not None and total > c.sliding_window
        if mask is None and c.attn_logit_softcapping is None and not windowed and (not before or len(rows) == 1):
            full = near = None  # the attention knows this one by itself, and is faster for it
        else:
            full = (columns <= rows)[None, None]
            if mask is not None:  # a row of padding sees itself, so that its softmax is one; nothing reads it
                full = (full & mask.bool()[:, None, None]) | (columns == rows)
            near = full & (columns > rows - c.sliding_window) if windowed else full
        for i, layer in enumerate(self.model.layers):
            ends = last and i + 1 == c.num_hidden_layers
            x = layer(x, Places(turn, near if c.windowed(i) else full), cache, i, ends)
        if cache is not None:
            cache.length = total
        x = self.model.norm(x)
        head = self.model.embed_tokens if c.tie_word_embeddings else self.lm_head
        logits = F.linear(x, head.weight)
        cap = c.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)


def sketch(path: str | Path) -> Decoder:
    """The language model of a folder, as its `config.json` describes it, on the meta device. Raises WeightsError."""
    return weights.build(Decoder, DecoderConfig.from_settings(weights.settings(path, "a language model"), str(path)))


def load_decoder(path: str | Path, dtype: torch.dtype | None = None) -> Decoder:
    """The language model of a folder with `config.json` and `model.safetensors` (or shards), in evaluation mode.
    Raises WeightsError."""
    network = sketch(path)
    optional = ("lm_head.weight",) if network.config.tie_word_embeddings else ()
    return weights.load(network, weights.read(path, "model", dtype=dtype), optional).eval()
