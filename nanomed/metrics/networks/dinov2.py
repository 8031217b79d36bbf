"""DINOv2 (Oquab et al. 2023), ViT-L/14: the features of FD-DINOv2 (Stein et al. 2023), trained without any label.

A ViT as in vit.py, but normalised before its blocks, each of whose outcomes is scaled channel by channel. Names are
those of facebook/dinov2-large; the file of torch.hub, dinov2_vitl14_pretrain.pth, has others for the same tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomed import weights
from nanomed.metrics.networks.vit import TIMM, Attention, PatchEmbeddings, renamed
from nanomed.weights import WeightsError

REPOSITORY = "facebook/dinov2-large"
HUB = "dinov2_vitl14_pretrain.pth"
NAMES = (  # of the hub's file, and those here
    *TIMM,
    (".ls1.gamma", ".layer_scale1.lambda1"),
    (".ls2.gamma", ".layer_scale2.lambda1"),
    ("mask_token", "embeddings.mask_token"),
)


@dataclass(frozen=True)
class Dinov2Config:
    """The shape of a DINOv2; the defaults are those of ViT-L/14."""

    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    mlp_ratio: int = 4
    hidden_act: str = "gelu"  # the exact one, with erf
    layer_norm_eps: float = 1e-6
    image_size: int = 518
    patch_size: int = 14
    num_channels: int = 3
    qkv_bias: bool = True
    use_swiglu_ffn: bool = False  # the giant's

    @classmethod
    def from_json(cls, path: str | Path) -> "Dinov2Config":
        """Read a published `config.json`, or that of a folder. Raises WeightsError."""
        stated = weights.settings(path, "a DINOv2")
        if stated.get("model_type", "dinov2") != "dinov2":
            raise WeightsError(f"{path}: not the configuration of a DINOv2 (model_type {stated['model_type']!r})")
        unstated = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, image_size=224)
        return weights.configured(cls, path, "a DINOv2", unstated)


class Embeddings(nn.Module):
    """Patches behind a class token, each with its position: those of another size of image are interpolated."""

    def __init__(self, c: Dinov2Config):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, (c.image_size // c.patch_size) ** 2 + 1, c.hidden_size))
        self.patch_embeddings = PatchEmbeddings(c)
        self.patch = c.patch_size

    def forward(self, pixels: Tensor, offset: float) -> Tensor:
        x = self.patch_embeddings(pixels)  # (B, N, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        return x + self.positions(pixels.shape[2] // self.patch, pixels.shape[3] // self.patch, offset)

    def positions(self, high: int, wide: int, offset: float) -> Tensor:
        """(1, 1 + high * wide, D). Bicubic without antialiasing; the hub's code takes the new grid for `offset` longer
        than it is, lest a floor lose a row, and so samples the old one a little closer."""
        table = self.position_embeddings
        side = round((table.shape[1] - 1) ** 0.5)
        if (high, wide) == (side, side):
            return table
        grid = table[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, side, side)
        if offset:
            scale = (high + offset) / side, (wide + offset) / side
            grid = F.interpolate(grid.float(), scale_factor=scale, mode="bicubic")
        else:
            grid = F.interpolate(grid.float(), size=(high, wide), mode="bicubic")
        return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)], dim=1)


class LayerScale(nn.Module):
    """A factor for each channel."""

    def __init__(self, width: int):
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.lambda1


class MLP(nn.Module):
    """Two layers with the exact GELU between them."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Layer(nn.Module):
    """x + scale1 attention(LN(x)), then x + scale2 mlp(LN(x))."""

    def __init__(self, c: Dinov2Config):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.attention = Attention(c)
        self.layer_scale1 = LayerScale(c.hidden_size)
        self.norm2 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.mlp = MLP(c.hidden_size, c.hidden_size * c.mlp_ratio)
        self.layer_scale2 = LayerScale(c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer_scale1(self.attention(self.norm1(x)))
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class Encoder(nn.Module):
    """The layers, under the name of the published file."""

    def __init__(self, c: Dinov2Config):
        super().__init__()
        self.layer = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))


class Dinov2(nn.Module):
    """Images (B, 3, H, W) in multiples of the patch, by ImageNet's mean and deviation -> class tokens (B, D) after the
    last LayerNorm.

    offset   0.1 as in torch.hub's code, which the published distances were computed with; 0 is transformers'
    """

    def __init__(self, config: Dinov2Config, offset: float = 0.1):
        super().__init__()
        if config.hidden_act != "gelu" or config.use_swiglu_ffn:
            act = "use_swiglu_ffn" if config.use_swiglu_ffn else f"hidden_act {config.hidden_act!r}"
            raise WeightsError(f"{act}: a DINOv2 here has 'gelu' in a plain MLP")
        self.config, self.offset = config, offset
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.states(pixels)[:, 0]

    def states(self, pixels: Tensor) -> Tensor:
        """All tokens (B, 1 + N, D)."""
        if pixels.shape[2] % self.config.patch_size or pixels.shape[3] % self.config.patch_size:
            size, patch = tuple(pixels.shape[-2:]), self.config.patch_size
            raise ValueError(f"images of {size}: this DINOv2 looks at multiples of {patch}")
        x = self.embeddings(pixels, self.offset)
        for layer in self.encoder.layer:
            x = layer(x)
        return self.layernorm(x)


def of_hub(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of torch.hub's file, by the names here; others as they are."""
    return renamed(tensors, NAMES) if "pos_embed" in tensors else dict(tensors)


def load(path: str | Path) -> Dinov2:
    """A published DINOv2, ready to run: the folder of facebook/dinov2-large, or torch.hub's file. Raises WeightsError.

    The hub's file has no configuration: it is taken for a ViT-L/14, whose names and shapes it must have.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".pth":
        config, tensors = Dinov2Config(), weights.read_pickle(path)
    else:
        config, tensors = Dinov2Config.from_json(path), weights.read(path, "model")
    network = weights.build(Dinov2, config)
    mine = {name: tensor.float() for name, tensor in of_hub(tensors).items()}
    return weights.load(network, mine, optional=["embeddings.mask_token"]).requires_grad_(False).eval()
