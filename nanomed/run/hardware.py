"""What depends on the machine: precision of forward passes, and memory."""

import ctypes
import sys
from contextlib import nullcontext
from typing import Any

import torch

from nanomed.run.flags import UsageError


def autocast(precision: str, device: torch.device) -> Any:
    """The context for forward passes: nothing for fp32, autocast for bf16 and fp16."""
    if precision == "fp32":
        return nullcontext()
    if precision not in ("bf16", "fp16"):
        raise UsageError(f"--precision {precision}: choose fp32, bf16 or fp16")
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def keep_memory() -> bool:
    """Ask glibc to keep freed blocks instead of returning them to the kernel; call before the first big tensor.

    By default every large temporary is mapped, page-faulted and unmapped anew, a fifth of a CPU training step. The
    price is a heap that never shrinks. Returns whether this C library has the switches.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # no such C library, or another kind of system
        return False
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, -1) and mallopt(m_top_pad, 64 << 20))


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: of the GPU's allocator, or of this process's resident memory on a CPU. MPS tells what
    is held now; 0 where a system does not tell (Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource
    except ImportError:
        return 0

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
