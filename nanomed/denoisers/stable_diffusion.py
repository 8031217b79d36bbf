"""Stable Diffusion's U-Net with text cross-attention (Rombach et al. 2022; SDXL: Podell et al. 2023).

    unet = load_stable_diffusion("weights/stable-diffusion-v1-5/unet")
    text = unet.read_text(prompt_embeds)                # once a prompt; SDXL: with text_embeds and time_ids
    epsilon = unet(x, t, **text)                        # (B, 4, H, W)

    SD 1.x   320 @64 -> 640 @32 -> 1280 @16 -> 1280 @8, 8 heads, one transformer block a place          859,520,964
    SDXL     320 @128 -> 640 @64 -> 1280 @32, heads of 64, transformers of 2 and 10 blocks           2,567,463,684

One class serves both, for a config.json says all that sets them apart. Parameter names are the published ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanomed import weights
from nanomed.layers.blocks import (
    Attention,
    Downsample,
    FeedForward,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    group_norm,
    sinusoid,
)
from nanomed.layers.convolution import convolve
from nanomed.layers.linear import multiply

DOWN = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}  # kinds of level by name: does it read text?
UP = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
# Settings beside those below, each with the values that leave the network what it is here.
NEUTRAL: dict[str, tuple] = {
    "act_fn": ("silu", "swish"),
    "attention_type": ("default",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "downsample_padding": (1,),
    "dropout": (0,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "resnet_out_scale_factor": (1,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
}
IGNORED = ("addition_embed_type_num_heads",)  # of an embedding that none of these networks has


@dataclass(frozen=True)
class StableDiffusionConfig:
    """The shape of the network; the defaults are those of Stable Diffusion 1.x.

    Levels go from the outermost inwards; where one number is given for them, it holds for all. The published name
    `attention_head_dim` is a misnomer: it is the number of heads, and a head is as wide as the level allows.
    """

    sample_size: int = 64  # side of the latents that the network was trained on; nothing is built from it
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: Sequence[int] = (320, 640, 1280, 1280)
    down_block_types: Sequence[str] = (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D")
    up_block_types: Sequence[str] = ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3)  # from the innermost outwards
    layers_per_block: int = 2
    attention_head_dim: int | Sequence[int] = 8  # the number of heads
    transformer_layers_per_block: int | Sequence[int] = 1
    cross_attention_dim: int = 768  # width of the text's states
    use_linear_projection: bool = False  # around the transformers; else 1 x 1 convolutions, the same numbers
    addition_embed_type: str | None = None  # "text_time": pooled text and sizes of the image join the timestep
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    norm_num_groups: int = 32
    norm_eps: float = 1e-5

    @classmethod
    def from_json(cls, path: str | Path) -> "StableDiffusionConfig":
        """Read a published `config.json`, or the one in a folder. What it asks for and is not here is refused by name.

        Raises WeightsError."""
        what, known = "a U-Net of Stable Diffusion's", {field.name for field in fields(cls)}
        for name, value in weights.settings(path, what).items():
            if name in known or name in IGNORED or name.startswith("_"):
                continue
            if value not in NEUTRAL[name] if name in NEUTRAL else value:  # what is off (null, false, 0) builds nothing
                raise weights.WeightsError(f"{path}: {name} = {value!r} is not known here")
        return weights.configured(cls, path, what, {"cross_attention_dim": 1280})

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types", "attention_head_dim", "transformer_layers_per_block"):
            value = getattr(self, name)
            if not isinstance(value, int) and (len(value) != levels or any(isinstance(v, list) for v in value)):
                raise weights.WeightsError(f"{name} = {value!r}: there are {levels} levels")
        if not isinstance(self.layers_per_block, int) or not isinstance(self.cross_attention_dim, int):
            raise weights.WeightsError("layers_per_block and cross_attention_dim are one number for all levels here")
        for kinds, kind in ((DOWN, self.down_block_types), (UP, self.up_block_types)):
            if odd := [name for name in kind if name not in kinds]:
                raise weights.WeightsError(f"a level of kind {odd[0]!r} is not one of {', '.join(kinds)}")
        if self.addition_embed_type not in (None, "text_time"):
            raise weights.WeightsError(f"addition_embed_type = {self.addition_embed_type!r} is not known here")
        for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
            if self.addition_embed_type and not getattr(self, name):
                raise weights.WeightsError(f"{self.addition_embed_type} without {name}")
        for place in self.levels:
            if place.channels % place.heads or place.channels % self.norm_num_groups:
                raise weights.WeightsError(
                    f"{place.channels} channels are not {place.heads} heads or {self.norm_num_groups} groups"
                )

    @property
    def levels(self) -> list["Place"]:
        """What a transformer is like at each level, from the outermost inwards."""

        def each(value: int | Sequence[int]) -> Sequence[int]:
            return [value] * len(self.block_out_channels) if isinstance(value, int) else value

        heads, depths = each(self.attention_head_dim), each(self.transformer_layers_per_block)
        return [Place(*level) for level in zip(self.block_out_channels, heads, depths, strict=True)]


@dataclass(frozen=True)
class Place:
    """One level: its channels, and heads and blocks of its transformers."""

    channels: int
    heads: int
    depth: int


# ---------------------------------------------------------------------------------------------------------- attention


class Block(nn.Module):
    """x + attn(LN(x)), x + attn(LN(x), text), x + ff(LN(x)), in this order."""

    def __init__(self, dim: int, heads: int, text: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads, dim // heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads, dim // heads, text)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim, "geglu")

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """x (B, N, D), keys and values of the text (B, L, D) each."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), kv=(self.attn2.split(k), self.attn2.split(v)))
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """Blocks over the pixels of a map, between two projections; the map is added to what comes out."""

    def __init__(self, place: Place, c: StableDiffusionConfig):
        super().__init__()
        dim = place.channels
        projection = nn.Linear if c.use_linear_projection else partial(nn.Conv2d, kernel_size=1)
        self.norm = nn.GroupNorm(c.norm_num_groups, dim, eps=1e-6)  # not the residual blocks' epsilon
        self.proj_in = projection(dim, dim)
        blocks = [Block(dim, place.heads, c.cross_attention_dim) for _ in range(place.depth)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = projection(dim, dim)

    def forward(self, x: Tensor, *kv: Tensor) -> Tensor:
        """x (B, C, H, W), channels last; the keys and values (B, L, C) of each block in turn."""
        h = self.projected(self.proj_in, self.norm(x)).permute(0, 2, 3, 1).flatten(1, 2)  # (B, HW, C), no copy
        for block, k, v in zip(self.transformer_blocks, kv[::2], kv[1::2], strict=True):
            h = block(h, k, v)
        return x + self.projected(self.proj_out, h.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2))

    @staticmethod
    def projected(projection: nn.Module, x: Tensor) -> Tensor:
        """Linear or a 1 x 1 convolution over the channels of a map (B, C, H, W)."""
        if isinstance(projection, nn.Linear):
            return multiply(projection, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return convolve(projection, x)


# -------------------------------------------------------------------------------------------------------------- levels


class Level(nn.Module):
    """Residual blocks, each followed by a transformer where the level reads text, and a change of resolution.

    On the way up every block also gets a skip of the way down, joined by channels; `widths` are the channels that
    go into each block and come out of it.
    """

    def __init__(
        self, widths: Sequence[tuple[int, int]], attends: bool, resample: str, place: Place, c: StableDiffusionConfig
    ):
        super().__init__()
        if attends:
            self.attentions = nn.ModuleList([Transformer(place, c) for _ in widths])
        self.resnets = nn.ModuleList([resnet(*pair, c) for pair in widths])
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(place.channels)])
        if resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(place.channels)])


