"""Hunyuan-DiT (Li et al. 2024): a transformer with long skips that reads Chinese and English from two text encoders.

    transformer = load_hunyuan("weights/Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers/transformer")
    text = transformer.read_text(bert, bert_mask, t5, t5_mask)  # once a prompt
    out = transformer(x, t, **text)                             # (B, 8, H, W): v, and a half that nothing uses

40 blocks, 16 heads of 88, 1.5 billion parameters. Parameter names are diffusers'. v1.1 is conditioned on the image's
size and a style besides, v1.2 is not; the file's `config.json` says which it is. Places are rotations of queries and
keys, so that there is no table of positions, and any size is laid over the grid the network was trained on.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanomed import weights
from nanomed.layers.blocks import FeedForward, TimestepEmbedding, sinusoid
from nanomed.weights import WeightsError


@dataclass(frozen=True)
class HunyuanConfig:
    """The shape of the network; the defaults are those of v1.2."""

    num_attention_heads: int = 16
    attention_head_dim: int = 88
    in_channels: int = 4
    patch_size: int = 2
    sample_size: int = 128  # side of the latents that it draws where none is said
    num_layers: int = 40
    mlp_ratio: float = 4.3637
    learn_sigma: bool = True
    cross_attention_dim: int = 1024  # of BERT, and of what becomes of T5
    cross_attention_dim_t5: int = 2048
    pooled_projection_dim: int = 1024
    text_len: int = 77
    text_len_t5: int = 256
    use_style_cond_and_image_meta_size: bool = False  # v1.1

    @classmethod
    def from_json(cls, path: str | Path) -> "HunyuanConfig":
        """Read a published `config.json`, or the one in a folder. What it leaves unsaid is what diffusers means."""
        unsaid = dict(sample_size=32, num_layers=28, mlp_ratio=4.0, use_style_cond_and_image_meta_size=True)
        config = weights.configured(cls, path, "a Hunyuan-DiT", unsaid)
        stated = weights.settings(path, "a Hunyuan-DiT")
        known = dict(activation_fn="gelu-approximate", norm_type="layer_norm", hidden_size=config.dim)
        for name, value in known.items():
            if stated.get(name, value) != value:
                raise WeightsError(f"{path}: a Hunyuan-DiT with {name} = {stated[name]!r} is not known, only {value!r}")
        if config.num_layers % 2:
            raise WeightsError(f"{path}: num_layers = {config.num_layers}, but the skips pair the layers of two halves")
        return config

    @property
    def dim(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def out_channels(self) -> int:
        """Those of the prediction, and as many of its variance where it is learned."""
        return self.in_channels * (2 if self.learn_sigma else 1)


# ------------------------------------------------------------------------------------------------------------- inputs


def rotary(rows: int, columns: int, dim: int, base: int, device=None) -> Tensor:
    """The turns of a patch's queries and keys, complex64 (rows * columns, dim/2): half of the pairs of a head turn by
    the column, the other half by the row, at frequencies 10000^(-k / (dim/4)).

    The picture is fitted into the middle of base x base places, the longer side filling it. Where the shorter side
    begins off the edge, its places reach a little less far than they should (stop (n-1)/n is counted from the edge):
    as published, and as trained.
    """
    high = base if rows > columns else round(base / columns * rows)
    wide = round(base / rows * columns) if rows > columns else base

    def along(count: int, extent: int) -> Tensor:
        start = round((base - extent) / 2)
        stop = (start + extent) * (count - 1) / count
        places = torch.linspace(start, stop, count, dtype=torch.float32, device=device)
        w = 1 / 10000 ** (torch.arange(0, dim // 2, 2, dtype=torch.float32, device=device) / (dim // 2))
        return torch.outer(places, w)  # (count, dim/4)

    column = along(columns, wide).expand(rows, -1, -1)
    row = along(rows, high)[:, None].expand(-1, columns, -1)
    angles = torch.cat([column, row], dim=-1).flatten(0, 1)
    return torch.complex(angles.cos(), angles.sin())


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """x (B, heads, N, head_dim), whose neighbouring channels are pairs, turned by (N, head_dim/2); in float32."""
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    return torch.view_as_real(torch.view_as_complex(pairs) * turns).flatten(-2).to(x.dtype)


class Projection(nn.Module):
    """Linear -> SiLU -> Linear."""

    def __init__(self, cin: int, inner: int, cout: int):
        super().__init__()
        self.linear_1 = nn.Linear(cin, inner)
        self.linear_2 = nn.Linear(inner, cout)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class AttentionPool(nn.Module):
    """One vector of T5's states (B, L, D): their mean asks all of them, and itself, in 8 heads. Padding takes part."""

    def __init__(self, length: int, dim: int, cout: int):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.empty(length + 1, dim).normal_(std=dim**-0.5))
        self.k_proj = nn.Linear(dim, dim)
        self.q_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.c_proj = nn.Linear(dim, cout)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D) -> (B, cout)
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.positional_embedding.to(x.dtype)  # (B, 1 + L, D)
        q, k, v = self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)
        q, k, v = (y.unflatten(-1, (8, -1)).transpose(1, 2) for y in (q, k, v))
        return self.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1))


