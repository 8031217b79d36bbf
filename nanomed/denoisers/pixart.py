"""PixArt-alpha's transformer (Chen et al. 2023): a DiT that reads text by cross-attention. Med-Art adapts it.

    transformer = load_pixart("weights/PixArt-alpha/PixArt-XL-2-512x512/transformer")
    text = transformer.read_text(prompt_embeds, attention_mask)     # once a prompt
    out = transformer(x, t, **text)                                 # (B, 8, H, W): epsilon, and a learned variance

XL/2: 28 blocks, 16 heads of 72, 610,856,096 parameters at 512 pixels. The 1024-MS version has embeddings of an image's
size and shape besides (611,349,152). Parameter names are the published ones. Time enters through one linear layer for
all blocks (adaLN-single, section 2.3), to which each block adds a table of its own.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanomed import weights
from nanomed.layers.blocks import Attention, FeedForward, TimestepEmbedding, sinusoid
from nanomed.layers.devices import wide
from nanomed.layers.masks import longest


@dataclass(frozen=True)
class PixArtConfig:
    """The shape of the network; the defaults are those of PixArt-XL-2-512x512."""

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int = 8
    num_layers: int = 28
    sample_size: int = 64  # side of the latents that the positions are made for
    patch_size: int = 2
    caption_channels: int = 4096  # of the text encoder
    interpolation_scale: float | None = None  # divides positions; None: sample_size / 64
    use_additional_conditions: bool | None = None  # size and shape of the image; None: where sample_size is 128

    @classmethod
    def from_json(cls, path: str | Path) -> "PixArtConfig":
        """Read a published `config.json`, or the one in a folder. What it leaves unsaid is the default."""
        return weights.configured(cls, path, "a PixArt transformer")

    @property
    def dim(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def conditioned_on_size(self) -> bool:
        """Whether it is told the size and the shape of an image: the 1024-MS version is."""
        asked = self.use_additional_conditions
        return self.sample_size == 128 if asked is None else asked


# ------------------------------------------------------------------------------------------------------------- inputs


def positions(rows: int, columns: int, dim: int, base: int, scale: float, device=None) -> Tensor:
    """Where a patch is: (rows * columns, dim) float32. The first half of the channels tells the column.

    Each half is [sin(p w), cos(p w)] with w_k = 10000^(-k / (dim/4)). A picture of any size is laid over the grid of
    base x base patches that the network was trained on, and that grid is divided by `scale`. Places are float32 and
    angles float64, as in the published pipelines.
    """
    quarter = dim // 4
    w = 10000 ** -(torch.arange(quarter, dtype=torch.float64, device=wide(device)) / quarter)

    def along(count: int) -> Tensor:
        places = torch.arange(count, dtype=torch.float32, device=device) / (count / base) / scale
        angles = places.to(w)[:, None] * w
        return torch.cat([angles.sin(), angles.cos()], dim=-1).float().to(device=device)  # (count, dim/2)

    column = along(columns).expand(rows, -1, -1)
    row = along(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([column, row], dim=-1).flatten(0, 1)


class PatchEmbed(nn.Module):
    """Patches of the latents to tokens, plus their positions."""

    def __init__(self, c: PixArtConfig):
        super().__init__()
        self.base = c.sample_size // c.patch_size
        self.scale = max(c.sample_size // 64, 1) if c.interpolation_scale is None else c.interpolation_scale
        self.proj = nn.Conv2d(c.in_channels, c.dim, c.patch_size, stride=c.patch_size)

    def forward(self, x: Tensor) -> Tensor:  # (B, 4, H, W) -> (B, N, D)
        x = self.proj(x.contiguous(memory_format=torch.channels_last))  # (B, D, H/p, W/p)
        rows, columns = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2).contiguous()  # else channels stay the outer axis in every sum to come
        return (x + positions(rows, columns, x.shape[-1], self.base, self.scale, x.device)).to(x.dtype)


class TimeAndSize(nn.Module):
    """The embedding of the timestep and, in 1024-MS, of the image's height and width in pixels and their ratio."""

    def __init__(self, c: PixArtConfig):
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(256, c.dim)
        self.sized = c.conditioned_on_size
        if self.sized:
            self.resolution_embedder = TimestepEmbedding(256, c.dim // 3)
            self.aspect_ratio_embedder = TimestepEmbedding(256, c.dim // 3)

    def forward(self, t: Tensor, dtype: torch.dtype, resolution: Tensor | None, aspect_ratio: Tensor | None) -> Tensor:
        emb = self.timestep_embedder(sinusoid(t, 256).to(dtype))  # (B, D)
        if not self.sized:
            return emb
        if resolution is None or aspect_ratio is None:
            raise ValueError("this PixArt wants `resolution` (B, 2), pixels, and `aspect_ratio` (B, 1), height / width")
        sizes = [self.resolution_embedder(sinusoid(side, 256).to(dtype)) for side in resolution.unbind(1)]
        ratio = self.aspect_ratio_embedder(sinusoid(aspect_ratio.flatten(), 256).to(dtype))
        return emb + torch.cat([*sizes, ratio], dim=1)


class AdaLNSingle(nn.Module):
    """Six vectors for all blocks, from the embedding of time: (B, D) to (B, 6, D)."""

    def __init__(self, c: PixArtConfig):
        super().__init__()
        self.emb = TimeAndSize(c)
        self.linear = nn.Linear(c.dim, 6 * c.dim)

    def forward(self, emb: Tensor) -> Tensor:
        return self.linear(F.silu(emb)).unflatten(1, (6, -1))


class CaptionProjection(nn.Module):
    """States of the text encoder (B, L, 4096) to the network's width (B, L, D)."""

    def __init__(self, c: PixArtConfig):
        super().__init__()
        self.linear_1 = nn.Linear(c.caption_channels, c.dim)
        self.linear_2 = nn.Linear(c.dim, c.dim)

    def forward(self, states: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(states), approximate="tanh"))


# ------------------------------------------------------------------------------------------------------------- blocks


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LN(x) (1 + scale) + shift, with x (B, N, D) and shift and scale (B, 1, D)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class Block(nn.Module):
    """x + gate_a attn(LN_a(x)), then x + attn(x, text), then x + gate_m ff(LN_m(x)).

    There is no norm before the attention to text, and no gate behind it.
    """

    def __init__(self, c: PixArtConfig):
        super().__init__()
        heads = dict(heads=c.num_attention_heads, head_dim=c.attention_head_dim, bias=True)
        self.scale_shift_table = nn.Parameter(torch.empty(6, c.dim).normal_(std=c.dim**-0.5))
        self.attn1 = Attention(c.dim, **heads)
        self.attn2 = Attention(c.dim, **heads)
        self.ff = FeedForward(c.dim, "gelu-tanh")

    def forward(self, x: Tensor, time: Tensor, kv: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, N, D), time (B, 6, D), kv (B, 2, L, D), mask (B, 1, 1, L)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (self.scale_shift_table + time).split(1, dim=1)
        k, v = kv.unbind(1)
        x = torch.addcmul(x, gate_a, self.attn1(modulated(x, shift_a, scale_a)))
        x = x + self.attn2(x, mask=mask, kv=(self.attn2.split(k), self.attn2.split(v)))
        return torch.addcmul(x, gate_m, self.ff(modulated(x, shift_m, scale_m)))


class PixArtTransformer(nn.Module):
    """Predict epsilon and a variance from noisy latents, a timestep and the states of T5.

    checkpointing   an attribute to set: blocks forget their activations and compute them again in the backward pass
    """

    def __init__(self, config: PixArtConfig = PixArtConfig()):
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.pos_embed = PatchEmbed(config)
        self.adaln_single = AdaLNSingle(config)
        self.caption_projection = CaptionProjection(config)
        self.transformer_blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.scale_shift_table = nn.Parameter(torch.empty(2, config.dim).normal_(std=config.dim**-0.5))
        self.proj_out = nn.Linear(config.dim, config.patch_size**2 * config.out_channels)

    def read_text(self, prompt_embeds: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Everything the network makes of a prompt, which is the same at every timestep; differentiable.

        prompt_embeds (B, L, 4096), attention_mask (B, L), true at real tokens. Returns the arguments `kv`
        (B, blocks, 2, l, D), keys and values, and `attention_mask` (B, l) of forward. l is the longest text of the
        batch: nothing sees what stands behind it, so it is left out. What guidance puts together must be read together.
        """
        mask, last = attention_mask.bool(), longest(attention_mask)
        text = self.caption_projection(prompt_embeds[:, :last])  # (B, l, D)
        kv = [torch.stack([block.attn2.to_k(text), block.attn2.to_v(text)], 1) for block in self.transformer_blocks]
        return {"kv": torch.stack(kv, dim=1), "attention_mask": mask[:, :last]}

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        prompt_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        resolution: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
        kv: Tensor | None = None,
    ) -> Tensor:
        """x (B, 4, H, W), t int64 (B,), the text raw or as `read_text` returns it; 1024-MS wants `resolution` (B, 2),
        height and width in pixels, and `aspect_ratio` (B, 1), height / width. Returns (B, 8, H, W)."""
        if kv is None:
            text = self.read_text(prompt_embeds, attention_mask)
            kv, attention_mask = text["kv"], text["attention_mask"]
        emb = self.adaln_single.emb(t, x.dtype, resolution, aspect_ratio)  # (B, D)
        time = self.adaln_single(emb)  # (B, 6, D)
        mask = attention_mask[:, None, None]  # (B, 1, 1, l)
        h = self.pos_embed(x)  # (B, N, D)
        for block, block_kv in zip(self.transformer_blocks, kv.unbind(1)):
            if self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, time, block_kv, mask, use_reentrant=False)
            else:
                h = block(h, time, block_kv, mask)
        shift, scale = (self.scale_shift_table + emb[:, None]).split(1, dim=1)  # (B, 1, D) each
        h = self.proj_out(modulated(h, shift, scale))  # (B, N, p p 8)
        p = self.config.patch_size
        h = h.unflatten(2, (p, p, -1)).unflatten(1, (x.shape[2] // p, -1))  # (B, H/p, W/p, p, p, 8)
        return h.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, 8, H, W)


# ----------------------------------------------------------------------------------------------------------- the files

OPTIONAL = ("caption_projection.y_embedding",)  # the null text of PixArt's own training, which T5 of "" has replaced


def load_pixart(path: str | Path, dtype: torch.dtype | None = None) -> PixArtTransformer:
    """The transformer of a folder with `config.json` and its weights (one file, shards, or their fp16 variant), in
    evaluation mode. dtype: convert to it while reading; None keeps the file's.

    Raises WeightsError where a file is missing, damaged or of another transformer.
    """
    transformer = weights.build(PixArtTransformer, PixArtConfig.from_json(path))
    return weights.load(transformer, weights.read(path, "diffusion_pytorch_model", dtype=dtype), OPTIONAL).eval()
