"""Samplers: from noise to a sample, each a pure function of a denoiser.

    sampler(denoise, diffusion, x, steps, noise) -> x_0

`denoise(x_t, t)` is any closure that returns the network's prediction for t int64 (B,); `x` is the initial standard
normal noise (B, ...); `noise.randn(*shape)` gives a (B, *shape) draw, asked once per stochastic step. Nothing here
turns gradients off: the caller decides, so a loss on the sample can be back-propagated through every step.

Notation: a = abar_t at this step's timestep, b = abar of the step it goes to.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from nanomed.diffusion.process import KNOWN, OF_CLASS, PUBLISHED, Denoise, Diffusion
from nanomed.weights import WeightsError, settings


class Noise(Protocol):
    """Where every random number of a sample comes from."""

    def randn(self, *shape: int) -> Tensor:
        """Standard normals, (B, *shape)."""


def _at(t: int, x: Tensor) -> Tensor:
    return torch.full((len(x),), t, dtype=torch.int64, device=x.device)


def _alphas(diffusion: Diffusion, grid: list[int], final: float | None = None) -> list[float]:
    """abar at each timestep of the grid and then after the last step, as floats."""
    return [diffusion.abars[t] for t in grid] + [diffusion.final_alpha if final is None else final]


def ddim(
    denoise: Denoise, diffusion: Diffusion, x: Tensor, steps: int, noise: Noise | None = None, eta: float = 0.0
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12). eta = 0 is deterministic; eta = 1 draws noise at all steps but the last.

    With the "msdm" grid and eta = 1 this is the sampler of the MSDM paper (150 steps): its last timestep is 0, where
    the estimate of x_0 is returned as it is.
    """
    grid = diffusion.timesteps(steps)
    for t, (a, b) in zip(grid, pairwise(_alphas(diffusion, grid))):
        x0, epsilon = diffusion.estimates(denoise(x, _at(t, x)), x, t)
        if b == 1:
            return x0
        variance = eta**2 * (1 - b) / (1 - a) * (1 - a / b)
        x = b**0.5 * x0 + (1 - b - variance) ** 0.5 * epsilon
        if eta:
            x = x + variance**0.5 * noise.randn(*x.shape[1:])
    return x


def ddpm(denoise: Denoise, diffusion: Diffusion, x: Tensor, steps: int, noise: Noise) -> Tensor:
    """Ancestral sampling from the posterior q(x_s | x_t, x_0) (Ho et al. 2020, eq. 7), on any grid of timesteps.

    Noise is drawn wherever t > 0, so on a grid that ends at t = 1 also at the last step, where its variance is the
    floor 1e-20: as the reference does, which keeps the two aligned draw by draw.
    """
    abar = torch.tensor(_alphas(diffusion, diffusion.timesteps(steps), 1.0))
    return _ancestral(denoise, diffusion, x, steps, noise, 1 - abar[:-1] / abar[1:])


def unclip(denoise: Denoise, diffusion: Diffusion, x: Tensor, steps: int, noise: Noise) -> Tensor:
    """The sampler of the unCLIP and Kandinsky priors: `ddpm`, but a step that goes from t to t - 1 takes beta_t from
    the schedule. In exact arithmetic it is the same number; in float32 the last step, from t = 0, differs by 1e-3."""
    grid = diffusion.timesteps(steps)
    abar = torch.tensor(_alphas(diffusion, grid, 1.0))
    betas = 1 - abar[:-1] / abar[1:]
    for i, (t, s) in enumerate(pairwise([*grid, -1])):
        if s == t - 1:
            betas[i] = diffusion.betas[t]
    return _ancestral(denoise, diffusion, x, steps, noise, betas)


def _ancestral(denoise: Denoise, diffusion: Diffusion, x: Tensor, steps: int, noise: Noise, betas: Tensor) -> Tensor:
    """x <- posterior mean of (x_0, x) + deviation * noise, with one beta (steps,) for each step."""
    grid = diffusion.timesteps(steps)
    abar = torch.tensor(_alphas(diffusion, grid, 1.0))  # float32, as the references compute their coefficients
    a, b = abar[:-1], abar[1:]
    of_x0 = (b.sqrt() * betas / (1 - a)).tolist()
    of_x = ((1 - betas).sqrt() * (1 - b) / (1 - a)).tolist()
    smallest = ((1 - b) / (1 - a) * betas).clamp(min=1e-20)
    deviation = (betas if diffusion.variance == "fixed_large" else smallest).sqrt().tolist()
    low, high = smallest.log().tolist(), betas.log().tolist()
    for i, t in enumerate(grid):
        prediction = denoise(x, _at(t, x))
        if diffusion.variance == "learned_range":
            prediction, between = prediction.chunk(2, dim=1)  # in [-1, 1], nominally
            deviation[i] = (0.5 * (low[i] + (high[i] - low[i]) * (between + 1) / 2)).exp()
        x0, _ = diffusion.estimates(prediction, x, t)
        x = of_x0[i] * x0 + of_x[i] * x
        if t > 0:
            x = x + deviation[i] * noise.randn(*x.shape[1:])
    return x


