"""Kandinsky 3's denoiser: a U-Net of bottleneck blocks that reads the text itself, without a prior.

    unet = load_kandinsky3("weights/kandinsky-community/kandinsky-3/unet", dtype=torch.bfloat16)
    read = unet.read_text(prompt_embeds, attention_mask)  # once for a prompt, not for a step
    epsilon = unet(x, t, **read)

Arkhipkin et al. 2023, section 3; the residual block is BigGAN-deep's (Brock et al. 2019, appendix B): convolutions of
1, 3, 3 and 1, narrow in the middle. Every norm is scaled and shifted by the time. FLAN-UL2's states come in two ways:
pooled into the time embedding, and by cross-attention on all levels but the outermost. Parameter names are the
published ones.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomed import weights
from nanomed.layers.blocks import TimestepEmbedding
from nanomed.layers.convolution import convolve
from nanomed.layers.masks import longest
from nanomed.weights import WeightsError


@dataclass(frozen=True)
class Kandinsky3Config:
    """The shape of the network; the defaults are the published one's."""

    in_channels: int = 4
    time_embedding_dim: int = 1536
    groups: int = 32
    attention_head_dim: int = 64
    layers_per_block: int = 3
    block_out_channels: Sequence[int] = (384, 768, 1536, 3072)
    cross_attention_dim: int = 4096
    encoder_hid_dim: int = 4096  # of the text encoder

    def __post_init__(self) -> None:
        if len(self.block_out_channels) != 4:  # which levels attend is not in the file: (no, yes, yes, yes)
            raise ValueError(f"block_out_channels {tuple(self.block_out_channels)}: Kandinsky 3 has four levels")
        if not isinstance(self.layers_per_block, int) or self.layers_per_block < 2:
            raise ValueError(f"layers_per_block {self.layers_per_block!r}: not a number from 2 on")

    @classmethod
    def from_json(cls, path: str | Path) -> "Kandinsky3Config":
        """Read a published `config.json`, or the one in a folder. What it leaves unsaid is the default; what it says
        and this network has not is refused by name."""
        stated = weights.settings(path, "a Kandinsky 3 U-Net")
        if stated.get("_class_name", "Kandinsky3UNet") != "Kandinsky3UNet":
            raise WeightsError(f"{path}: _class_name is {stated['_class_name']!r}, not 'Kandinsky3UNet'")
        names = {field.name for field in fields(cls)}
        if unknown := sorted(name for name in stated if name not in names and not name.startswith("_")):
            raise WeightsError(f"{path}: {', '.join(unknown)} is not known of a Kandinsky 3 U-Net")
        return weights.configured(cls, path, "a Kandinsky 3 U-Net")


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """[sin(t w), cos(t w)] with w_k = 10000^(-k / (dim/2 - 1)), in float32: t (B,) to (B, dim). The sine first and the
    slowest wave at 1/10000 exactly, unlike the other systems'."""
    half = dim // 2
    w = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - 1))
    angles = t[:, None].float() * w
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


# -------------------------------------------------------------------------------------------------------- convolutions


