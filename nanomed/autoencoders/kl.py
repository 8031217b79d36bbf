"""The KL autoencoder of Stable Diffusion (Rombach et al. 2022, section 3.1), which PixArt-alpha, SD 1.x, SDXL and
Hunyuan-DiT share: images (B, 3, H, W) <-> latents (B, 4, H/8, W/8), 83,653,863 parameters.

    vae = load_kl("weights/PixArt-alpha/PixArt-XL-2-512x512/vae")
    latents = vae.encode(images, noise)   # scaled: a draw of the posterior, or its mean without noise
    images = vae.decode(latents)           # not clamped

Parameter names are diffusers'. Files of 2022 spell the attention layers in another way: see `renamed`.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanomed import weights
from nanomed.layers.blocks import Downsample, ImageAttention, Norm, ResnetBlock, Upsample, group_norm
from nanomed.layers.devices import wide


@dataclass(frozen=True)
class KLConfig:
    """The shape of an autoencoder; the defaults are those of Stable Diffusion 1.x and PixArt-alpha."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)  # one level each; all but the last halve the image
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))  # JSON knows lists alone

    @classmethod
    def from_json(cls, path: str | Path) -> "KLConfig":
        """Read a published `config.json`, or the one in a folder. What it leaves unsaid is the default."""
        return weights.configured(cls, path, "a KL autoencoder")


class Half(nn.Module):
    """What encoder and decoder have in common: pieces that run one after the other, then norm, SiLU, convolution.

    checkpointing   an attribute to set: pieces forget their activations and compute them again in the backward pass
    """

    checkpointing = False

    def pieces(self) -> Iterator[nn.Module]:
        """The residual blocks, attention and resampling layers in the order they run."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for piece in self.pieces():
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(piece, x, use_reentrant=False)
            else:
                x = piece(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def middle(self) -> Iterator[nn.Module]:
        """The two residual blocks of the middle and the attention between them, in order."""
        first, second = self.mid_block["resnets"]
        yield from (first, *self.mid_block["attentions"], second)


def _middle(channels: int, norm: Norm) -> nn.ModuleDict:
    resnets = [ResnetBlock(channels, channels, norm) for _ in range(2)]
    return nn.ModuleDict(
        {"attentions": nn.ModuleList([ImageAttention(channels, norm)]), "resnets": nn.ModuleList(resnets)}
    )


class Encoder(Half):
    """(B, 3, H, W) -> (B, 2 latent, H/f, W/f), f = 2^(levels - 1)."""

    def __init__(self, c: KLConfig):
        super().__init__()
        norm, widths = group_norm(1e-6, c.norm_num_groups), c.block_out_channels
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for cin, cout in zip((widths[0], *widths), widths):
            resnets = [ResnetBlock(cin if i == 0 else cout, cout, norm) for i in range(c.layers_per_block)]
            self.down_blocks.append(nn.ModuleDict({"resnets": nn.ModuleList(resnets)}))
        for block, width in zip(self.down_blocks, widths[:-1]):
            block["downsamplers"] = nn.ModuleList([Downsample(width, asymmetric=True)])
        self.mid_block = _middle(widths[-1], norm)
        self.conv_norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * c.latent_channels, 3, padding=1)

    def pieces(self) -> Iterator[nn.Module]:
        for block in self.down_blocks:
            for layers in block.values():
                yield from layers
        yield from self.middle()


class Decoder(Half):
    """(B, latent, H/f, W/f) -> (B, 3, H, W); a level has one residual block more than the encoder's."""

    def __init__(self, c: KLConfig):
        super().__init__()
        norm, widths = group_norm(1e-6, c.norm_num_groups), c.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(c.latent_channels, widths[0], 3, padding=1)
        self.mid_block = _middle(widths[0], norm)
        self.up_blocks = nn.ModuleList()
        for cin, cout in zip((widths[0], *widths), widths):
            resnets = [ResnetBlock(cin if i == 0 else cout, cout, norm) for i in range(c.layers_per_block + 1)]
            self.up_blocks.append(nn.ModuleDict({"resnets": nn.ModuleList(resnets)}))
        for block, width in zip(self.up_blocks, widths[:-1]):
            block["upsamplers"] = nn.ModuleList([Upsample(width)])
        self.conv_norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], c.out_channels, 3, padding=1)

    def pieces(self) -> Iterator[nn.Module]:
        yield from self.middle()
        for block in self.up_blocks:
            for layers in block.values():
                yield from layers


