"""MSDM's denoiser: a U-Net on VAE latents that reads text through cross-attention.

Chaichuk & Tutubalina, "MMCP team at MEDVQA-GI 2024", section 4.2. The trunk is Medfusion's, its attention block is in
the spirit of Kandinsky 3's U-Net. Parameter names are those of the released code. For 256 x 256 images:

    latents (B, 8, 32, 32) -> 256 @32 -> 256 @16 -> 512 @8 -> 1024, and back          326,508,296 parameters

Two things set it apart from Stable Diffusion's U-Net. There is no self-attention anywhere: attention blocks look at
the text only, and pixels meet through convolutions. And the text acts twice: as keys and values, and pooled to one
vector that is added to the time embedding.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomed.layers.convolution import convolve

# ---------------------------------------------------------------------------------------------- convolution blocks


class Basic(nn.Module):
    """Convolution -> GroupNorm -> channel dropout -> SiLU. A zero one starts as the constant 0."""

    def __init__(self, cin: int, cout: int, groups: int, dropout: float = 0.0, zero: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm = nn.GroupNorm(groups, cout)
        self.drop = nn.Dropout2d(dropout)  # whole channels, after the norm and before the activation
        if zero:
            nn.init.zeros_(self.conv.weight)
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.drop(self.norm(convolve(self.conv, x))))


class BasicRes(nn.Module):
    """Basic(x) + x, with a 1 x 1 convolution on x where the channels change."""

    def __init__(self, cin: int, cout: int, groups: int, dropout: float, zero: bool = False):
        super().__init__()
        self.basic_block = Basic(cin, cout, groups, dropout, zero)
        self.conv_res = nn.Conv2d(cin, cout, 1) if cin != cout else None

    def forward(self, x: Tensor) -> Tensor:
        return self.basic_block(x) + (x if self.conv_res is None else convolve(self.conv_res, x))


class ResBlock(nn.Module):
    """Two BasicRes; the embedding of time and text is added once, between them."""

    def __init__(self, cin: int, cout: int, emb: int, groups: int, dropout: float):
        super().__init__()
        first, second = BasicRes(cin, cout, groups, dropout), BasicRes(cout, cout, groups, dropout, zero=True)
        self.block_seq = nn.ModuleList([first, second])
        self.local_embedder = nn.Sequential(nn.SiLU(), nn.Linear(emb, cout))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        first, second = self.block_seq
        return second(first(x) + self.local_embedder(emb)[:, :, None, None])


class Down(nn.Module):
    """A convolution to half the sides."""

    def __init__(self, channels: int):
        super().__init__()
        self.down_op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_op(x)


class Up(nn.Module):
    """Nearest neighbours at twice the sides, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.up_op = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return convolve(self.up_op, F.interpolate(x, scale_factor=2, mode="nearest-exact"))


# ------------------------------------------------------------------------------------------------ attention to text


def keep_variance(linear: nn.Linear, gain: float = 1.0) -> None:
    """Start with a known gain; PyTorch's default shrinks a signal to 0.58 at every layer."""
    nn.init.normal_(linear.weight, std=gain * linear.in_features**-0.5)


class Attention(nn.Module):
    """Multi-head attention of queries (B, N, C) to keys and values made from a context (B, L, D); no biases."""

    def __init__(self, channels: int, context: int, heads: int, dropout: float = 0.0, sharpness: float = 1.0):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context, channels, bias=False)
        self.to_v = nn.Linear(context, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels, bias=False), nn.Dropout(dropout))
        for linear, gain in ((self.to_q, sharpness), (self.to_k, 1.0), (self.to_v, 1.0)):
            keep_variance(linear, gain)
        # Text that says nothing yet is noise, and a network first learns to suppress noise: then it stays deaf to its
        # prompt for thousands of steps. So text starts at full strength behind a closed gate.
        nn.init.zeros_(self.to_out[0].weight)

    def keys_values(self, context: Tensor) -> Tensor:
        """What it reads of a context (B, L, context): of a text, the same in every step."""
        return torch.cat([self.to_k(context), self.to_v(context)], dim=-1)  # (B, L, 2C)

    def forward(self, x: Tensor, kv: Tensor, mask: Tensor) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, C / heads)

        k, v = kv.chunk(2, dim=-1)
        out = F.scaled_dot_product_attention(split(self.to_q(x)), split(k), split(v), attn_mask=mask[:, None, None])
        return self.to_out(out.transpose(1, 2).flatten(2))