class TimeAndMore(nn.Module):
    """The vector that conditions all blocks: time + the pooled text, in v1.1 with the image's sizes and style."""

    def __init__(self, c: HunyuanConfig):
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(256, c.dim)
        self.pooler = AttentionPool(c.text_len_t5, c.cross_attention_dim_t5, c.pooled_projection_dim)
        self.sized = c.use_style_cond_and_image_meta_size
        if self.sized:
            self.style_embedder = nn.Embedding(1, c.dim)
        width = c.pooled_projection_dim + (6 * 256 + c.dim if self.sized else 0)
        self.extra_embedder = Projection(width, 4 * c.dim, c.dim)

    def extra(self, t5: Tensor, sizes: Tensor | None) -> Tensor:
        """What does not depend on time, (B, D). sizes (B, 6); the style is 0, the only one there is."""
        pooled = self.pooler(t5)
        if not self.sized:
            return self.extra_embedder(pooled)
        if sizes is None:
            raise ValueError(
                "this Hunyuan-DiT (v1.1) wants `sizes` (B, 6), in pixels: height and width of the original, height and "
                "width of the target, top and left of the crop"
            )
        sizes = sinusoid(sizes.flatten(), 256).to(pooled.dtype).view(len(pooled), -1)  # (B, 1536)
        style = self.style_embedder.weight.expand(len(pooled), -1)  # (B, D)
        return self.extra_embedder(torch.cat([pooled, sizes, style], dim=1))


# ------------------------------------------------------------------------------------------------------------- blocks


class Attention(nn.Module):
    """Attention whose queries and keys are normalised in each head, to tokens of width `context` or to themselves."""

    def __init__(self, c: HunyuanConfig, context: int):
        super().__init__()
        self.heads = c.num_attention_heads
        self.norm_q = nn.LayerNorm(c.attention_head_dim, eps=1e-6)
        self.norm_k = nn.LayerNorm(c.attention_head_dim, eps=1e-6)
        self.to_q = nn.Linear(c.dim, c.dim)
        self.to_k = nn.Linear(context, c.dim)
        self.to_v = nn.Linear(context, c.dim)
        self.to_out = nn.ModuleList([nn.Linear(c.dim, c.dim)])

    def split(self, x: Tensor) -> Tensor:
        """Channels by heads."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, head_dim)

    def keys_values(self, context: Tensor) -> Tensor:
        """(B, L, context) to keys and values, (B, 2, heads, L, head_dim)."""
        return torch.stack([self.norm_k(self.split(self.to_k(context))), self.split(self.to_v(context))], dim=1)

    def forward(self, x: Tensor, turns: Tensor, kv: Tensor | None = None) -> Tensor:
        """x (B, N, D); turns of the places of x; kv of a text, whose keys have no place. None: of x."""
        if kv is None:
            k, v = turned(self.norm_k(self.split(self.to_k(x))), turns), self.split(self.to_v(x))
        else:
            k, v = kv.unbind(1)
        q = turned(self.norm_q(self.split(self.to_q(x))), turns)
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ShiftedNorm(nn.Module):
    """LN(x) + linear(SiLU(cond)): a shift, no scale and no gate."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        return self.norm(x) + self.linear(F.silu(cond))[:, None]


