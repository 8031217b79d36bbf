"""Linear layers on a CPU by its faster library.

PyTorch hands float32 products to BLAS, which is MKL, and MKL keeps to AVX2 on processors that are not Intel's. The
library that does its convolutions, oneDNN, uses AVX-512 wherever it is there: the same products in 0.75 to 0.95 of the
time at the sizes of these networks, but its operator has no gradient. With AVX2 for both it takes 1.0 to 1.3 times as
long, so there BLAS stays. Measured in tests/bench/bench_stable_diffusion.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_WIDE = torch.backends.cpu.get_cpu_capability() == "AVX512"


def multiply(layer: nn.Linear, x: Tensor) -> Tensor:
    """layer(x), by whichever way is faster; x (..., in) to (..., out)."""
    if type(layer) is not nn.Linear:  # an adapted one does more than its weight says
        return layer(x)
    return product(x, layer.weight, layer.bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias, as `F.linear`: x (..., in), weight (out, in), bias (out,)."""
    full = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if not (_ONEDNN and _WIDE and full) or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
