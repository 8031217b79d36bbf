"""Kandinsky 2.2's two denoisers: a transformer that dreams up an image embedding, a U-Net that draws from one.

    text states --PriorTransformer--> CLIP image embedding (B, 1280) --DecoderUNet--> latents (B, 4, H/8, W/8)

Razzhigaev et al. 2023, after unCLIP (Ramesh et al. 2022). No text reaches the U-Net and no pixel the prior: the
embedding is all that the two share, so each is trained alone. Parameter names are the published ones.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomed import weights
from nanomed.layers.blocks import (
    Attention,
    FeedForward,
    ImageAttention,
    ResnetBlock,
    TimestepEmbedding,
    group_norm,
    sinusoid,
)
from nanomed.layers.masks import longest

# ------------------------------------------------------------------------------------------------------------- prior


class PriorBlock(nn.Module):
    """x + attention(LN(x)), then x + feed-forward(LN(x)); the second norm is the third by name."""

    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads, head_dim, bias=True)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim, "gelu")

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x), mask=mask)
        return x + self.ff(self.norm3(x))


class PriorTransformer(nn.Module):
    """A noisy image embedding and a text to the clean embedding, standardised (x_0 is what it predicts).

    A sequence of `num_embeddings` + 4 tokens that look backwards only, whose last one is the answer:

        text tokens (77) | pooled text | time | noisy embedding | learned query

    `clip_mean` and `clip_std` are those of image embeddings: `standardised` and `embedding` go there and back.
    """

    def __init__(
        self,
        num_attention_heads: int = 32,
        attention_head_dim: int = 64,
        num_layers: int = 20,
        embedding_dim: int = 1280,
        num_embeddings: int = 77,
        additional_embeddings: int = 4,
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.embedding_dim, self.num_embeddings, self.extra = embedding_dim, num_embeddings, additional_embeddings
        self.time_embedding = TimestepEmbedding(dim, dim)
        self.proj_in = nn.Linear(embedding_dim, dim)
        self.embedding_proj = nn.Linear(embedding_dim, dim)
        self.encoder_hidden_states_proj = nn.Linear(embedding_dim, dim)
        self.positional_embedding = nn.Parameter(torch.zeros(1, num_embeddings + additional_embeddings, dim))
        self.prd_embedding = nn.Parameter(torch.zeros(1, 1, dim))
        blocks = [PriorBlock(dim, num_attention_heads, attention_head_dim) for _ in range(num_layers)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.norm_out = nn.LayerNorm(dim)
        self.proj_to_clip_embeddings = nn.Linear(dim, embedding_dim)
        self.clip_mean = nn.Parameter(torch.zeros(1, embedding_dim))
        self.clip_std = nn.Parameter(torch.ones(1, embedding_dim))

    def forward(self, x: Tensor, t: Tensor, text_states: Tensor, text_embeds: Tensor, text_mask: Tensor) -> Tensor:
        """x (B, E), t int64 (B,), text_states (B, L, E), text_embeds (B, E), text_mask bool (B, L) -> (B, E).

        L may be less than `num_embeddings`: tokens that the mask hides have no say, so padding behind the longest
        text of a batch can be left out and nothing changes (`shortest`).
        """
        time = self.time_embedding(sinusoid(t, self.prd_embedding.shape[-1]).to(x.dtype))  # (B, D)
        query = self.prd_embedding.expand(len(x), -1, -1)
        ends = torch.stack([self.embedding_proj(text_embeds.to(x.dtype)), time, self.proj_in(x)], dim=1)
        text = self.encoder_hidden_states_proj(text_states.to(x.dtype))
        h = torch.cat([text, ends, query], dim=1)  # (B, L + 4, D)
        length = text_states.shape[1]
        places = self.positional_embedding
        h = h + torch.cat([places[:, :length], places[:, self.num_embeddings :]], dim=1)

        seen = F.pad(text_mask.bool(), (0, self.extra), value=True)  # (B, L + 4)
        causal = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool, device=h.device).tril()
        mask = seen[:, None, None, :] & causal  # (B, 1, L + 4, L + 4); a row always sees the start token
        for block in self.transformer_blocks:
            h = block(h, mask)
        return self.proj_to_clip_embeddings(self.norm_out(h[:, -1]))

    def standardised(self, embedding: Tensor) -> Tensor:
        """A CLIP image embedding (B, E) as the prior models it: mean 0, deviation 1 in each dimension."""
        return (embedding - self.clip_mean) / self.clip_std

    def embedding(self, x: Tensor) -> Tensor:
        """The CLIP image embedding (B, E) that a sample of the prior stands for."""
        return x * self.clip_std + self.clip_mean


def shortest(*conditions: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The text fields of conditions as a `PriorTransformer` takes them, without the padding that none of them needs: a
    quarter of the tokens for prompts of a sentence, and the same result."""
    last = max(longest(cond["text_mask"]) for cond in conditions)
    cut = {"text_states": slice(last), "text_embeds": slice(None), "text_mask": slice(last)}
    return [{name: cond[name][:, part] for name, part in cut.items()} for cond in conditions]