class Block(nn.Module):
    """x + attn(LN(x) + shift), then x + attn(LN(x), text), then x + ff(LN(x)). In the second half of the network, x is
    made of itself and of what the block at the mirrored place has left: linear(LN([x, skip]))."""

    def __init__(self, c: HunyuanConfig, skip: bool):
        super().__init__()
        self.norm1 = ShiftedNorm(c.dim)
        self.attn1 = Attention(c, c.dim)
        self.norm2 = nn.LayerNorm(c.dim, eps=1e-6)
        self.attn2 = Attention(c, c.cross_attention_dim)
        self.norm3 = nn.LayerNorm(c.dim, eps=1e-6)
        self.ff = FeedForward(c.dim, "gelu-tanh", int(c.dim * c.mlp_ratio))
        if skip:
            self.skip_norm = nn.LayerNorm(2 * c.dim, eps=1e-6)
            self.skip_linear = nn.Linear(2 * c.dim, c.dim)

    def forward(self, x: Tensor, cond: Tensor, turns: Tensor, kv: Tensor, skip: Tensor | None = None) -> Tensor:
        """x and skip (B, N, D), cond (B, D), turns (N, head_dim/2), kv (B, 2, heads, L, head_dim)."""
        if skip is not None:
            x = self.skip_linear(self.skip_norm(torch.cat([x, skip], dim=-1)))
        x = x + self.attn1(self.norm1(x, cond), turns)
        x = x + self.attn2(self.norm2(x), turns, kv)
        return x + self.ff(self.norm3(x))


class PatchEmbed(nn.Module):
    """Patches of the latents to tokens, row by row."""

    def __init__(self, c: HunyuanConfig):
        super().__init__()
        self.proj = nn.Conv2d(c.in_channels, c.dim, c.patch_size, stride=c.patch_size)

    def forward(self, x: Tensor) -> Tensor:  # (B, 4, H, W) -> (B, N, D)
        x = self.proj(x.contiguous(memory_format=torch.channels_last))
        return x.flatten(2).transpose(1, 2).contiguous()


