"""The image towers of Ovis: SigLIP (Zhai et al. 2023) and AIMv2 (Fini et al. 2024), patches in and states out.

`tower(pixels)` gives (B, patches, width), row by row; there is no class token. Both leave out the norm behind their
last layer, and SigLIP its pooling head, unless `normed` asks AIMv2 for it: see ovis.py.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomed.captions.networks.decoder import RMSNorm
from nanomed.text.clip import Encoder


@dataclass(frozen=True)
class TowerConfig:
    """The shape of a tower; the defaults are those of AIMv2-large/14 at 448 pixels."""

    model_type: str = "aimv2"  # or "siglip_vision_model"
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 24
    num_attention_heads: int = 8
    image_size: int = 448
    patch_size: int = 14
    eps: float = 1e-5  # of every norm

    @property
    def patches(self) -> int:
        """Along a side."""
        return self.image_size // self.patch_size


SIGLIP = TowerConfig("siglip_vision_model", 1152, 4304, 27, 16, 384, 14, 1e-6)  # so400m/14 at 384 pixels


class SiglipEmbeddings(nn.Module):
    """Pixels (N, 3, side, side) -> patches with their places (N, patches^2, D), row by row; no class token."""

    def __init__(self, c: TowerConfig):
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, c.hidden_size, c.patch_size, c.patch_size)
        self.position_embedding = nn.Embedding(c.patches**2, c.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.patch_embedding(pixels).flatten(2).transpose(1, 2) + self.position_embedding.weight


class SiglipModel(nn.Module):
    """What the published names call `vision_model`, without what is not read of it."""

    def __init__(self, c: TowerConfig):
        super().__init__()
        self.embeddings = SiglipEmbeddings(c)
        self.encoder = Encoder(c.num_hidden_layers, c.hidden_size, c.num_attention_heads, c.intermediate_size,
                               "gelu_pytorch_tanh", c.eps)  # fmt: skip


class Siglip(nn.Module):
    """`tower(pixels)` gives the states behind the last layer (N, patches^2, D), not normed."""

    def __init__(self, c: TowerConfig):
        super().__init__()
        self.vision_model = SiglipModel(c)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.vision_model.embeddings(pixels)
        for layer in self.vision_model.encoder.layers:
            x = layer(x)
        return x


class Patchifier(nn.Module):
    """Patches, normed."""

    def __init__(self, c: TowerConfig):
        super().__init__()
        self.proj = nn.Conv2d(3, c.hidden_size, c.patch_size, c.patch_size)
        self.norm = RMSNorm(c.hidden_size, c.eps)


class Preprocessor(nn.Module):
    """Pixels (N, 3, side, side) -> normed patches with their places (N, patches^2, D)."""

    def __init__(self, c: TowerConfig):
        super().__init__()
        self.patchifier = Patchifier(c)
        self.pos_embed = nn.Parameter(torch.zeros(1, c.patches**2, c.hidden_size))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patchifier.proj(pixels).flatten(2).transpose(1, 2)
        return self.patchifier.norm(x) + self.pos_embed


class FusedAttention(nn.Module):
    """Self-attention of states (N, L, D), with queries, keys and values of one matrix and no bias."""

    def __init__(self, c: TowerConfig):
        super().__init__()
        self.heads = c.num_attention_heads
        self.qkv = nn.Linear(c.hidden_size, 3 * c.hidden_size, bias=False)
        self.proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, L, d) each
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """fc2(silu(fc1 x) * fc3 x)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc1 = nn.Linear(width, inner, bias=False)
        self.fc2 = nn.Linear(inner, width, bias=False)
        self.fc3 = nn.Linear(width, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)) * self.fc3(x))


class Block(nn.Module):
    """x + attn(norm x), x + mlp(norm x)."""

    def __init__(self, c: TowerConfig):
        super().__init__()
        self.attn = FusedAttention(c)
        self.norm_1 = RMSNorm(c.hidden_size, c.eps)
        self.mlp = SwiGLU(c.hidden_size, c.intermediate_size)
        self.norm_2 = RMSNorm(c.hidden_size, c.eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class Trunk(nn.Module):
    """What the published names call `trunk`."""

    def __init__(self, c: TowerConfig):
        super().__init__()
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.post_trunk_norm = RMSNorm(c.hidden_size, c.eps)


class Aimv2(nn.Module):
    """`tower(pixels)` gives the states behind the last block (N, patches^2, D); `normed`: behind the last norm."""

    def __init__(self, c: TowerConfig, normed: bool = False):
        super().__init__()
        self.normed = normed
        self.preprocessor = Preprocessor(c)
        self.trunk = Trunk(c)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.preprocessor(pixels)
        for block in self.trunk.blocks:
            x = block(x)
        return self.trunk.post_trunk_norm(x) if self.normed else x