# ----------------------------------------------------------------------------------------------------------- decoder


class ImageProjection(nn.Module):
    """One image embedding to 32 tokens, which the pixels attend to."""

    def __init__(self, embedding: int, width: int, tokens: int = 32):
        super().__init__()
        self.tokens = tokens
        self.image_embeds = nn.Linear(embedding, tokens * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:  # (B, E) -> (B, 32, width)
        return self.norm(self.image_embeds(x).unflatten(-1, (self.tokens, -1)))


class ImageTimeEmbedding(nn.Module):
    """The image embedding as a part of the time embedding."""

    def __init__(self, embedding: int, time: int):
        super().__init__()
        self.image_proj = nn.Linear(embedding, time)
        self.image_norm = nn.LayerNorm(time)

    def forward(self, x: Tensor) -> Tensor:  # (B, E) -> (B, time)
        return self.image_norm(self.image_proj(x))


class Level(nn.Module):
    """Residual blocks, each followed by attention where the level has it, around one change of resolution.

    On the way up every block also gets a skip of the way down, joined by channels.
    """

    def __init__(self, widths: Sequence[tuple[int, int]], resample: str, attention: dict | None, **block):
        super().__init__()
        cout = widths[-1][1]
        if attention:
            self.attentions = nn.ModuleList([ImageAttention(cout, **attention) for _ in widths])
        self.resnets = nn.ModuleList([ResnetBlock(cin, cout, **block) for cin, cout in widths])
        if resample:
            name = {"down": "downsamplers", "up": "upsamplers"}[resample]
            setattr(self, name, nn.ModuleList([ResnetBlock(cout, cout, resample=resample, **block)]))

    def step(self, i: int, x: Tensor, time: Tensor, tokens: Tensor) -> Tensor:
        """The i-th residual block, and attention where the level has it."""
        x = self.resnets[i](x, time)
        return self.attentions[i](x, tokens) if hasattr(self, "attentions") else x


class Middle(nn.Module):
    """Residual block, attention, residual block, at the smallest resolution."""

    def __init__(self, channels: int, attention: dict, **block):
        super().__init__()
        self.attentions = nn.ModuleList([ImageAttention(channels, **attention)])
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, **block) for _ in range(2)])

    def forward(self, x: Tensor, time: Tensor, tokens: Tensor) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, time), tokens)
        return self.resnets[1](x, time)


