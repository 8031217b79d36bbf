"""MSDM's autoencoder: a small KL-VAE in Medfusion's style, trained from scratch on the same images.

Chaichuk & Tutubalina 2024, section 4.2; parameter names are the released ones. 256 x 256 images become latents
(B, 8, 32, 32); 13,365,094 parameters. Blocks: convolution -> GroupNorm(8) -> SiLU, in residual pairs, no attention.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomed.autoencoders.losses import VGGDistance, ssim
from nanomed.layers.devices import wide


class Basic(nn.Module):
    """Convolution -> GroupNorm(8) -> SiLU; a zero one starts as the constant 0."""

    def __init__(self, cin: int, cout: int, zero: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm = nn.GroupNorm(8, cout)
        if zero:
            nn.init.zeros_(self.conv.weight)
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.conv(x)))


class BasicRes(nn.Module):
    """Basic(x) + x, with a 1 x 1 convolution on x where the channels change."""

    def __init__(self, cin: int, cout: int, zero: bool = False):
        super().__init__()
        self.basic_block = Basic(cin, cout, zero)
        self.conv_res = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.basic_block(x) + self.conv_res(x)


class ResBlock(nn.Module):
    """Two residual units; the second one starts as the identity."""

    def __init__(self, cin: int, cout: int):
        super().__init__()
        self.block_seq = nn.Sequential(BasicRes(cin, cout), BasicRes(cout, cout, zero=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.block_seq(x)


class Down(nn.Module):
    """Stride-2 convolution to `cout` channels, then a residual pair."""

    def __init__(self, cin: int, cout: int):
        super().__init__()
        self.down_op = nn.ModuleDict({"down_op": nn.Conv2d(cin, cout, 3, stride=2, padding=1)})
        self.conv_block = ResBlock(cout, cout)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_block(self.down_op["down_op"](x))


class Up(nn.Module):
    """Nearest x2, convolution to `cout` channels, then a residual pair."""

    def __init__(self, cin: int, cout: int):
        super().__init__()
        self.up_op = nn.ModuleDict({"up_op": nn.Conv2d(cin, cout, 3, padding=1)})
        self.conv_block = ResBlock(cout, cout)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_block(self.up_op["up_op"](F.interpolate(x, scale_factor=2, mode="nearest-exact")))


class Plain(nn.Module):
    """A convolution and nothing else."""

    def __init__(self, cin: int, cout: int, kernel: int, zero: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, padding=kernel // 2)
        if zero:
            nn.init.zeros_(self.conv.weight)
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class MSDMVAE(nn.Module):
    """images (B, 3, H, W) in [-1, 1] <-> latents (B, latent, H/f, W/f), f = 2^(len(channels) - 1).

    `scale` multiplies latents on their way out of `encode` and divides them on their way into `decode`. The released
    code has none although its latents are far from unit variance (the KL weight is nearly zero); here it is set to
    1 / standard deviation once the VAE is trained. 1.0 is the published behaviour.
    """

    KL_WEIGHT = 1e-6

    def __init__(self, latent: int = 8, channels: tuple[int, ...] = (64, 128, 256, 512)):
        super().__init__()
        self.scale = 1.0
        pairs = list(zip(channels, channels[1:]))
        self.inc = ResBlock(3, channels[0])
        self.encoders = nn.ModuleList([Down(cin, cout) for cin, cout in pairs])
        self.out_enc = nn.Sequential(Plain(channels[-1], 2 * latent, 3), Plain(2 * latent, 2 * latent, 1))
        self.inc_dec = ResBlock(latent, channels[-1])
        self.decoders = nn.ModuleList([Up(cout, cin) for cin, cout in pairs])  # decoders.0 is the last to run
        self.outc = Plain(channels[0], 3, 1, zero=True)
        self.outc_ver = nn.ModuleList([Plain(channels[1], 3, 1, zero=True)])  # an image at half size, for the loss only

    def moments(self, images: Tensor) -> Tensor:
        """Mean and log-variance of q(z | image), side by side: (B, 2 latent, H/f, W/f), unscaled."""
        h = self.inc(images)
        for encoder in self.encoders:
            h = encoder(h)
        mean, logvar = self.out_enc(h).chunk(2, dim=1)
        return torch.cat([mean, logvar.clamp(-30, 20)], dim=1)

    def standardise(self, image_batches: Iterable[Tensor]) -> float:
        """Measure the standard deviation of the latents of images, and make `scale` its inverse; returns it."""
        total = squares = count = 0.0
        for images in image_batches:
            moments = self.moments(images)
            mean, logvar = moments.to(wide(moments.device), torch.float64).chunk(2, dim=1)
            total += mean.sum().item()
            squares += (mean**2 + logvar.exp()).sum().item()  # E z^2 of z ~ N(mean, var)
            count += mean.numel()
        deviation = (squares / count - (total / count) ** 2) ** 0.5
        self.scale = 1 / deviation
        return deviation

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents from moments: a draw with the given standard normal noise, else the mean."""
        mean, logvar = moments.chunk(2, dim=1)
        z = mean if noise is None else mean + torch.exp(0.5 * logvar) * noise
        return z * self.scale

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images in [-1, 1] to scaled latents. MSDM trains on draws; the mean is for reconstruction."""
        return self.latents(self.moments(images), noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents to images, nominally in [-1, 1] and not clamped."""
        return self._decode(latents / self.scale)[0]

    def _decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        h = self.inc_dec(z)
        for decoder in reversed(self.decoders[1:]):
            h = decoder(h)
        half = self.outc_ver[0](h)  # (B, 3, H/2, W/2)
        return self.outc(self.decoders[0](h)), half

    def loss(self, images: Tensor, noise: Tensor, perceptual: VGGDistance | None = None) -> dict[str, Tensor]:
        """The released objective, at full and at half resolution.

        The code sums  3 S (MSE + LPIPS + 1 - SSIM)  over both (S pixels each) and adds 1e-6 KL; here everything is
        divided by 3 S of the full image, so that the loss reads per pixel and the ratio to the KL term is kept.
        LPIPS here is the distance of VGG16 features without learned weights, and is left out without them.
        Returns "loss" and its parts, in float32: autocast is for the convolutions.
        """
        mean, logvar = self.moments(images).float().chunk(2, dim=1)
        full, half = self._decode(mean + torch.exp(0.5 * logvar) * noise)
        full, half = full.float(), half.float()
        small = F.interpolate(images, size=half.shape[-2:], mode="nearest-exact")
        total = self._distance(full, images, perceptual) + self._distance(half, small, perceptual) / 4
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / len(images)
        loss = total + self.KL_WEIGHT * kl / images[0].numel()
        return {"loss": loss, "l1": F.l1_loss(full, images).detach(), "kl": kl.detach()}

    @staticmethod
    def _distance(out: Tensor, images: Tensor, perceptual: VGGDistance | None) -> Tensor:
        unit = [(y + 1) / 2 for y in (out, images)]
        total = F.mse_loss(out, images) + 1 - ssim(unit[0].clamp(0, 1), unit[1]).mean()
        return total if perceptual is None else total + perceptual(out, images).mean()