class ModulatedNorm(nn.Module):
    """LN(x) (1 + scale) + shift, both from linear(SiLU(cond)), the scale first."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        scale, shift = self.linear(F.silu(cond))[:, None].chunk(2, dim=-1)
        return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class HunyuanTransformer(nn.Module):
    """Predict v from noisy latents, a timestep, and the states of BERT and T5.

    checkpointing   an attribute to set: blocks forget their activations and compute them again in the backward pass
    """

    def __init__(self, config: HunyuanConfig = HunyuanConfig()):
        super().__init__()
        self.config = c = config
        self.checkpointing = False
        self.text_embedder = Projection(c.cross_attention_dim_t5, 4 * c.cross_attention_dim_t5, c.cross_attention_dim)
        self.text_embedding_padding = nn.Parameter(
            torch.empty(c.text_len + c.text_len_t5, c.cross_attention_dim).normal_()
        )
        self.pos_embed = PatchEmbed(c)
        self.time_extra_emb = TimeAndMore(c)
        self.blocks = nn.ModuleList([Block(c, skip=i > c.num_layers // 2) for i in range(c.num_layers)])
        self.norm_out = ModulatedNorm(c.dim)
        self.proj_out = nn.Linear(c.dim, c.patch_size**2 * c.out_channels)

    def read_text(
        self, bert: Tensor, bert_mask: Tensor, t5: Tensor, t5_mask: Tensor, sizes: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Everything the network makes of a prompt, which is the same at every timestep; differentiable.

        bert (B, 77, 1024) and t5 (B, 256, 2048), states of exactly these lengths, and masks (B, 77) and (B, 256), true
        at real tokens. For the cross-attention a learned embedding stands where a mask is false; the vector that is
        pooled of T5's states is of all places, so they must be the encoder's own at padding too. v1.1 wants `sizes`
        (B, 6), see `sizes_of`. Returns the arguments `kv` (B, blocks, 2, heads, 333, 88) and `extra` (B, D) of forward.
        """
        states = torch.cat([bert, self.text_embedder(t5)], dim=1)  # (B, 333, 1024)
        mask = torch.cat([bert_mask, t5_mask], dim=1).bool()
        if states.shape[1:] != self.text_embedding_padding.shape or mask.shape != states.shape[:2]:
            c = self.config
            raise ValueError(
                f"text of {bert.shape[1]} and {t5.shape[1]} places, but this Hunyuan-DiT reads {c.text_len} of BERT "
                f"and {c.text_len_t5} of T5"
            )
        states = torch.where(mask[..., None], states, self.text_embedding_padding.to(states.dtype))
        kv = torch.stack([block.attn2.keys_values(states) for block in self.blocks], dim=1)
        return {"kv": kv, "extra": self.time_extra_emb.extra(t5, sizes)}

    def sizes_of(self, height: int, width: int, rows: int = 1) -> Tensor:
        """The `sizes` that v1.1 is drawn with for images of height x width: said to come from an original of
        1024 x 1024 that nothing was cut from. float32 (rows, 6)."""
        sizes = [1024.0, 1024.0, float(height), float(width), 0.0, 0.0]
        return torch.tensor([sizes] * rows, device=self.proj_out.weight.device)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        bert: Tensor | None = None,
        bert_mask: Tensor | None = None,
        t5: Tensor | None = None,
        t5_mask: Tensor | None = None,
        sizes: Tensor | None = None,
        kv: Tensor | None = None,
        extra: Tensor | None = None,
    ) -> Tensor:
        """x (B, 4, H, W) with even H and W, t int64 (B,), the text raw or as `read_text` returns it. Returns
        (B, 8, H, W), of which the first four channels are v."""
        if kv is None:
            text = self.read_text(bert, bert_mask, t5, t5_mask, sizes)
            kv, extra = text["kv"], text["extra"]
        p = self.config.patch_size
        rows, columns = x.shape[2] // p, x.shape[3] // p
        turns = rotary(rows, columns, self.config.attention_head_dim, 64 // p, x.device)  # trained on 512 pixels
        cond = self.time_extra_emb.timestep_embedder(sinusoid(t, 256).to(x.dtype)) + extra  # (B, D)
        h, skips, half = self.pos_embed(x), [], self.config.num_layers // 2
        for i, (block, block_kv) in enumerate(zip(self.blocks, kv.unbind(1))):
            skip = (skips.pop(),) if i > half else ()
            if self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, cond, turns, block_kv, *skip, use_reentrant=False)
            else:
                h = block(h, cond, turns, block_kv, *skip)
            if i < half - 1:
                skips.append(h)
        h = self.proj_out(self.norm_out(h, cond))  # (B, N, p p 8)
        h = h.unflatten(2, (p, p, -1)).unflatten(1, (rows, columns))  # (B, H/p, W/p, p, p, 8)
        return h.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, 8, H, W)


# ----------------------------------------------------------------------------------------------------------- the files


def load_hunyuan(path: str | Path, dtype: torch.dtype | None = None) -> HunyuanTransformer:
    """The transformer of a folder with `config.json` and its weights (one file, shards, or their fp16 variant), in
    evaluation mode. dtype: convert to it while reading; None keeps the file's.

    Raises WeightsError where a file is missing, damaged, of another transformer, or asks for what is not known.
    """
    transformer = weights.build(HunyuanTransformer, HunyuanConfig.from_json(path))
    return weights.load(transformer, weights.read(path, "diffusion_pytorch_model", dtype=dtype)).eval()
