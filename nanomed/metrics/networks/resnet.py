"""ResNet-50 (He et al. 2016), for SwAV's weights (Caron et al. 2020): the features of which the ranks of generators
agreed with those of experts on medical images (Woodland et al. 2023). Names are torchvision's, as in the public file.

The file's own code pads images by one pixel before a first convolution that pads two: three, as in any ResNet.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomed import weights

FILE = "swav_800ep_pretrain.pth"  # published as .pth.tar, though it is no tar
HEADS = ("projection_head.*", "prototypes.*", "fc.*")  # in files, and not read


class Bottleneck(nn.Module):
    """1x1, 3x3 (which may halve the sides), 1x1 to four times the width, and the input added."""

    def __init__(self, cin: int, width: int, stride: int = 1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.downsample = None
        if stride != 1 or cin != 4 * width:
            self.downsample = nn.Sequential(nn.Conv2d(cin, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(x)) + shortcut)


class ResNet50(nn.Module):
    """Images (B, 3, H, W) of any size -> features (B, 2048), the mean over all places."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.layer1 = stage(64, 64, 3)
        self.layer2 = stage(256, 128, 4, stride=2)
        self.layer3 = stage(512, 256, 6, stride=2)
        self.layer4 = stage(1024, 512, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))


def stage(cin: int, width: int, depth: int, stride: int = 1) -> nn.Sequential:
    """`depth` bottlenecks, the first of which changes width and size."""
    return nn.Sequential(Bottleneck(cin, width, stride), *(Bottleneck(4 * width, width) for _ in range(depth - 1)))


def load(path: str | Path) -> ResNet50:
    """SwAV's network, ready to run, from its file (plain tensors; no code in it is run) or a safetensors copy. Raises
    WeightsError."""
    path = Path(path)
    tensors = weights.read(path) if path.suffix == ".safetensors" else weights.read_pickle(path)
    tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    network = weights.load(weights.build(ResNet50), tensors, optional=HEADS).requires_grad_(False).eval()
    return network.to(memory_format=torch.channels_last)
