"""CLIP's text transformer (Radford et al. 2021), with the parameter names of the published checkpoints.

One file serves CLIP ViT-L/14 (MSDM, Stable Diffusion, SDXL), OpenCLIP bigG (Kandinsky 2.2, SDXL) and a tiny one that
trains from scratch. The tables (positions, causal mask) are computed where they are used, so that a model can be
built on the meta device and filled from a file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomed import weights


@dataclass(frozen=True)
class ClipTextConfig:
    """The shape of a CLIP text model; the defaults are those of ViT-L/14."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"  # or "gelu", the exact one
    layer_norm_eps: float = 1e-5
    projection_dim: int = 768  # of `text_projection`, where the model has one

    @classmethod
    def from_json(cls, path: str | Path) -> "ClipTextConfig":
        """Read a published `config.json`: that of a text model, or of a whole CLIP with its `text_config`."""
        unstated = dict(hidden_size=512, intermediate_size=2048, num_attention_heads=8, projection_dim=512)
        return weights.configured(cls, path, "a CLIP", unstated, "text_config")


BIG_G = ClipTextConfig(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu",
    projection_dim=1280,
)  # fmt: skip  # OpenCLIP ViT-bigG/14: Kandinsky 2.2, SDXL


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x): the approximation of GELU that OpenAI's CLIPs were trained with."""
    return x * torch.sigmoid(1.702 * x)


def tanh_gelu(x: Tensor) -> Tensor:
    """GELU by a tanh: SigLIP's."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu, "gelu": F.gelu, "gelu_pytorch_tanh": tanh_gelu,
}  # fmt: skip


class Attention(nn.Module):
    """Multi-head self-attention with a projection each for queries, keys, values and the result."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """x (B, L, D); mask bool, broadcastable to (B, heads, L, L), True where a row may look."""
        split = (self.heads, x.shape[-1] // self.heads)
        q, k, v = (proj(x).unflatten(-1, split).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        x = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)  # (B, heads, L, D / heads)
        return self.out_proj(x.transpose(1, 2).flatten(2))  # (B, L, D)


class MLP(nn.Module):
    """Two layers with an activation between them."""

    def __init__(self, width: int, inner: int, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """x + attention(LN(x)), then x + mlp(LN(x)): both towers of CLIP are stacks of these."""

    def __init__(self, width: int, heads: int, inner: int, act: str, eps: float):
        super().__init__()
        if act not in ACTIVATIONS:
            raise weights.WeightsError(f"hidden_act {act!r} is not one of {', '.join(ACTIVATIONS)}")
        self.self_attn = Attention(width, heads)
        self.layer_norm1 = nn.LayerNorm(width, eps)
        self.mlp = MLP(width, inner, ACTIVATIONS[act])
        self.layer_norm2 = nn.LayerNorm(width, eps)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask, causal)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The layers, of text or of images."""

    def __init__(self, layers: int, width: int, heads: int, inner: int, act: str, eps: float):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, heads, inner, act, eps) for _ in range(layers))


class TextEmbeddings(nn.Module):
    """Tokens and places to vectors."""

    def __init__(self, config: ClipTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]  # (B, L, D)


class TextModel(nn.Module):
    """All of the tower but the projection."""

    def __init__(self, c: ClipTextConfig):
        super().__init__()
        self.embeddings = TextEmbeddings(c)
        self.encoder = Encoder(c.num_hidden_layers, c.hidden_size, c.num_attention_heads, c.intermediate_size,
                               c.hidden_act, c.layer_norm_eps)  # fmt: skip
        self.final_layer_norm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)


class TextStates(NamedTuple):
    """What a text becomes: the published systems differ in which of these they read."""

    last: Tensor  # (B, L, D) after the final LayerNorm: MSDM, Stable Diffusion, Kandinsky 2.2's prior
    penultimate: Tensor  # (B, L, D) before the last layer, without the final LayerNorm: SDXL
    pooled: Tensor  # (B, D) `last` at the end-of-text token
    embeds: Tensor | None  # (B, projection_dim) `pooled` after `text_projection`, not normalised


class ClipText(nn.Module):
    """CLIP's text encoder: `encoder(ids, mask)` gives the last hidden states (B, L, D).

    projection   with `text_projection`, as in checkpoints of a CLIPTextModelWithProjection
    """

    def __init__(self, config: ClipTextConfig, projection: bool = False):
        super().__init__()
        self.config = config
        self.text_model = TextModel(config)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False) if projection else None
        # PyTorch's own start, embeddings of unit variance: from CLIP's 0.02 a small encoder that learns with a denoiser
        # says the same of every prompt for a thousand steps.

    def forward(self, ids: Tensor, mask: Tensor | None = None, every: bool = False) -> "Tensor | TextStates":
        """ids int64 (B, L), mask bool (B, L) or None -> last hidden states (B, L, D), after the final LayerNorm.

        A token sees itself and the tokens before it that the mask leaves. Published systems differ: MSDM gives the
        mask, Stable Diffusion and Kandinsky 2.2 do not. Rows of padding hold something too, but mean nothing.

        every   return all of `TextStates`. The end of text is the first place of the largest id, as in Radford et al.'s
                code: `<|endoftext|>` is the last entry of the vocabulary (`eos_token_id` of published configs is wrong)
        """
        length = ids.shape[1]
        if length > self.config.max_position_embeddings:
            raise ValueError(f"{length} tokens: this CLIP has positions for {self.config.max_position_embeddings}")
        if mask is not None:
            causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
            mask = mask.bool()[:, None, None, :] & causal  # (B, 1, L, L)
        x = penultimate = self.text_model.embeddings(ids)  # (B, L, D)
        for layer in self.text_model.encoder.layers:
            penultimate = x
            x = layer(x, mask, causal=mask is None)
        x = self.text_model.final_layer_norm(x)
        if not every:
            return x
        pooled = x[torch.arange(len(x), device=x.device), ids.argmax(dim=1)]  # (B, D)
        embeds = self.text_projection(pooled) if self.text_projection is not None else None
        return TextStates(x, penultimate, pooled, embeds)

    def features(self, ids: Tensor, mask: Tensor | None = None) -> TextStates:
        """As `forward`, with the penultimate states and the pooled ones."""
        return self(ids, mask, every=True)


def initialise(module: nn.Module) -> None:
    """N(0, 0.02) for every matrix, zero biases: the image tower's start. Draws nothing on meta."""
    if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
        nn.init.normal_(module.weight, std=0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


BARE = ("embeddings.", "encoder.", "final_layer_norm.")  # as transformers 5 writes a text model without projection


def load_clip_text(
    path: str | Path, dtype: torch.dtype | None = None, projection: bool = False
) -> ClipText:
    """The text encoder of a folder with `config.json` and `model.safetensors`: its own, or that of a whole CLIP.

    dtype        convert to it while reading; None keeps the file's
    projection   with `text_projection`

    Raises WeightsError where a file is missing, damaged or of another encoder.
    """
    encoder = weights.build(ClipText, ClipTextConfig.from_json(path), projection)
    if projection:
        return weights.load(encoder, weights.read(path, "model", dtype=dtype)).eval()
    tensors = weights.read(path, "model", prefix=("text_model.", *BARE), dtype=dtype)
    named = {f"text_model.{name}" if name.startswith(BARE) else name: tensor for name, tensor in tensors.items()}
    return weights.load(encoder, named).eval()
