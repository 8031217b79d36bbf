"""T5's encoder (Raffel et al. 2020), with the parameter names of the published checkpoints.

One file serves T5 v1.0 (ReLU), v1.1 and mT5 (gated GELU; PixArt-alpha, Med-Art, Hunyuan-DiT) and FLAN-UL2 (gated
SiLU; Kandinsky 3). Relative positions are computed where they are used, so that a model can be built on the meta
device and filled from a file:

    encoder = load_t5("weights/PixArt-alpha/PixArt-XL-2-512x512/text_encoder", dtype=torch.bfloat16)
    ids, mask = tokenizer(prompts)
    states = encoder(ids, mask)          # (B, L, D), rows of padding as the published systems have them
    states = encoder.trimmed(ids, mask)  # the same at text and zero at padding, in less time
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanomed import weights
from nanomed.layers.devices import wide
from nanomed.layers.masks import longest
from nanomed.weights import WeightsError


@dataclass(frozen=True)
class T5Config:
    """The shape of a T5; the defaults are those of v1.1-XXL."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64  # of a head; num_heads * d_kv need not be d_model
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"  # v1.1 and mT5; "relu": v1.0; "gated-silu": FLAN-UL2

    @classmethod
    def from_json(cls, path: str | Path) -> "T5Config":
        """Read a published `config.json`, or the one in a folder. What it leaves unsaid is that of t5-small."""
        unsaid = dict(d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, feed_forward_proj="relu")
        return weights.configured(cls, path, "a T5", unsaid)


FLAN_UL2 = T5Config(d_kv=256, d_ff=16384, num_layers=32, num_heads=16, feed_forward_proj="gated-silu")  # Kandinsky 3

def gelu(x: Tensor) -> Tensor:
    """The tanh approximation of GELU."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gated-gelu": gelu, "gated-silu": F.silu}


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps) * weight, in float32 whatever the weights are."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(self.weight.dtype)


class SelfAttention(nn.Module):
    """Multi-head attention without biases and without the division by sqrt(d_kv), which the initialisation absorbs."""

    def __init__(self, c: T5Config, relative: bool):
        super().__init__()
        self.d_kv, self.furthest = c.d_kv, c.relative_attention_max_distance
        self.q = nn.Linear(c.d_model, c.num_heads * c.d_kv, bias=False)
        self.k = nn.Linear(c.d_model, c.num_heads * c.d_kv, bias=False)
        self.v = nn.Linear(c.d_model, c.num_heads * c.d_kv, bias=False)
        self.o = nn.Linear(c.num_heads * c.d_kv, c.d_model, bias=False)
        if relative:  # the first layer's serves all layers
            self.relative_attention_bias = nn.Embedding(c.relative_attention_num_buckets, c.num_heads)

    def position_bias(self, length: int, mask: Tensor | None = None) -> Tensor:
        """(1, heads, L, L): what the distance from row (query) to column (key) adds to a score; with a mask bool
        (B, L), (B, heads, L, L) with the lowest number in the columns that it leaves out."""
        table = self.relative_attention_bias
        distances = torch.arange(1 - length, length, device=table.weight.device)  # (2 L - 1)
        buckets = relative_buckets(distances, table.num_embeddings, self.furthest)
        # a row of (L, L) is a window of the 2 L - 1 distances, that of the first row being the last one
        bias = table(buckets).T.unfold(1, length, 1).flip(1)[None]
        if mask is None:
            return bias
        lowest = max(torch.finfo(bias.dtype).min, torch.finfo(torch.bfloat16).min)  # finite in bfloat16 autocast, too
        return bias.masked_fill(~mask.bool()[:, None, None, :], lowest)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (B, L, D); bias (1 or B, heads, L, L) is added to the scores."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.d_kv)).transpose(1, 2) for proj in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), scale=1.0)  # (B, heads, L, d_kv)
        return self.o(x.transpose(1, 2).flatten(2))  # (B, L, D)


class DenseReluDense(nn.Module):
    """wo(act(wi x)), or wo(act(wi_0 x) * wi_1 x) where the feed-forward is gated."""

    def __init__(self, c: T5Config):
        super().__init__()
        if c.feed_forward_proj not in ACTIVATIONS:
            raise WeightsError(f"feed_forward_proj {c.feed_forward_proj!r} is not one of {', '.join(ACTIVATIONS)}")
        self.activation = ACTIVATIONS[c.feed_forward_proj]
        self.gated = c.feed_forward_proj.startswith("gated-")
        if self.gated:
            self.wi_0 = nn.Linear(c.d_model, c.d_ff, bias=False)
            self.wi_1 = nn.Linear(c.d_model, c.d_ff, bias=False)
        else:
            self.wi = nn.Linear(c.d_model, c.d_ff, bias=False)
        self.wo = nn.Linear(c.d_ff, c.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.wi_0(x)) * self.wi_1(x) if self.gated else self.activation(self.wi(x))  # (B, L, d_ff)
        return self.wo(x.to(self.wo.weight.dtype))  # (B, L, D)


class AttentionLayer(nn.Module):
    """Attention and the norm before it."""

    def __init__(self, c: T5Config, relative: bool):
        super().__init__()
        self.SelfAttention = SelfAttention(c, relative)
        self.layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon)


class FeedForwardLayer(nn.Module):
    """The feed-forward network and the norm before it."""

    def __init__(self, c: T5Config):
        super().__init__()
        self.DenseReluDense = DenseReluDense(c)
        self.layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)). The first makes the bias, the others are given it."""

    def __init__(self, c: T5Config, relative: bool):
        super().__init__()
        self.layer = nn.ModuleList([AttentionLayer(c, relative), FeedForwardLayer(c)])

    def forward(self, x: Tensor, bias: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        attention, feed_forward = self.layer
        if bias is None:
            bias = attention.SelfAttention.position_bias(x.shape[1], mask)
        x = x + attention.SelfAttention(attention.layer_norm(x), bias)
        return x + feed_forward.DenseReluDense(feed_forward.layer_norm(x)), bias


class Stack(nn.Module):
    """The blocks and the last norm."""

    def __init__(self, c: T5Config):
        super().__init__()
        self.block = nn.ModuleList(Block(c, relative=i == 0) for i in range(c.num_layers))
        self.final_layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon)