class Middle(nn.Module):
    """Residual block, transformer, residual block, at the smallest resolution."""

    def __init__(self, place: Place, c: StableDiffusionConfig):
        super().__init__()
        self.attentions = nn.ModuleList([Transformer(place, c)])
        self.resnets = nn.ModuleList([resnet(place.channels, place.channels, c) for _ in range(2)])


def resnet(cin: int, cout: int, c: StableDiffusionConfig) -> ResnetBlock:
    """A residual block of this U-Net."""
    return ResnetBlock(cin, cout, group_norm(c.norm_eps, c.norm_num_groups), time=4 * c.block_out_channels[0])


# --------------------------------------------------------------------------------------------------------------- U-Net


class StableDiffusionUNet(nn.Module):
    """Predict epsilon (or v, as it was trained) from noisy latents, a timestep and the states of a text encoder.

    checkpointing   an attribute to set: blocks forget their activations and compute them again in the backward pass

    Maps are channels last in memory, and so are the weights of `load_stable_diffusion`: then attention needs no
    transposition and small maps are matrix products.
    """

    def __init__(self, config: StableDiffusionConfig = StableDiffusionConfig()):
        super().__init__()
        c, levels = config, config.levels
        self.config = c
        self.checkpointing = False
        widths, time = list(c.block_out_channels), 4 * c.block_out_channels[0]
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], time)
        if c.addition_embed_type:
            self.add_embedding = TimestepEmbedding(c.projection_class_embeddings_input_dim, time)

        last = len(levels) - 1
        self.down_blocks, skips = nn.ModuleList(), [widths[0]]
        for i, (cin, kind) in enumerate(zip([widths[0], *widths], c.down_block_types)):
            pairs = [(cin if j == 0 else widths[i], widths[i]) for j in range(c.layers_per_block)]
            self.down_blocks.append(Level(pairs, DOWN[kind], "down" if i < last else "", levels[i], c))
            skips += [widths[i]] * (c.layers_per_block + (i < last))
        self.mid_block = Middle(levels[-1], c)
        self.up_blocks, cin = nn.ModuleList(), widths[-1]
        for i, kind in zip(range(last, -1, -1), c.up_block_types):
            pairs = []
            for _ in range(c.layers_per_block + 1):
                pairs.append((cin + skips.pop(), widths[i]))
                cin = widths[i]
            self.up_blocks.append(Level(pairs, UP[kind], "up" if i else "", levels[i], c))
        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, widths[0], eps=c.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], c.out_channels, 3, padding=1)

    def read_text(
        self, prompt_embeds: Tensor, text_embeds: Tensor | None = None, time_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Everything the network makes of its conditions, which is the same at every timestep; differentiable.

        prompt_embeds (B, L, cross_attention_dim); SDXL wants the pooled `text_embeds` (B, 1280) and `time_ids` (B, 6)
        besides: height and width of the original image, top and left of its crop, height and width asked for, in
        pixels. Returns the arguments `kv` (B, L, keys and values of all blocks side by side) and, of SDXL, `added`
        (B, D) of forward.
        """
        read = {"kv": torch.cat(list(self._keys_values(prompt_embeds)), dim=-1)}
        if self.config.addition_embed_type:
            read["added"] = self._added(text_embeds, time_ids, prompt_embeds.dtype)
        return read

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        prompt_embeds: Tensor | None = None,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        kv: Tensor | None = None,
        added: Tensor | None = None,
    ) -> Tensor:
        """x (B, 4, H, W) of any size, t int64 (B,), the conditions raw or as `read_text` returns them. Returns
        (B, 4, H, W)."""
        if kv is None:
            kvs = self._keys_values(prompt_embeds)
            if self.config.addition_embed_type:
                added = self._added(text_embeds, time_ids, x.dtype)
        else:
            widths = [block.attn2.to_k.out_features for block in self._blocks() for _ in "kv"]
            kvs = iter(kv.split(widths, dim=-1))
        time = self.time_embedding(sinusoid(t, self.config.block_out_channels[0]).to(x.dtype))
        time = time if added is None else time + added  # (B, D)

        def run(part: nn.Module, *inputs: Tensor) -> Tensor:
            if self.checkpointing and torch.is_grad_enabled():
                return checkpoint(part, *inputs, use_reentrant=False)
            return part(*inputs)

        def attend(level: nn.Module, i: int, h: Tensor) -> Tensor:
            transformer = level.attentions[i]
            return run(transformer, h, *[next(kvs) for _ in range(2 * len(transformer.transformer_blocks))])

        h = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        skips = [h]
        for level in self.down_blocks:
            for i, block in enumerate(level.resnets):
                h = run(block, h, time)
                h = attend(level, i, h) if hasattr(level, "attentions") else h
                skips.append(h)
            if hasattr(level, "downsamplers"):
                h = level.downsamplers[0](h)
                skips.append(h)
        before, after = self.mid_block.resnets
        h = run(after, attend(self.mid_block, 0, run(before, h, time)), time)
        for level in self.up_blocks:
            for i, block in enumerate(level.resnets):
                h = run(block, torch.cat([h, skips.pop()], dim=1), time)
                h = attend(level, i, h) if hasattr(level, "attentions") else h
            if hasattr(level, "upsamplers"):
                h = level.upsamplers[0](h, skips[-1].shape[2:])  # an odd side was rounded up on the way down
        return self.conv_out(F.silu(self.conv_norm_out(h)))

    def _blocks(self) -> Iterator[Block]:
        """The transformer blocks in the order they run."""
        for level in [*self.down_blocks, self.mid_block, *self.up_blocks]:
            for transformer in getattr(level, "attentions", ()):
                yield from transformer.transformer_blocks

    def _keys_values(self, prompt_embeds: Tensor) -> Iterator[Tensor]:
        """Keys and values (B, L, C) in turn, for every block that reads text."""
        for block in self._blocks():
            yield block.attn2.to_k(prompt_embeds)
            yield block.attn2.to_v(prompt_embeds)

    def _added(self, text_embeds: Tensor | None, time_ids: Tensor | None, dtype: torch.dtype) -> Tensor:
        if text_embeds is None or time_ids is None:
            raise ValueError("this U-Net wants `text_embeds` (B, D), the pooled text, and `time_ids` (B, 6), pixels")
        sizes = sinusoid(time_ids.flatten(), self.config.addition_time_embed_dim).view(len(time_ids), -1)
        return self.add_embedding(torch.cat([text_embeds.to(dtype), sizes.to(dtype)], dim=-1))


# ----------------------------------------------------------------------------------------------------------- the files


def load_stable_diffusion(path: str | Path, dtype: torch.dtype | None = None) -> StableDiffusionUNet:
    """The U-Net of a folder with `config.json` and its weights (one file, shards, or their fp16 variant), in
    evaluation mode. dtype: convert to it while reading; None keeps the file's.

    Raises WeightsError where a file is missing, damaged, of another network, or asks for what is not known here.
    """
    unet = weights.build(StableDiffusionUNet, StableDiffusionConfig.from_json(path))
    unet = weights.load(unet, weights.read(path, "diffusion_pytorch_model", dtype=dtype)).eval()
    return unet.to(memory_format=torch.channels_last)