class ConditionalNorm(nn.Module):
    """GroupNorm whose scale and shift are made from the embedding; they start at 1 and 0."""

    def __init__(self, channels: int, emb: int, groups: int):
        super().__init__()
        self.groups = groups
        self.context_mlp = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * channels))
        nn.init.zeros_(self.context_mlp[1].weight)
        nn.init.zeros_(self.context_mlp[1].bias)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.context_mlp(emb)[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(shift, F.group_norm(x, self.groups), 1 + scale)


class ConditionalTransformer(nn.Module):
    """x + attention(norm(x), text), then x + feed-forward(norm(x)); the feed-forward is two 1 x 1 convolutions."""

    def __init__(self, channels: int, context: int, emb: int, groups: int, dropout: float):
        super().__init__()
        self.in_norm = ConditionalNorm(channels, emb, groups)
        # Queries start three times as long: attention that looks at all words alike is slow to learn which is which.
        self.attention = Attention(channels, context, heads=8, dropout=dropout, sharpness=3.0)
        self.out_norm = ConditionalNorm(channels, emb, groups)
        self.feed_forward = nn.Sequential(
            nn.Conv2d(channels, 4 * channels, 1, bias=False),
            nn.SiLU(),
            nn.Conv2d(4 * channels, channels, 1, bias=False),
        )

    def forward(self, x: Tensor, emb: Tensor, kv: Tensor, mask: Tensor) -> Tensor:
        tokens = self.in_norm(x, emb).flatten(2).transpose(1, 2)  # (B, HW, C)
        x = x + self.attention(tokens, kv, mask).transpose(1, 2).view_as(x)
        widen, _, narrow = self.feed_forward
        return x + convolve(narrow, F.silu(convolve(widen, self.out_norm(x, emb))))


class TextBlock(nn.Module):
    """The attention of a level; a module around it, for the name that it has in the released file."""

    def __init__(self, channels: int, context: int, emb: int, groups: int, dropout: float):
        super().__init__()
        self.attention = ConditionalTransformer(channels, context, emb, groups, dropout)


class TextPooling(nn.Module):
    """One vector for the prompt: attention whose query is the mean of all positions, padding included.

    The released model was trained so; therefore the padding of a prompt must not be trimmed.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.attention = Attention(dim, dim, heads=dim // 64)

    def forward(self, context: Tensor, mask: Tensor) -> Tensor:
        mean = context.mean(1, keepdim=True)  # (B, 1, D)
        return self.attention(mean, self.attention.keys_values(context), mask)[:, 0]


class TimeEmbedding(nn.Module):
    """[sin(t w), cos(t w)] with w_k = 10000^(-k / (n/2 - 1)), then an MLP."""

    def __init__(self, dim: int):
        super().__init__()
        self.half = dim // 8  # n/2
        self.time_emb = nn.Sequential(nn.Identity(), nn.Linear(2 * self.half, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        w = torch.exp(-math.log(10000) / (self.half - 1) * torch.arange(self.half, device=t.device))
        angles = t[:, None].float() * w  # (B, n/2)
        return self.time_emb(torch.cat([angles.sin(), angles.cos()], dim=-1).to(dtype))


# ----------------------------------------------------------------------------------------------------------- U-Net


class MSDMUNet(nn.Module):
    """Predict epsilon from noisy latents, a timestep and the states of a text encoder.

    channels[0] is the stem; each further entry is a level of two residual blocks with text attention, and all levels
    but the last end in a stride-2 convolution. With `self_conditioning` the input is [x_t, previous estimate of x_0];
    the released code has that option but feeds x_t twice and never enables it.

    places > 0 adds a learned map of that side to the stem, so that every position of the latents has its own name for
    queries to use; the published network has none and knows its places by the zeros around an image alone.
    """

    def __init__(
        self,
        latent: int = 8,
        channels: tuple[int, ...] = (256, 256, 512, 1024),
        text: int = 768,
        dim: int = 1024,
        dropout: float = 0.1,
        self_conditioning: bool = False,
        groups: int = 32,
        places: int = 0,
    ):
        super().__init__()
        self.self_conditioning = self_conditioning
        self.places = nn.Parameter(torch.randn(1, channels[0], places, places)) if places else None
        self.time_embedder = TimeEmbedding(dim)
        self.cond_projection_linear = nn.Linear(text, dim, bias=False)
        self.cond_projection_linear2 = nn.Linear(dim, dim, bias=False)
        keep_variance(self.cond_projection_linear)
        keep_variance(self.cond_projection_linear2, gain=1.7)  # the SiLU before it takes that much
        self.cond_pooling = TextPooling(dim)
        self.in_conv = nn.ModuleDict({"conv": nn.Conv2d(latent * (1 + self_conditioning), channels[0], 3, padding=1)})

        def block(cin: int, cout: int, *more: nn.Module) -> nn.ModuleList:
            parts = ResBlock(cin, cout, dim, groups, dropout), TextBlock(cout, dim, dim, groups, dropout)
            return nn.ModuleList([*parts, *more])

        self.in_blocks = nn.ModuleList()
        skips, width = [channels[0]], channels[0]
        for level, out in enumerate(channels[1:], 1):
            for _ in range(2):
                self.in_blocks.append(block(width, out))
                width = out
                skips.append(width)
            if level < len(channels) - 1:
                self.in_blocks.append(Down(width))
                skips.append(width)

        self.middle_block = nn.ModuleList(
            [
                ResBlock(width, width, dim, groups, dropout),
                TextBlock(width, dim, dim, groups, dropout),
                ResBlock(width, width, dim, groups, dropout),
            ]
        )

        out_blocks = []  # in the order they run, which is the reverse of the order of their names
        for level in range(len(channels) - 1, 0, -1):
            for out in (channels[level], channels[level], channels[level - 1]):
                out_blocks.append(block(width + skips.pop(), out))
                width = out
            if level > 1:
                out_blocks[-1].append(Up(width))
        self.out_blocks = nn.ModuleList(reversed(out_blocks))

        self.outc = nn.ModuleDict({"conv": nn.ModuleDict({"conv": nn.Conv2d(width, latent, 1)})})
        nn.init.zeros_(self.outc["conv"]["conv"].weight)
        nn.init.zeros_(self.outc["conv"]["conv"].bias)

    def read_text(self, prompt_embeds: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Everything the network makes of a prompt, which is the same at every timestep.

        prompt_embeds (B, L, text), attention_mask (B, L), true at real tokens. Returns the arguments `pooled` (B, D),
        `kv` (B, L, keys and values of all attention blocks side by side) and `attention_mask` of forward: a sampler
        computes them once.
        """
        context = self.cond_projection_linear2(F.silu(self.cond_projection_linear(prompt_embeds)))  # (B, L, D)
        kv = torch.cat([attention.keys_values(context) for attention in self._attentions()], dim=-1)
        mask = attention_mask.bool()
        return {"pooled": self.cond_pooling(context, mask), "kv": kv, "attention_mask": mask}

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        prompt_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        self_cond: Tensor | None = None,
        pooled: Tensor | None = None,
        kv: Tensor | None = None,
    ) -> Tensor:
        """x (B, latent, H, W), t int64 (B,), the text raw or as `read_text` returns it, self_cond like x or None for
        zeros. Returns the prediction, like x."""
        if pooled is None:
            text = self.read_text(prompt_embeds, attention_mask)
            pooled, kv, attention_mask = text["pooled"], text["kv"], text["attention_mask"]
        if self.self_conditioning:
            x = torch.cat([x, torch.zeros_like(x) if self_cond is None else self_cond], dim=1)
        emb = self.time_embedder(t, pooled.dtype) + pooled  # (B, D)
        widths = [2 * attention.to_k.out_features for attention in self._attentions()]
        kvs = iter(kv.split(widths, dim=-1))

        def run(block: nn.ModuleList, h: Tensor) -> Tensor:
            for part in block:
                if isinstance(part, ResBlock):
                    h = part(h, emb)
                elif isinstance(part, TextBlock):
                    h = part.attention(h, emb, next(kvs), attention_mask)
                else:
                    h = part(h)
            return h

        h = self.in_conv["conv"](x)
        if self.places is not None:
            h = h + F.interpolate(self.places, size=h.shape[-2:], mode="nearest-exact")
        skips = [h]
        for block in self.in_blocks:
            h = block(h) if isinstance(block, Down) else run(block, h)
            skips.append(h)
        h = run(self.middle_block, h)
        for block in reversed(self.out_blocks):
            h = run(block, torch.cat([h, skips.pop()], dim=1))
        return self.outc["conv"]["conv"](h)

    def _attentions(self) -> list[Attention]:
        """The attention blocks in the order they run."""
        blocks = [*self.in_blocks, self.middle_block, *reversed(self.out_blocks)]
        parts = [part for block in blocks if not isinstance(block, Down) for part in block]
        return [part.attention.attention for part in parts if isinstance(part, TextBlock)]
