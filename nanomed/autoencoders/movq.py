"""MoVQ: the autoencoder of Kandinsky 2.2 and 3 (Zheng et al. 2022).

Images (B, 3, H, W) in [-1, 1] become continuous latents (B, 4, H/8, W/8). Every norm of the decoder is modulated by
the latent itself, so what the latent says about a place is said again at each resolution. The table of 16,384 codes
is in the file, but neither Kandinsky quantises. Parameter names are the published ones.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomed import weights
from nanomed.layers.blocks import Downsample, ImageAttention, Norm, ResnetBlock, Upsample, group_norm

EPS = 1e-6


class SpatialNorm(nn.Module):
    """GroupNorm(x) * y(z) + b(z), with y and b linear in the latent z at each place, enlarged to x's size."""

    def __init__(self, channels: int, latent: int):
        super().__init__()
        self.norm_layer = nn.GroupNorm(32, channels, eps=EPS)  # 32 whatever the encoder has
        self.conv_y = nn.Conv2d(latent, channels, 1)
        self.conv_b = nn.Conv2d(latent, channels, 1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        z = F.interpolate(z, size=x.shape[-2:], mode="nearest")  # (B, latent, H, W)
        return torch.addcmul(self.conv_b(z), self.norm_layer(x), self.conv_y(z))


class SpatialAttention(ImageAttention):
    """Attention whose norm is a SpatialNorm, under the name that the files have for it."""

    def __init__(self, channels: int, norm: Norm):
        super().__init__(channels, norm)
        self.spatial_norm = self.group_norm
        del self.group_norm

    def normed(self, x: Tensor, zq: Tensor | None) -> Tensor:
        """By the latents, where the parent divides by groups."""
        return self.spatial_norm(x, zq)


class Level(nn.Module):
    """Residual blocks, each followed by attention at the smallest resolution, then a change of resolution."""

    def __init__(
        self, cin: int, cout: int, layers: int, norm: Norm, attention: type | None, resample: nn.Module | None
    ):
        super().__init__()
        if attention:
            self.attentions = nn.ModuleList([attention(cout, norm) for _ in range(layers)])
        self.resnets = nn.ModuleList([ResnetBlock(cin if i == 0 else cout, cout, norm) for i in range(layers)])
        if resample:
            name = "downsamplers" if isinstance(resample, Downsample) else "upsamplers"
            setattr(self, name, nn.ModuleList([resample]))

    def forward(self, x: Tensor, zq: Tensor | None = None) -> Tensor:
        for i, block in enumerate(self.resnets):
            x = block(x, zq=zq)
            if hasattr(self, "attentions"):
                x = self.attentions[i](x, zq=zq)
        for resample in getattr(self, "downsamplers", getattr(self, "upsamplers", ())):
            x = resample(x)
        return x


class Middle(nn.Module):
    """Residual block, attention, residual block, at the smallest resolution."""

    def __init__(self, channels: int, norm: Norm, attention: type):
        super().__init__()
        self.attentions = nn.ModuleList([attention(channels, norm)])
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, norm) for _ in range(2)])

    def forward(self, x: Tensor, zq: Tensor | None = None) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, zq=zq), zq=zq)
        return self.resnets[1](x, zq=zq)


