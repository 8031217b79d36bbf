"""CLIP's image tower (Radford et al. 2021): what Kandinsky 2.2's prior learns to predict, and CLIP scores read.

Names are those of the published checkpoints, `pre_layrnorm` included.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from nanomed import weights
from nanomed.run import files
from nanomed.text.clip import Encoder, initialise

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ClipVisionConfig:
    """The shape of a CLIP image tower; the defaults are those of ViT-L/14."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    num_channels: int = 3
    hidden_act: str = "quick_gelu"  # or "gelu", the exact one
    layer_norm_eps: float = 1e-5
    projection_dim: int = 768

    @classmethod
    def from_json(cls, path: str | Path) -> "ClipVisionConfig":
        """Read a published `config.json`: that of an image tower, or of a whole CLIP with its `vision_config`."""
        unstated = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                        patch_size=32, projection_dim=512)  # fmt: skip
        return weights.configured(cls, path, "a CLIP", unstated, "vision_config")


BIG_G = ClipVisionConfig(
    hidden_size=1664, intermediate_size=8192, num_hidden_layers=48, num_attention_heads=16, hidden_act="gelu",
    projection_dim=1280,
)  # fmt: skip  # OpenCLIP ViT-bigG/14: Kandinsky 2.2


class VisionEmbeddings(nn.Module):
    """The class token and patches to vectors, with their places."""

    def __init__(self, c: ClipVisionConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(c.hidden_size))
        self.patch_embedding = nn.Conv2d(c.num_channels, c.hidden_size, c.patch_size, c.patch_size, bias=False)
        self.position_embedding = nn.Embedding((c.image_size // c.patch_size) ** 2 + 1, c.hidden_size)
        nn.init.normal_(self.class_embedding, std=0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, N, D), row by row
        first = self.class_embedding.expand(len(x), 1, -1)
        return torch.cat([first, x], dim=1) + self.position_embedding.weight  # (B, 1 + N, D)


class VisionModel(nn.Module):
    """All of the tower but the projection."""

    def __init__(self, c: ClipVisionConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(c)
        self.pre_layrnorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.encoder = Encoder(c.num_hidden_layers, c.hidden_size, c.num_attention_heads, c.intermediate_size,
                               c.hidden_act, c.layer_norm_eps)  # fmt: skip
        self.post_layernorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)


class ImageStates(NamedTuple):
    """What the tower knows of images."""

    last: Tensor  # (B, 1 + N, D) after the last layer, without a LayerNorm
    penultimate: Tensor  # (B, 1 + N, D) before the last layer
    pooled: Tensor  # (B, D) the class token after `post_layernorm`
    embeds: Tensor | None  # (B, projection_dim) `pooled` after `visual_projection`, not normalised


class ClipVision(nn.Module):
    """CLIP's image encoder: `encoder(preprocessed)` gives image embeddings (B, projection_dim).

    projection   with `visual_projection`; without it the pooled class token (B, D) is returned
    """

    def __init__(self, config: ClipVisionConfig, projection: bool = True):
        super().__init__()
        self.config = config
        self.vision_model = VisionModel(config)
        width = config.hidden_size
        self.visual_projection = nn.Linear(width, config.projection_dim, bias=False) if projection else None
        self.apply(initialise)

    def forward(self, pixels: Tensor) -> Tensor:
        """Images (B, 3, size, size) as `preprocess` makes them -> embeddings, not normalised."""
        states = self.features(pixels)
        return states.pooled if states.embeds is None else states.embeds

    def features(self, pixels: Tensor) -> ImageStates:
        """As `forward`, with the token states."""
        size = self.config.image_size
        if pixels.shape[-2:] != (size, size):
            raise ValueError(f"images of {tuple(pixels.shape[-2:])}: this CLIP looks at {size} x {size}")
        x = penultimate = self.vision_model.pre_layrnorm(self.vision_model.embeddings(pixels))  # (B, 1 + N, D)
        for layer in self.vision_model.encoder.layers:
            penultimate = x
            x = layer(x)
        pooled = self.vision_model.post_layernorm(x[:, 0])
        embeds = self.visual_projection(pooled) if self.visual_projection is not None else None
        return ImageStates(x, penultimate, pooled, embeds)

    def embed(self, images: Tensor) -> Tensor:
        """As `forward`, of images (B, 3, H, W) in [-1, 1], which it preprocesses."""
        arrays = files.to_bytes(images / 2 + 0.5).numpy()
        pixels = torch.stack([preprocess(Image.fromarray(array), self.config.image_size) for array in arrays])
        return self(pixels.to(self.vision_model.embeddings.patch_embedding.weight))

    def embed_nothing(self) -> Tensor:
        """The embedding (1, projection_dim) of zeros behind CLIP's normalisation, a grey: Kandinsky's no condition."""
        side = self.config.image_size
        return self(self.vision_model.embeddings.patch_embedding.weight.new_zeros(1, 3, side, side))


def preprocess(image: Image.Image, size: int = 224) -> Tensor:
    """An image as CLIP sees it (3, size, size): shortest side to `size` (bicubic), centre crop, mean and deviation."""
    image = image.convert("RGB")
    width, height = image.size
    short = min(width, height)
    width, height = size * width // short, size * height // short  # the longer side is cut to whole pixels
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255  # (3, size, size)
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def load_clip_vision(path: str | Path, dtype: torch.dtype | None = None) -> ClipVision:
    """The image encoder, with its projection, of a folder with `config.json` and `model.safetensors`; dtype and errors
    as in `load_clip_text`."""
    encoder = weights.build(ClipVision, ClipVisionConfig.from_json(path))
    return weights.load(encoder, weights.read(path, "model", dtype=dtype)).eval()