class AutoencoderKL(nn.Module):
    """Images in [-1, 1] <-> scaled latents. `scale` is the published scaling factor, which brings latents near unit
    variance: it multiplies them on their way out of `encode` and divides them on their way into `decode`.

    `vae.decoder.checkpointing = True` makes the backward pass through `decode` small (and a third slower).
    """

    def __init__(self, config: KLConfig = KLConfig()):
        super().__init__()
        self.config, self.scale = config, config.scaling_factor
        self.factor = 1 << (len(config.block_out_channels) - 1)  # pixels a latent, along a side
        latent = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)

    def moments(self, images: Tensor) -> Tensor:
        """Mean and log-variance of q(z | image), side by side: (B, 2 latent, H/f, W/f), unscaled."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return torch.cat([mean, logvar.clamp(-30, 20)], dim=1)

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents from moments: a draw with the given standard normal noise, else the mean."""
        mean, logvar = moments.chunk(2, dim=1)
        z = mean if noise is None else mean + torch.exp(0.5 * logvar) * noise
        return z * self.scale

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to scaled latents, (B, latent, H/f, W/f)."""
        return self.latents(self.moments(images), noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents to images, nominally in [-1, 1] and not clamped."""
        return self.decoder(self.post_quant_conv(latents / self.scale))

    def loss(self, images: Tensor) -> dict[str, Tensor]:
        """MSE and L1 of reconstructions, and 1e-6 of the KL divergence of latents (Rombach et al. 2022): to train from
        nothing."""
        mean, logvar = self.moments(images).float().chunk(2, dim=1)  # autocast is for the convolutions
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        out = self.decode(z * self.scale).float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()
        l1 = F.l1_loss(out, images)
        return {"loss": F.mse_loss(out, images) + l1 + 1e-6 * kl, "l1": l1.detach(), "kl": kl.detach()}

    def standardise(self, image_batches: Iterable[Tensor]) -> float:
        """Scale latents to unit deviation from now on; returns what it was, over the given images."""
        means = torch.cat([self.moments(images).chunk(2, dim=1)[0] for images in image_batches])
        deviation = means.to(wide(means.device), torch.float64).std().item()
        self.scale = 1 / deviation
        return deviation


# ----------------------------------------------------------------------------------------------------------- the files

OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of attentions, until 2023


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Attention layers under their names of today, and as matrices where a file has them as 1 x 1 convolutions.

    SD 1.5's repository has both: its fp32 VAE has the old names, its fp16 one the new."""
    out = {}
    for name, tensor in tensors.items():
        if ".attentions." in name:
            name = re.sub(r"\.(query|key|value|proj_attn)\.", lambda old: f".{OLD_NAMES[old[1]]}.", name)
            tensor = tensor.flatten(1) if tensor.shape[2:] == (1, 1) else tensor
        out[name] = tensor
    return out


def load_kl(path: str | Path, dtype: torch.dtype | None = None) -> AutoencoderKL:
    """The autoencoder of a folder with `config.json` and its weights (one file, shards, or their fp16 variant), in
    evaluation mode. dtype: convert to it while reading; None keeps the file's.

    Raises WeightsError where a file is missing, damaged or of another autoencoder.
    """
    vae = weights.build(AutoencoderKL, KLConfig.from_json(path))
    return weights.load(vae, renamed(weights.read(path, "diffusion_pytorch_model", dtype=dtype))).eval()
