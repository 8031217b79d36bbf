"""The few blocks that the published networks share by name: those of Stable Diffusion's family.

Parameter names are diffusers' (`to_q`, `net.0.proj`, `conv_shortcut`, ...), so the VAEs, PixArt, Kandinsky 2.2, Stable
Diffusion and Hunyuan-DiT load their files without a table of names. CLIP, T5, MSDM and Kandinsky 3 have blocks of their
own. Nothing here knows a schedule, a prompt or a file.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomed.layers.convolution import convolve, convolve_doubled
from nanomed.layers.linear import multiply

# ------------------------------------------------------------------------------------------------------------- time


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """[cos(t w), sin(t w)] with w_k = 10000^(-k / (dim/2)), in float32: t (B,) to (B, dim). The family's common variant
    (diffusers calls it flip_sin_to_cos with a frequency shift of 0)."""
    half = dim // 2
    w = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)  # in this order
    angles = t[:, None].float() * w
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Linear -> SiLU -> Linear on a sinusoid."""

    def __init__(self, cin: int, dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(cin, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, cin) -> (B, dim)
        return self.linear_2(F.silu(self.linear_1(x)))


# -------------------------------------------------------------------------------------------------------- transformer


class Attention(nn.Module):
    """Multi-head attention of tokens x (B, N, dim) to a context (B, L, context), or to themselves.

    bias is that of the query, key and value projections; the output projection always has one.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, context: int | None = None, bias: bool = False):
        super().__init__()
        self.heads = heads
        inner = heads * head_dim
        self.to_q = nn.Linear(dim, inner, bias=bias)
        self.to_k = nn.Linear(context or dim, inner, bias=bias)
        self.to_v = nn.Linear(context or dim, inner, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(inner, dim)])

    def split(self, x: Tensor) -> Tensor:
        """Channels by heads."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, head_dim)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of a context, (B, heads, L, head_dim) each: the same at every step of a sampler."""
        return self.split(multiply(self.to_k, context)), self.split(multiply(self.to_v, context))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        kv: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """mask broadcasts to (B, heads, N, L): true where attention may look, or a float added to the scores. `kv` is
        what `keys_values` made of the context."""
        k, v = self.keys_values(x if context is None else context) if kv is None else kv
        out = F.scaled_dot_product_attention(self.split(multiply(self.to_q, x)), k, v, attn_mask=mask)
        return multiply(self.to_out[0], out.transpose(1, 2).flatten(2))  # type: ignore[arg-type]


class Projected(nn.Module):
    """A linear layer and the activation behind it: `net.0` of a feed-forward."""

    def __init__(self, dim: int, inner: int, activation: str):
        super().__init__()
        self.activation = activation
        self.proj = nn.Linear(dim, inner * (2 if activation == "geglu" else 1))

    def forward(self, x: Tensor) -> Tensor:
        x = multiply(self.proj, x)
        if self.activation == "geglu":  # Shazeer 2020
            x, gate = x.chunk(2, dim=-1)
            return x * F.gelu(gate)
        return F.gelu(x, approximate="tanh" if self.activation == "gelu-tanh" else "none")


class FeedForward(nn.Module):
    """dim -> multiple x dim -> dim. activation: "gelu" (exact), "gelu-tanh" or "geglu"."""

    def __init__(self, dim: int, activation: str, inner: int | None = None):
        super().__init__()
        inner = inner or 4 * dim
        # index 1 is where the family has its dropout, which is 0 in every published network
        self.net = nn.ModuleList([Projected(dim, inner, activation), nn.Identity(), nn.Linear(inner, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return multiply(self.net[2], self.net[0](x))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ convolutions

Norm = Callable[[int], nn.Module]  # channels -> a normalisation


def group_norm(eps: float, groups: int = 32) -> Norm:
    """How to make a U-Net's norms of so many channels."""
    return lambda channels: nn.GroupNorm(groups, channels, eps=eps)


class Downsample(nn.Module):
    """Stride-2 convolution. The autoencoders pad on the right and below only (`asymmetric`), the U-Nets all around."""

    def __init__(self, channels: int, asymmetric: bool = False):
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H/2, W/2)
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, or growth to another size (H', W'), then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:  # (B, C, H, W) -> (B, C, 2H, 2W)
        if size is None or tuple(size) == (2 * x.shape[2], 2 * x.shape[3]):
            return convolve_doubled(self.conv, x)
        return convolve(self.conv, F.interpolate(x, size, mode="nearest"))


class ResnetBlock(nn.Module):
    """norm -> SiLU -> conv, twice, and the input added (through a 1 x 1 convolution where the channels change).

    norm         makes the two normalisations; one that takes a second argument (MoVQ's) gets `zq`
    time         width of the time embedding, 0 = none. It is added between the convolutions, or with `scale_shift`
                 scales and shifts the second norm
    resample     "down" (average pooling) or "up" (nearest) inside the block, on both its branches
    """

    def __init__(self, cin: int, cout: int, norm: Norm, time: int = 0, scale_shift: bool = False, resample: str = ""):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.norm1 = norm(cin)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        if time:
            self.time_emb_proj = nn.Linear(time, 2 * cout if scale_shift else cout)
        self.norm2 = norm(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else None

    def forward(self, x: Tensor, time: Tensor | None = None, zq: Tensor | None = None) -> Tensor:
        more = () if zq is None else (zq,)
        h = F.silu(self.norm1(x, *more))
        x, h = self._resampled(x), self._resampled(h)
        h = convolve(self.conv1, h)
        if time is None:
            h = self.norm2(h, *more)
        else:
            emb = self.time_emb_proj(F.silu(time))[:, :, None, None]
            if self.scale_shift:
                scale, shift = emb.chunk(2, dim=1)
                h = torch.addcmul(shift, self.norm2(h), 1 + scale)
            else:
                h = self.norm2(h + emb)
        h = convolve(self.conv2, F.silu(h))
        return h + (x if self.conv_shortcut is None else convolve(self.conv_shortcut, x))

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return x


class ImageAttention(nn.Module):
    """x + attention over the pixels of a map (B, C, H, W), all biases on.

    added    width of further tokens (B, L, added) that are attended to beside the pixels: Kandinsky's image embedding,
             whose keys and values come first
    """

    def __init__(self, channels: int, norm: Norm, head_dim: int | None = None, added: int = 0):
        super().__init__()
        self.head_dim = head_dim or channels
        self.group_norm = norm(channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        if added:
            self.add_k_proj = nn.Linear(added, channels)
            self.add_v_proj = nn.Linear(added, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def split(self, x: Tensor) -> Tensor:
        """Channels by heads."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, N, head_dim)

    def normed(self, x: Tensor, zq: Tensor | None) -> Tensor:
        """What the pixels are projected of; `zq` is for norms that look at latents."""
        return self.group_norm(x)

    def forward(self, x: Tensor, tokens: Tensor | None = None, zq: Tensor | None = None) -> Tensor:
        pixels = self.normed(x, zq).flatten(2).transpose(1, 2)  # (B, HW, C)
        q, k, v = self.to_q(pixels), self.to_k(pixels), self.to_v(pixels)
        if tokens is not None:
            k = torch.cat([self.add_k_proj(tokens), k], dim=1)  # (B, L + HW, C)
            v = torch.cat([self.add_v_proj(tokens), v], dim=1)
        out = F.scaled_dot_product_attention(self.split(q), self.split(k), self.split(v))
        out = self.to_out[0](out.transpose(1, 2).flatten(2))
        return x + out.transpose(1, 2).unflatten(2, x.shape[2:])