class DecoderUNet(nn.Module):
    """MoVQ latents under noise and an image embedding to the noise, and to a second half of channels.

    The second half is the logarithm of a variance between the two bounds of Nichol & Dhariwal 2021 (eq. 15). The
    published scheduler has no use for it, so whoever samples drops it; training leaves it alone.

    All levels but the outermost attend, over pixels and 32 image tokens at once, so there is no separate
    cross-attention. Embeddings of time and image are added, and scale and shift every block's second norm.
    """

    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 8,
        block_out_channels: Sequence[int] = (384, 768, 1152, 1536),
        layers_per_block: int = 3,
        cross_attention_dim: int = 768,
        attention_head_dim: int = 64,
        encoder_hid_dim: int = 1280,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        widths = list(block_out_channels)
        self.in_channels, self.width, time = in_channels, widths[0], 4 * widths[0]
        norm = group_norm(norm_eps, norm_num_groups)
        block = dict(norm=norm, time=time, scale_shift=True)
        # the family's attention keeps its own epsilon
        attention = dict(norm=group_norm(1e-5, norm_num_groups), head_dim=attention_head_dim, added=cross_attention_dim)
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], time)
        self.encoder_hid_proj = ImageProjection(encoder_hid_dim, cross_attention_dim)
        self.add_embedding = ImageTimeEmbedding(encoder_hid_dim, time)

        last = len(widths) - 1
        self.down_blocks, skips = nn.ModuleList(), [widths[0]]
        for i, (cin, cout) in enumerate(zip([widths[0], *widths], widths)):
            pairs = [(cin if j == 0 else cout, cout) for j in range(layers_per_block)]
            self.down_blocks.append(Level(pairs, "down" if i < last else "", attention if i else None, **block))
            skips += [cout] * (layers_per_block + (i < last))
        self.mid_block = Middle(widths[-1], attention, **block)
        self.up_blocks, cin = nn.ModuleList(), widths[-1]
        for i, cout in zip(range(last, -1, -1), widths[::-1]):
            pairs = []
            for _ in range(layers_per_block + 1):
                pairs.append((cin + skips.pop(), cout))
                cin = cout
            self.up_blocks.append(Level(pairs, "up" if i else "", attention if i else None, **block))
        self.conv_norm_out = norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, image_embeds: Tensor) -> Tensor:
        """x (B, 4, h, w) with sides that are multiples of 8 (of 2 to the number of levels less one), t int64 (B,),
        image_embeds (B, 1280) -> (B, 8, h, w): epsilon and the variance's half."""
        time = self.time_embedding(sinusoid(t, self.width).to(x.dtype)) + self.add_embedding(image_embeds)  # (B, 4 C)
        tokens = self.encoder_hid_proj(image_embeds)  # (B, 32, 768)

        x = self.conv_in(x)
        skips = [x]
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                x = level.step(i, x, time, tokens)
                skips.append(x)
            if hasattr(level, "downsamplers"):
                x = level.downsamplers[0](x, time)
                skips.append(x)
        x = self.mid_block(x, time, tokens)
        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                x = level.step(i, torch.cat([x, skips.pop()], dim=1), time, tokens)
            if hasattr(level, "upsamplers"):
                x = level.upsamplers[0](x, time)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


# ----------------------------------------------------------------------------------------------------------- the files

PRIOR = dict(norm_in_type=None, embedding_proj_norm_type=None, encoder_hid_proj_type="linear", added_emb_type="prd",
             time_embed_act_fn="silu")  # fmt: skip
UNET = dict(resnet_time_scale_shift="scale_shift", encoder_hid_dim_type="image_proj", act_fn="silu",
            addition_embed_type="image", mid_block_type="UNetMidBlock2DSimpleCrossAttn", flip_sin_to_cos=True,
            freq_shift=0, time_embedding_type="positional", class_embed_type=None)  # fmt: skip


def load_prior(path: str | Path, dtype: torch.dtype | None = None) -> PriorTransformer:
    """The prior of a folder with `config.json` and its weights. dtype: convert to it while reading; None keeps the
    file's. Raises WeightsError where a file is missing, damaged or of another prior."""
    prior = weights.build(PriorTransformer, **weights.arguments(path, PriorTransformer, PRIOR))
    return weights.load(prior, weights.read(path, "diffusion_pytorch_model", dtype=dtype)).eval()


def load_decoder(path: str | Path, dtype: torch.dtype | None = None) -> DecoderUNet:
    """The decoder's U-Net, likewise."""
    unet = weights.build(DecoderUNet, **weights.arguments(path, DecoderUNet, UNET))
    return weights.load(unet, weights.read(path, "diffusion_pytorch_model", dtype=dtype)).eval()
