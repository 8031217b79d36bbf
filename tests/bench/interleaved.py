"""Two programs in turns: medians of several runs each, and how far their results differ."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def compare(
    name: str, here: Callable[[], Tensor], there: Callable[[], Tensor], repeats: int, device: str
) -> tuple[float, float]:
    """Print seconds of both, how many times as fast `here` is, and the largest difference between their results.
    Returns the seconds."""
    results = [run() for run in (here, there)]  # and the warm-up
    seconds: dict[Callable, list[float]] = {here: [], there: []}
    for _ in range(repeats):
        for run in (here, there):
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            seconds[run].append(time.perf_counter() - start)
    a, b = (statistics.median(seconds[run]) for run in (here, there))
    error = (results[0].float() - results[1].float()).abs().max().item()
    print(f"{name:28} {a:>8.3f}s {b:>9.3f}s {b / a:>6.3f}x   {error:.1e}", flush=True)
    return a, b
