"""Convolutions on a CPU: of small maps, as the matrix products that they are; of doubled maps, with 4/9 of the work.

A convolution routine first puts its weights in an order of its own. At 8 x 8 pixels and 1024 channels that takes longer
than the convolution: 38 MB of weights for 128 positions. With channels last in memory, pixels (B H W, C) and weights
(O, 9 C) already lie as a matrix product wants them, and so does every gradient. Measured in tests/bench/bench_msdm.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomed.layers.linear import product

# kernel, stride, padding, dilation, groups, padding mode of the convolutions that are products here
POINT = (1, 1), (1, 1), (0, 0), (1, 1), 1, "zeros"
SAME = (3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros"
EXACT = (torch.float32, torch.float64)  # where a sum of weights is not rounded visibly


def convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """layer(x), by whichever way is faster; x (B, C, H, W).

    The products serve 1 x 1 convolutions, and 3 x 3 ones of maps with fewer positions in the batch than channels. They
    need channels last and a CPU; a GPU's convolutions choose well by themselves.
    """
    weight, last = layer.weight, torch.channels_last
    kind = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)
    adapted = type(layer) is not nn.Conv2d  # does more than its weight says
    if adapted or x.device.type != "cpu" or not x.is_contiguous(memory_format=last):
        return layer(x)
    pixels = x.permute(0, 2, 3, 1)  # (B, H, W, C), contiguous
    if kind == POINT:
        return product(pixels, weight.flatten(1), layer.bias).permute(0, 3, 1, 2)
    small = pixels[..., 0].numel() < layer.in_channels
    if kind == SAME and small and weight.is_contiguous(memory_format=last):
        rows = weight.permute(0, 2, 3, 1).flatten(1)  # (O, 9 C), no copy
        return product(Neighbours.apply(pixels), rows, layer.bias).permute(0, 3, 1, 2)
    return layer(x)


def convolve_doubled(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """layer of the map with every pixel doubled, (B, C, H, W) to (B, O, 2H, 2W), for a 3 x 3 convolution.

    Of nine pixels that a kernel sees there, only four differ: their weights are added up first, once for each of the
    four places that an output pixel has in its doubled one. That is 4/9 of the products, the same numbers to rounding;
    it serves where adding up weights costs less, on the CPU and in full precision.
    """
    b, c, h, w = x.shape
    kind = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)
    serves = type(layer) is nn.Conv2d and kind == SAME and x.device.type == "cpu" and 3 * b * h * w >= c
    if not (serves and x.dtype in EXACT and x.is_contiguous(memory_format=torch.channels_last)):
        return convolve(layer, F.interpolate(x, (2 * h, 2 * w), mode="nearest"))

    def summed(weight: Tensor, dim: int, place: int) -> Tensor:  # three weights along dim to two
        first, middle, last = weight.unbind(dim)
        return torch.stack([first + middle, last] if place else [first, middle + last], dim)

    padded = F.pad(x, (1, 1, 1, 1))
    rows = []
    for i in (0, 1):
        weight = summed(layer.weight, 2, i)
        pixels = []
        for j in (0, 1):
            kernel = summed(weight, 3, j).contiguous(memory_format=torch.channels_last)
            y = F.conv2d(padded[:, :, i : i + h + 1, j : j + w + 1], kernel, layer.bias)
            pixels.append(y.permute(0, 2, 3, 1))  # (B, H, W, O)
        rows.append(torch.stack(pixels, dim=3))  # (B, H, W, 2, O)
    return torch.stack(rows, dim=2).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


class Neighbours(torch.autograd.Function):
    """(B, H, W, C) to (B, H, W, 9 C): every pixel with its eight neighbours, zeros beyond the edge."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        (b, h, w, c), padded = x.shape, F.pad(x, (0, 0, 1, 1, 1, 1))
        image, row, column, _ = padded.stride()
        windows = padded.as_strided((b, h, w, 3, 3, c), (image, row, column, row, column, 1))
        return windows.reshape(b, h, w, 9 * c)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.shape = inputs[0].shape

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        b, h, w, c = ctx.shape
        windows = grad.reshape(b, h, w, 3, 3, c)
        padded = grad.new_zeros(b, h + 2, w + 2, c)
        for i in range(3):
            for j in range(3):
                padded[:, i : i + h, j : j + w] += windows[:, :, :, i, j]
        return padded[:, 1:-1, 1:-1]
