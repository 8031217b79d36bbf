"""How far a reconstruction is from an image: SSIM, and the distance of VGG16 features."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomed import weights


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of images (B, C, H, W) in [0, 1]; returns (B,).

    Gaussian window of 11 x 11 with sigma 1.5, K = (0.01, 0.03), no padding; each channel's mean is floored at 0
    before the channels are averaged. Images smaller than the window use the largest odd window that fits.

    Computed in float32 whatever the precision around it: a variance is the small difference of two squares.
    """
    with torch.autocast(a.device.type, enabled=False):
        return _ssim(a.float(), b.float()) if a.dtype != torch.float64 else _ssim(a, b)


def _ssim(a: Tensor, b: Tensor) -> Tensor:
    size = min(11, *[side if side % 2 else side - 1 for side in a.shape[-2:]])
    offsets = torch.arange(size, dtype=a.dtype, device=a.device) - size // 2
    kernel = torch.exp(-(offsets**2) / (2 * 1.5**2))
    kernel = kernel / kernel.sum()
    channels = a.shape[1]
    across = kernel.expand(channels, 1, 1, size)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, across, groups=channels), across.transpose(2, 3), groups=channels)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return score.mean((2, 3)).relu().mean(1)


class VGGDistance(nn.Module):
    """The perceptual distance of MSDM's VAE loss: LPIPS (Zhang et al. 2018) on VGG16 without the learned weights.

    Five feature maps (relu1_2 .. relu5_3), unit length over channels, squared difference summed over channels, mean
    over space, summed over the maps. Names are torchvision's `features.N`, so its published VGG16 file loads.
    """

    TAPS = (3, 8, 15, 22, 29)

    def __init__(self):
        super().__init__()
        layers, width = [], 3
        for item in (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512):
            if item == "pool":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(width, item, 3, padding=1), nn.ReLU()]
                width = item
        self.features = nn.Sequential(*layers)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1]; returns (B,)."""
        shift = torch.tensor([-0.030, -0.088, -0.188], dtype=a.dtype, device=a.device).view(1, 3, 1, 1)
        scale = torch.tensor([0.458, 0.448, 0.450], dtype=a.dtype, device=a.device).view(1, 3, 1, 1)
        x = (torch.cat([a, b]) - shift) / scale
        total = torch.zeros(len(a), device=x.device)
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.TAPS:
                unit = x.float() / (x.float().norm(dim=1, keepdim=True) + 1e-10)
                of_a, of_b = unit.chunk(2)
                total = total + (of_a - of_b).square().sum(1).mean((1, 2))
        return total


def load_vgg(folder: str | None = None) -> VGGDistance:
    """The distance with torchvision's vgg16-397923af.pth, frozen. Raises WeightsNotFound, a FileNotFoundError."""
    found = weights.find("vgg16-397923af.pth", folder)
    tensors = weights.read_pickle(found, prefix="features.")
    return weights.load(weights.build(VGGDistance), tensors).requires_grad_(False)
