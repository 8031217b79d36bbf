"""Closures around a denoiser: classifier-free guidance and self-conditioning. Samplers call them and know neither."""

from collections.abc import Callable

import torch
from torch import Tensor

from nanomed.diffusion.process import Cond, Denoise, Diffusion


def guided(
    denoiser: Callable[..., Tensor], cond: Cond, null: Cond, scale: float, channels: int | None = None
) -> Callable[..., Tensor]:
    """Classifier-free guidance (Ho & Salimans 2022): null + scale (cond - null), on the scale where 1 means none.

    Papers that write (1 + g) cond - g null count from 0: their g is scale - 1. The two branches share one call of the
    network, null first. Keyword arguments of the closure go to both branches.

    channels   how many of the first channels are guided; the others (a learned variance) are those of `cond`
    """
    if scale == 1:
        return lambda x, t, **extra: denoiser(x, t, **cond, **extra)
    both = {name: torch.cat([null[name], cond[name]]) for name in cond}

    def denoise(x: Tensor, t: Tensor, **extra: Tensor) -> Tensor:
        doubled = {name: torch.cat([value, value]) for name, value in extra.items()}
        out = denoiser(torch.cat([x, x]), torch.cat([t, t]), **both, **doubled)
        without, with_prompt = out.chunk(2)
        mixed = torch.lerp(without[:, :channels], with_prompt[:, :channels], scale)
        return mixed if channels is None else torch.cat([mixed, with_prompt[:, channels:]], dim=1)

    return denoise


def self_conditioned(denoise: Callable[..., Tensor], diffusion: Diffusion) -> Denoise:
    """Feed the previous step's estimate of x_0 back in as `self_cond` (Chen et al. 2023); zeros on the first step.

    The closure remembers, so make one per sample.
    """
    previous = None

    def step(x: Tensor, t: Tensor) -> Tensor:
        nonlocal previous
        out = denoise(x, t, self_cond=torch.zeros_like(x) if previous is None else previous)
        previous = diffusion.estimates(out, x, t)[0]
        return out

    return step