def dpmpp_2m(denoise: Denoise, diffusion: Diffusion, x: Tensor, steps: int, noise: Noise | None = None) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2, midpoint form); deterministic.

    With signal alpha_t, noise sigma_t and lambda = log(alpha / sigma), the exact solution for a constant x_0 is
        x' = (sigma' / sigma) x - alpha' (exp(-h) - 1) x_0,     h = lambda' - lambda,
    and second order extrapolates x_0 from this step and the one before. The first step has no step before it; the
    last ends at sigma = 0, where x' = x_0.
    """
    grid = diffusion.timesteps(steps)
    log_snr = [0.5 * math.log(a / (1 - a)) for a in _alphas(diffusion, grid)[:-1]]
    before, h_before = None, None
    for i, (t, (a, b)) in enumerate(zip(grid, pairwise(_alphas(diffusion, grid)))):
        x0, _ = diffusion.estimates(denoise(x, _at(t, x)), x, t)
        if i == steps - 1:
            return x0
        h = log_snr[i + 1] - log_snr[i]
        extrapolated = x0 if before is None else x0 + 0.5 * h / h_before * (x0 - before)
        x = ((1 - b) / (1 - a)) ** 0.5 * x - b**0.5 * math.expm1(-h) * extrapolated
        before, h_before = x0, h
    return x


def euler(denoise: Denoise, diffusion: Diffusion, x: Tensor, steps: int, noise: Noise | None = None) -> Tensor:
    """Euler's method on dx/dsigma = epsilon (Karras et al. 2022, algorithm 1 without churn), in the variable
    x / sqrt(abar) whose noise level is sigma = sqrt((1 - abar) / abar). SDXL's sampler."""
    grid = diffusion.timesteps(steps)
    sigmas = [((1 - a) / a) ** 0.5 for a in _alphas(diffusion, grid)[:-1]] + [0.0]
    x = x * (sigmas[0] ** 2 + 1) ** 0.5
    for t, (sigma, to) in zip(grid, pairwise(sigmas)):
        scaled = x / (sigma**2 + 1) ** 0.5
        _, epsilon = diffusion.estimates(denoise(scaled, _at(t, x)), scaled, t)
        x = x + (to - sigma) * epsilon
    return x


def pndm(denoise: Denoise, diffusion: Diffusion, x: Tensor, steps: int, noise: Noise | None = None) -> Tensor:
    """Pseudo linear multistep (Liu et al. 2022, eq. 9 and 12) as Stable Diffusion 1.x runs it: steps + 1 network
    calls, because the first step is redone with the mean of the epsilons at its two ends."""
    grid = diffusion.timesteps(steps)
    alphas = _alphas(diffusion, grid)

    def transfer(x: Tensor, epsilon: Tensor, a: float, b: float) -> Tensor:  # eq. 9
        return (b / a) ** 0.5 * x - (b - a) / (a * (1 - b) ** 0.5 + (a * (1 - a) * b) ** 0.5) * epsilon

    def epsilon_at(x: Tensor, t: int) -> Tensor:
        return diffusion.estimates(denoise(x, _at(t, x)), x, t)[1]

    history = [epsilon_at(x, grid[0])]
    first = transfer(x, history[0], alphas[0], alphas[1])
    if steps == 1:
        return first
    x = transfer(x, (history[0] + epsilon_at(first, grid[1])) / 2, alphas[0], alphas[1])
    for t, (a, b) in list(zip(grid, pairwise(alphas)))[1:]:
        history = [epsilon_at(x, t), *history[:3]]
        weights = {2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
        mixed = torch.as_tensor(sum(w * e for w, e in zip(weights[len(history)], history)))
        x = transfer(x, mixed, a, b)
    return x


SAMPLERS: dict[str, tuple[str, Callable[..., Tensor]]] = {  # the class of a scheduler's file that asks for it, and it
    "ddim": ("DDIMScheduler", ddim),
    "ddpm": ("DDPMScheduler", ddpm),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", dpmpp_2m),
    "euler": ("EulerDiscreteScheduler", euler),
    "pndm": ("PNDMScheduler", pndm),
}


def chosen(stated: dict, where: str, name: str = "") -> tuple[Diffusion, Callable[..., Tensor]]:
    """The noise and the sampler that a `scheduler_config.json` asks for, or another sampler on the same noise.

    stated   what stands in the file; where it is silent, the sampler's own class has the say, as in diffusers
    name     of `SAMPLERS`; "": the one of the file

    Raises WeightsError, with the setting's name, for a class or setting that is not known, and where the sampler
    cannot follow what the network predicts.
    """
    if name and name not in SAMPLERS:
        raise WeightsError(f"sampler {name!r} is not one of {', '.join(SAMPLERS)}")
    asked = SAMPLERS[name][0] if name else stated.get("_class_name")
    by_class = dict(SAMPLERS.values())
    if asked not in by_class:
        raise WeightsError(f"{where}: _class_name = {asked!r} is not one of {', '.join(by_class)}")
    return Diffusion.from_settings(stated | {"_class_name": asked}, where), by_class[asked]


def read_scheduler(folder: str | Path) -> dict:
    """What a folder's `scheduler_config.json` says, as far as anything here asks for it: `chosen` knows it all.

    Raises WeightsError where it is missing or damaged, or asks for what is not known.
    """
    path = Path(folder) / "scheduler_config.json"
    asked = {"_class_name", *KNOWN}.union(*PUBLISHED.values(), *OF_CLASS.values())
    stated = {name: value for name, value in settings(path, "a scheduler").items() if name in asked}
    chosen(stated, str(path))
    return stated