class T5Encoder(nn.Module):
    """`encoder(ids, mask)` gives the last hidden states (B, L, D), after the final norm.

    There is no dropout: the published systems, Med-Art's tuned T5 included, run it in evaluation mode.

    checkpointing   an attribute to set: layers forget their activations and compute them again in the backward pass
    """

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config)
        self.initialise()

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """ids int64 (B, L), mask bool (B, L) or None -> last hidden states (B, L, D).

        A token sees those that the mask leaves, on either side. Rows of padding hold something too: what their place
        sees of the text, exactly as in the published systems.

        Raises ValueError in float16 unless every `wo` is float32 (see `half`).
        """
        self._refuse_float16(ids.device.type)
        x, bias = self.shared(ids), None  # (B, L, D)
        for block in self.encoder.block:
            if self.checkpointing and torch.is_grad_enabled():
                x, bias = checkpoint(block, x, bias, mask, use_reentrant=False)
            else:
                x, bias = block(x, bias, mask)
        return self.encoder.final_layer_norm(x)

    def trimmed(self, ids: Tensor, mask: Tensor, multiple: int = 8) -> Tensor:
        """As `forward` where the mask is true, and zero where it is not; the time is that of the longest text.

        Nothing sees padding, so what stands behind the longest text of the batch need not be computed: of captions
        with 40 to 90 tokens that are padded to 120, a third or more. The length that is computed is rounded up to
        `multiple`, so that few shapes occur.

        Exact for whatever reads the states through the same mask (the cross-attention of PixArt). Where rows
        of padding themselves are read (a mean over all rows, as in Hunyuan-DiT), call `forward`.
        """
        length = ids.shape[1]
        used = min(-(-longest(mask) // multiple) * multiple, length)
        ids, mask = (tensor[:, :used].to(self.shared.weight.device) for tensor in (ids, mask))
        states = self(ids, mask)  # (B, used, D)
        states = states.masked_fill(~mask[..., None].bool(), 0)
        return F.pad(states, (0, 0, 0, length - used))  # (B, L, D)

    def half(self) -> "T5Encoder":
        """float16, but for the `wo` of every feed-forward, which stays (or becomes) float32.

        T5 was trained in bfloat16, and what enters and leaves `wo` goes beyond the 65,504 of float16.
        """
        for name, parameter in self.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if name.endswith(WO) else torch.float16)
        return self

    def _refuse_float16(self, device: str) -> None:
        dtypes = {block.layer[1].DenseReluDense.wo.weight.dtype for block in self.encoder.block}
        if torch.is_autocast_enabled(device):
            dtypes = {torch.get_autocast_dtype(device)}
        if torch.float16 in dtypes:
            raise ValueError(
                "T5 in float16 overflows in the feed-forward's wo: take bfloat16, or encoder.half(), which keeps wo in "
                "float32 (and no float16 autocast)"
            )

    def initialise(self) -> None:
        """The normal draws of Raffel et al.'s code (Mesh TensorFlow), for training from scratch; none on meta."""
        c = self.config
        inner = c.num_heads * c.d_kv
        variances = {"shared": 1.0, "q": 1 / (c.d_model * c.d_kv), "o": 1 / inner, "wo": 1 / c.d_ff}
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                variance = variances.get(name.rpartition(".")[2], 1 / c.d_model)
                nn.init.normal_(module.weight, std=math.sqrt(variance))


def relative_buckets(distance: Tensor, buckets: int = 32, furthest: int = 128) -> Tensor:
    """The bucket of a distance (key - query), any shape: half of the buckets for keys behind the query.

    Of each half, the first half is for one distance each, the rest grows by a constant factor up to `furthest`.
    """
    side = buckets // 2
    near = side // 2
    away = distance.abs()
    # the boundaries are powers that float32 meets exactly on some devices only: a hair above them rounds alike on all
    exact = away.clamp(min=1).to(wide(away.device), torch.float64)
    grown = torch.log(exact / near) / math.log(furthest / near) * (side - near)
    far = (near + (grown + 1e-9).long()).clamp(max=side - 1).to(away.device)
    return torch.where(away < near, away, far) + side * (distance > 0)


# ----------------------------------------------------------------------------------------------------------- the files

WO = "DenseReluDense.wo.weight"
EMBEDDINGS = "encoder.embed_tokens.weight"  # what some files call `shared.weight`, or repeat it as


def encoder_half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the tensors of a T5 file those of the encoder, under the names of T5Encoder: no decoder, no head, one
    embedding. Anything else stays, for `weights.load` to judge."""
    kept = {name: t for name, t in tensors.items() if not name.startswith(("decoder.", "lm_head."))}
    repeated = kept.pop(EMBEDDINGS, None)
    if repeated is not None:
        kept.setdefault("shared.weight", repeated)
    return kept


def load_t5(path: str | Path, dtype: torch.dtype | None = None) -> T5Encoder:
    """The encoder of a folder with `config.json` and `model.safetensors` (one file, shards, or their fp16 variant; of
    a whole T5 too), in evaluation mode.

    dtype   convert to it while reading; None keeps the file's. In float16, `wo` is float32 all the same.

    Raises WeightsError where a file is missing, damaged or of another T5.
    """
    path = Path(path)
    encoder = weights.build(T5Encoder, T5Config.from_json(path))
    tensors = weights.read(path, "model", prefix="encoder.", dtype=dtype)
    if EMBEDDINGS not in tensors:
        tensors |= weights.read(path, "model", prefix="shared.", dtype=dtype)
    for name in [name for name, tensor in tensors.items() if name.endswith(WO) and tensor.dtype == torch.float16]:
        tensors |= weights.read(path, "model", prefix=name, dtype=torch.float32)
    return weights.load(encoder, encoder_half(tensors)).eval()