class Encoder(nn.Module):
    """Images to latents, before they are quantized."""

    def __init__(self, cin: int, latent: int, widths: Sequence[int], layers: int, norm: Norm):
        super().__init__()
        self.conv_in = nn.Conv2d(cin, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, (before, width) in enumerate(zip([widths[0], *widths], widths)):
            last = i == len(widths) - 1
            resample = None if last else Downsample(width, asymmetric=True)
            self.down_blocks.append(Level(before, width, layers, norm, ImageAttention if last else None, resample))
        self.mid_block = Middle(widths[-1], norm, ImageAttention)
        self.conv_norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], latent, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, latent, H/8, W/8)
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents to images, with norms that look at the quantized latents at every resolution."""

    def __init__(self, cout: int, latent: int, widths: Sequence[int], layers: int, norm: Norm):
        super().__init__()
        self.conv_in = nn.Conv2d(latent, widths[-1], 3, padding=1)
        self.up_blocks = nn.ModuleList()
        for i, (before, width) in enumerate(zip([widths[-1], *widths[::-1]], widths[::-1])):
            resample = None if i == len(widths) - 1 else Upsample(width)
            attention = None if i else SpatialAttention
            self.up_blocks.append(Level(before, width, layers + 1, norm, attention, resample))
        self.mid_block = Middle(widths[-1], norm, SpatialAttention)
        self.conv_norm_out = norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], cout, 3, padding=1)

    def forward(self, x: Tensor, zq: Tensor) -> Tensor:  # (B, latent, h, w) -> (B, 3, 8 h, 8 w)
        x = self.mid_block(self.conv_in(x), zq)
        for level in self.up_blocks:
            x = level(x, zq)
        return self.conv_out(F.silu(self.conv_norm_out(x, zq)))


class MoVQ(nn.Module):
    """images (B, 3, H, W) in [-1, 1] <-> latents (B, 4, H/8, W/8), not quantised and not scaled.

    The defaults are Kandinsky 2.2's; Kandinsky 3 has `block_out_channels` (256, 512, 512, 1024).
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: Sequence[int] = (128, 256, 256, 512),
        layers_per_block: int = 2,
        latent_channels: int = 4,
        num_vq_embeddings: int = 16384,
        vq_embed_dim: int = 4,
        norm_num_groups: int = 32,
    ):
        super().__init__()
        widths, norm = list(block_out_channels), group_norm(EPS, norm_num_groups)
        self.latent_channels, self.factor = latent_channels, 1 << (len(widths) - 1)
        self.encoder = Encoder(in_channels, latent_channels, widths, layers_per_block, norm)
        self.quant_conv = nn.Conv2d(latent_channels, vq_embed_dim, 1)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(num_vq_embeddings, vq_embed_dim)})  # never read
        self.post_quant_conv = nn.Conv2d(vq_embed_dim, latent_channels, 1)
        spatial = partial(SpatialNorm, latent=vq_embed_dim)
        self.decoder = Decoder(out_channels, latent_channels, widths, layers_per_block, spatial)

    def encode(self, images: Tensor) -> Tensor:
        """Latents (B, 4, H/8, W/8) as they are before the quantiser."""
        if images.shape[-2] % self.factor or images.shape[-1] % self.factor:
            raise ValueError(f"images of {tuple(images.shape[-2:])}: sides must be multiples of {self.factor}")
        return self.quant_conv(self.encoder(images))

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, 8 h, 8 w), nominally in [-1, 1] and not clamped. The norms are fed by the latent itself, not
        by what `post_quant_conv` makes of it."""
        return self.decoder(self.post_quant_conv(latents), latents)


    def divide_latents(self, deviation: Tensor) -> None:
        """Divide the latents by a number, by the weights themselves. That changes no reconstruction."""
        for tensor in (self.quant_conv.weight, self.quant_conv.bias):
            tensor.div_(deviation)
        readers = [m for m in self.modules() if isinstance(m, SpatialNorm)]
        for convolution in [self.post_quant_conv, *(c for norm in readers for c in (norm.conv_y, norm.conv_b))]:
            convolution.weight.mul_(deviation)


KNOWN = dict(norm_type="spatial", act_fn="silu", lookup_from_codebook=False)


def load_movq(path: str | Path, dtype: torch.dtype | None = None) -> MoVQ:
    """The autoencoder of a folder with `config.json` and its weights. dtype: convert to it while reading; None keeps
    the file's. Raises WeightsError where a file is missing, damaged or of another autoencoder."""
    movq = weights.build(MoVQ, **weights.arguments(path, MoVQ, KNOWN))
    return weights.load(movq, weights.read(path, "diffusion_pytorch_model", dtype=dtype)).eval()