class TimeNorm(nn.Module):
    """GroupNorm(x) * (1 + scale) + shift, both linear in the time; they begin at 0."""

    def __init__(self, channels: int, time: int, groups: int):
        super().__init__()
        self.groups = groups
        self.context_mlp = nn.Sequential(nn.SiLU(), nn.Linear(time, 2 * channels))
        nn.init.zeros_(self.context_mlp[1].weight)
        nn.init.zeros_(self.context_mlp[1].bias)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:  # x (B, C, H, W), time (B, T) behind its SiLU
        scale, shift = self.context_mlp[1](time)[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(shift, F.group_norm(x, self.groups), 1 + scale)


def halve(channels: int) -> nn.Conv2d:
    """A convolution to half the sides."""
    return nn.Conv2d(channels, channels, 2, stride=2)


def double(channels: int) -> nn.ConvTranspose2d:
    """A transposed convolution to twice the sides."""
    return nn.ConvTranspose2d(channels, channels, 2, stride=2)


class SubBlock(nn.Module):
    """norm -> SiLU -> [twice the size] -> convolution -> [half the size]."""

    def __init__(self, cin: int, cout: int, kernel: int, time: int, groups: int, resample: str = ""):
        super().__init__()
        self.group_norm = TimeNorm(cin, time, groups)
        self.up_sample = double(cin) if resample == "up" else nn.Identity()
        self.projection = nn.Conv2d(cin, cout, kernel, padding=kernel // 2)
        self.down_sample = halve(cout) if resample == "down" else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = self.up_sample(F.silu(self.group_norm(x, time)))
        return self.down_sample(convolve(self.projection, x))


class ResnetBlock(nn.Module):
    """x + four sub-blocks, with kernels of 1, 3, 3, 1 and half of the channels in the middle.

    resample   "up": in the second sub-block, before its convolution; "down": in the third, after it
    """

    def __init__(self, cin: int, cout: int, time: int, groups: int, resample: str = ""):
        super().__init__()
        inner = max(cin, cout) // 2
        self.resnet_blocks = nn.ModuleList([
            SubBlock(cin, inner, 1, time, groups),
            SubBlock(inner, inner, 3, time, groups, resample if resample == "up" else ""),
            SubBlock(inner, inner, 3, time, groups, resample if resample == "down" else ""),
            SubBlock(inner, cout, 1, time, groups),
        ])  # fmt: skip
        self.shortcut_up_sample = double(cin) if resample == "up" else nn.Identity()
        self.shortcut_projection = nn.Conv2d(cin, cout, 1) if cin != cout else None
        self.shortcut_down_sample = halve(cout) if resample == "down" else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = x
        for block in self.resnet_blocks:
            h = block(h, time)
        x = self.shortcut_up_sample(x)
        if self.shortcut_projection is not None:
            x = convolve(self.shortcut_projection, x)
        return self.shortcut_down_sample(x) + h


# ----------------------------------------------------------------------------------------------------------- attention


class Attention(nn.Module):
    """Multi-head attention without a single bias: queries of width `dim`, keys and values of `context`, out `cout`."""

    def __init__(self, dim: int, context: int, cout: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.to_q = nn.Linear(dim, cout, bias=False)
        self.to_k = nn.Linear(context, cout, bias=False)
        self.to_v = nn.Linear(context, cout, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(cout, cout, bias=False)])

    def split(self, x: Tensor) -> Tensor:
        """Channels by heads."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, N, head_dim)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values (B, L, cout) of a context (B, L, context): of a text, the same in every step."""
        return self.to_k(context), self.to_v(context)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (B, N, dim), keys and values (B, L, cout) -> (B, N, cout); bias (B, 1, 1, L) is added to the scores."""
        q = self.split(self.to_q(x))
        out = F.scaled_dot_product_attention(q, self.split(k), self.split(v), attn_mask=bias)
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class AttentionPooling(nn.Module):
    """The text as one vector: what its mean attends to. The mean is over all places, padding included, so the same
    text in a longer row is another vector: rows are cut as the published pipeline cuts them."""

    def __init__(self, time: int, context: int, head_dim: int):
        super().__init__()
        self.attention = Attention(context, context, time, head_dim)

    def forward(self, context: Tensor, bias: Tensor) -> Tensor:  # (B, L, D) -> (B, time)
        return self.attention(context.mean(1, keepdim=True), *self.attention.keys_values(context), bias).squeeze(1)


class AttentionBlock(nn.Module):
    """x + attention(norm(x)), to the pixels themselves or to a text; then x + feed-forward(norm(x))."""

    def __init__(self, channels: int, context: int | None, time: int, groups: int, head_dim: int):
        super().__init__()
        self.in_norm = TimeNorm(channels, time, groups)
        self.attention = Attention(channels, context or channels, channels, head_dim)
        self.out_norm = TimeNorm(channels, time, groups)
        widen = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.feed_forward = nn.Sequential(widen, nn.SiLU(), nn.Conv2d(4 * channels, channels, 1, bias=False))

    def forward(
        self, x: Tensor, time: Tensor, kv: tuple[Tensor, Tensor] | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """x (B, C, H, W); the keys and values of a text, or None: those of the pixels."""
        pixels = self.in_norm(x, time).permute(0, 2, 3, 1).flatten(1, 2)  # (B, HW, C), a view where channels are last
        out = self.attention(pixels, *(kv or self.attention.keys_values(pixels)), bias)
        x = x + out.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        widen, _, narrow = self.feed_forward
        return x + convolve(narrow, F.silu(convolve(widen, self.out_norm(x, time))))


# --------------------------------------------------------------------------------------------------------------- U-Net


class EncoderProjection(nn.Module):
    """T5's states to the U-Net's width."""

    def __init__(self, cin: int, cout: int):
        super().__init__()
        self.projection_linear = nn.Linear(cin, cout, bias=False)
        self.projection_norm = nn.LayerNorm(cout)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, cin) -> (B, L, cout)
        return self.projection_norm(self.projection_linear(x))


class Level(nn.Module):
    """Pairs of residual blocks with cross-attention between them, and self-attention at the narrower end of the level:
    before all pairs on the way down, behind them on the way up. It is `attentions.0` on both ways.

    widths     of each pair: what enters, what is between its two blocks, what leaves
    resample   "down": in the last block; "up": in the first; "" neither
    attends    the outermost level has none of the attention, and nothing in its places
    """

    def __init__(
        self, widths: Sequence[tuple[int, int, int]], way: str, resample: bool, attends: bool, c: Kandinsky3Config
    ):
        super().__init__()
        self.way, self.attends = way, attends
        more = (c.time_embedding_dim, c.groups)
        if attends:
            narrow = widths[0][0] if way == "down" else widths[-1][2]
            blocks = [AttentionBlock(narrow, None, *more, c.attention_head_dim)]
            blocks += [AttentionBlock(w, c.cross_attention_dim, *more, c.attention_head_dim) for _, w, _ in widths]
            self.attentions = nn.ModuleList(blocks)
        first, last = (way == "up" and resample), (way == "down" and resample)
        self.resnets_in = nn.ModuleList([
            ResnetBlock(cin, w, *more, "up" if first and i == 0 else "") for i, (cin, w, _) in enumerate(widths)
        ])  # fmt: skip
        self.resnets_out = nn.ModuleList([
            ResnetBlock(w, cout, *more, "down" if last and i == len(widths) - 1 else "")
            for i, (_, w, cout) in enumerate(widths)
        ])  # fmt: skip

    def forward(self, x: Tensor, time: Tensor, kvs: Iterator[tuple[Tensor, Tensor]], bias: Tensor) -> Tensor:
        """`kvs` are the keys and values of the text, of which every cross-attention takes the next."""
        if self.attends and self.way == "down":
            x = self.attentions[0](x, time)
        for i, (enter, leave) in enumerate(zip(self.resnets_in, self.resnets_out)):
            x = enter(x, time)
            if self.attends:
                x = self.attentions[i + 1](x, time, next(kvs), bias)
            x = leave(x, time)
        if self.attends and self.way == "up":
            x = self.attentions[0](x, time)
        return x


class Kandinsky3UNet(nn.Module):
    """Latents under noise and FLAN-UL2's states to the noise; `unet(x, t, prompt_embeds, attention_mask)`."""

    def __init__(self, config: Kandinsky3Config):
        super().__init__()
        self.config = c = config
        widths, time = list(c.block_out_channels), c.time_embedding_dim
        inner = widths[0] // 2  # of the first and the last convolution
        self.time_embedding = TimestepEmbedding(inner, time)
        self.add_time_condition = AttentionPooling(time, c.cross_attention_dim, c.attention_head_dim)
        self.conv_in = nn.Conv2d(c.in_channels, inner, 3, padding=1)
        self.encoder_hid_proj = EncoderProjection(c.encoder_hid_dim, c.cross_attention_dim)

        n, last = c.layers_per_block, len(widths) - 1
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for i, (cin, cout) in enumerate(zip([inner, *widths], widths)):
            down = [(cin, cout, cout)] + [(cout, cout, cout)] * (n - 1)
            self.down_blocks.append(Level(down, "down", i < last, i > 0, c))
        for i, (cout, cin) in reversed(list(enumerate(zip([inner, *widths], widths)))):
            skip = cin if i < last else 0
            up = [(cin, cin, cin)] * (n - 1) + [(cin, cin, cout)]
            up[0] = (cin + skip, cin + skip, cin)  # its first block still has the skip's channels
            self.up_blocks.append(Level(up, "up", i < last, i > 0, c))
        self.conv_norm_out = nn.GroupNorm(c.groups, inner)
        self.conv_out = nn.Conv2d(inner, c.in_channels, 3, padding=1)

    def read_text(self, prompt_embeds: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Everything the network makes of a text, which is the same at every timestep; differentiable.

        prompt_embeds (B, L, 4096), attention_mask bool (B, L). Returns arguments of `forward`: `kv` (B, L, keys and
        values of all cross-attentions side by side), `pooled` (B, time_embedding_dim) and the `attention_mask`.

        L has a say, through the mean of `AttentionPooling`. A row whose mask is false throughout, as the published
        null text's is, attends to all its places alike.
        """
        text = self.encoder_hid_proj(prompt_embeds.to(self.conv_in.weight.dtype))  # (B, L, D)
        pooled = self.add_time_condition(text, scores_bias(attention_mask, text.dtype))
        kv = [tensor for attention in self._readers() for tensor in attention.keys_values(text)]
        return {"kv": torch.cat(kv, dim=-1), "pooled": pooled, "attention_mask": attention_mask}

    def _readers(self) -> Iterator[Attention]:
        """The cross-attentions in the order they run."""
        for level in [*self.down_blocks, *self.up_blocks]:
            for block in level.attentions[1:] if level.attends else ():
                yield block.attention

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        prompt_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        kv: Tensor | None = None,
        pooled: Tensor | None = None,
    ) -> Tensor:
        """x (B, 4, h, w) with sides that are multiples of 8, t int64 (B,), the text raw or as `read_text` returns it
        -> epsilon (B, 4, h, w)."""
        if kv is None:
            return self(x, t, **self.read_text(prompt_embeds, attention_mask))
        widths = [attention.to_k.out_features for attention in self._readers() for _ in "kv"]
        tensors = iter(kv.split(widths, dim=-1))
        kvs = zip(tensors, tensors)  # in pairs
        bias = scores_bias(attention_mask, x.dtype)
        time = self.time_embedding(sinusoid(t, self.conv_in.out_channels).to(x.dtype)) + pooled
        time = F.silu(time)  # every norm begins with it

        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        skips = []
        for level in self.down_blocks:
            x = level(x, time, kvs, bias)
            skips.append(x)
        x = skips.pop()  # the innermost level's goes straight on
        for i, level in enumerate(self.up_blocks):
            x = level(torch.cat([x, skips.pop()], dim=1) if i else x, time, kvs, bias)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def scores_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention's scores, (B, 1, 1, L), for a mask bool (B, L)."""
    # not minus infinity: a row without any text would be not a number
    return ((1 - mask.to(dtype)) * -10_000.0)[:, None, None, :]


def places(mask: Tensor, most: int) -> int:
    """How long the texts are that the network is given, for a mask (B, L): as the published pipeline cuts them, one
    place of padding behind the longest."""
    return min(longest(mask) + 1, most)


def load_kandinsky3(path: str | Path, dtype: torch.dtype | None = None) -> Kandinsky3UNet:
    """The U-Net of a folder with `config.json` and its weights (one file, shards, or their fp16 variant), in evaluation
    mode. dtype: convert to it while reading; None keeps the file's.

    Raises WeightsError where a file is missing, damaged or of another network.
    """
    unet = weights.build(Kandinsky3UNet, Kandinsky3Config.from_json(path))
    return weights.load(unet, weights.read(path, "diffusion_pytorch_model", dtype=dtype)).eval()
