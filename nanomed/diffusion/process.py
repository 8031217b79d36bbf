"""The noising process, and what a network says about it.

    q(x_t | x_0) = N( sqrt(abar_t) x_0, (1 - abar_t) I )            Ho et al. 2020, eq. 4

A `Diffusion` is the table abar_0 .. abar_999 with a convention: what the network predicts (epsilon, the sample, or v),
which timesteps a sampler visits, and whether the estimate of x_0 is clamped. It knows no network. `guided` and
`self_conditioned` are closures around a network; samplers (samplers.py) call the closure and know neither.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nanomed.weights import WeightsError, settings

Cond = dict[str, Tensor]  # what a denoiser is conditioned on, batch first: denoiser(x, t, **cond)
Denoise = Callable[[Tensor, Tensor], Tensor]  # (x_t, t int64 (B,)) -> the network's prediction


@dataclass
class Diffusion:
    """A discrete Gaussian diffusion, from the settings that a `scheduler_config.json` holds.

    schedule     "linear" | "scaled_linear" | "squaredcos"; the last ignores beta_start and beta_end
    prediction   "epsilon" | "sample" | "v": the network's target
    spacing      the grid of `timesteps(steps)`: "msdm" | "linspace" | "leading" | "inner" | "unclip"
    offset       added to the "leading" and "inner" grids
    clip         clamp x_0 estimates to [-clip, clip]; 0 = never
    threshold    dynamic thresholding quantile (Saharia et al. 2022), 0 = off; replaces the clamp, and `clip` is then
                 the most that it divides by
    variance     of an ancestral step: "fixed_small" (the posterior's), "fixed_large" (beta), or "learned_range", where
                 a second half of the channels says how far between the two (Nichol & Dhariwal 2021, eq. 15)
    final_alpha  abar where DDIM and PNDM end: 1, or abar_0 as Stable Diffusion's files have it; the others end at 1
    """

    beta_start: float = 1e-4
    beta_end: float = 0.02
    schedule: str = "linear"
    prediction: str = "epsilon"
    spacing: str = "linspace"
    offset: int = 0
    clip: float = 0.0
    threshold: float = 0.0
    variance: str = "fixed_small"
    final_alpha: float = 1.0
    length: int = 1000
    betas: Tensor = field(init=False, repr=False)  # (length,) float32
    alphas_cumprod: Tensor = field(init=False, repr=False)  # (length,) float32

    def __post_init__(self) -> None:
        with torch.device("cpu"):  # a system that is built on the meta device has its schedule all the same
            self.betas = self._betas().float()  # rounded before the product, as every published scheduler does
            self.alphas_cumprod = torch.cumprod(1 - self.betas, 0)
        self.abars: list[float] = self.alphas_cumprod.tolist()  # for the samplers' arithmetic, which is the host's
        self._on_device: dict[torch.device, Tensor] = {}

    @classmethod
    def from_json(cls, path: str | Path) -> "Diffusion":
        """Read a published `scheduler_config.json`, or the one in a folder: of a class in `PUBLISHED`.

        Raises WeightsError where it is missing or asks for what is not known here.
        """
        path = Path(path)
        path = path / "scheduler_config.json" if path.is_dir() else path
        return cls.from_settings(settings(path, "a scheduler"), str(path))

    @classmethod
    def from_settings(cls, stated: dict, where: str) -> "Diffusion":
        """The same, of the settings themselves; `where` they stand is for messages."""
        try:
            said = PUBLISHED[stated["_class_name"]] | stated
        except (TypeError, KeyError) as error:
            raise WeightsError(
                f"{where}: not one of {', '.join(PUBLISHED)} ({type(error).__name__}: {error})"
            ) from error
        for name, known in (KNOWN | OF_CLASS.get(said["_class_name"], {})).items():
            if said.get(name, known[0]) not in known:
                raise WeightsError(f"{where}: {name} = {said[name]!r} is not known here")
        spacing, solver = said["timestep_spacing"], said["_class_name"] == "DPMSolverMultistepScheduler"
        if spacing == "linspace" and not solver:
            spacing = "unclip"  # linspace there leaves out the clean end, here it ends at 0
        if spacing == "leading" and solver:
            spacing = "inner"
        clips = said["clip_sample"] and said["_class_name"] in CLIPPING
        limit = said["sample_max_value"] if said["thresholding"] else clips and said["clip_sample_range"]
        diffusion = cls(
            said["beta_start"],
            said["beta_end"],
            said["beta_schedule"].removesuffix("_cap_v2"),
            said["prediction_type"].removesuffix("_prediction"),
            spacing,
            said["steps_offset"],
            clip=float(limit),
            threshold=said["dynamic_thresholding_ratio"] if said["thresholding"] else 0.0,
            variance=(said["variance_type"] or "fixed_small").removesuffix("_log"),
            length=said["num_train_timesteps"],
        )
        if not said["set_alpha_to_one"]:
            diffusion.final_alpha = diffusion.alphas_cumprod[0].item()
        return diffusion

    def _betas(self) -> Tensor:
        if self.schedule == "linear":
            return torch.linspace(self.beta_start, self.beta_end, self.length, dtype=torch.float64)
        if self.schedule == "scaled_linear":
            ends = math.sqrt(self.beta_start), math.sqrt(self.beta_end)
            return torch.linspace(*ends, self.length, dtype=torch.float64) ** 2
        if self.schedule == "squaredcos":  # Nichol & Dhariwal 2021, eq. 17, betas capped at 0.999
            u = torch.arange(self.length + 1, dtype=torch.float64) / self.length
            abar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
            return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
        raise ValueError(f"noise schedule {self.schedule!r} is not linear, scaled_linear or squaredcos")

    def timesteps(self, steps: int) -> list[int]:
        """The descending grid of `steps` timesteps that a sampler visits."""
        if not 1 <= steps <= self.length:
            raise ValueError(f"steps = {steps}: choose between 1 and {self.length}")
        last = self.length - 1
        if self.spacing == "msdm":  # floor(i 999 / (S - 1)), both ends included
            grid = [i * last // max(steps - 1, 1) for i in range(steps)] if steps > 1 else [last]
        elif self.spacing == "linspace":  # 0 is the clean end and is not visited
            grid = [round(i * last / steps) for i in range(1, steps + 1)]
        elif self.spacing == "leading":  # ends below 999: with 150 steps the first timestep is 895
            grid = [i * (self.length // steps) + self.offset for i in range(steps)]
            if grid[-1] > last:
                raise ValueError(f"steps = {steps}: with an offset of {self.offset} that leaves the table")
        elif self.spacing == "inner":  # of one step more, without its clean end: DPM-Solver's "leading"
            grid = [i * (self.length // (steps + 1)) + self.offset for i in range(1, steps + 1)]
        elif self.spacing == "unclip":
            grid = [round(i * last / max(steps - 1, 1)) for i in range(steps)] if steps > 1 else [0]
        else:
            raise ValueError(f"timestep spacing {self.spacing!r} is not msdm, linspace, leading, inner or unclip")
        return grid[::-1]

    def most_steps(self) -> int:
        """The most steps whose timesteps are all different, which solvers of a second order need."""
        for steps in range(self.length, 1, -1):
            try:
                if len(set(self.timesteps(steps))) == steps:
                    return steps
            except ValueError:
                continue
        return 1

    def abar(self, t: Tensor | int, like: Tensor) -> Tensor | float:
        """abar_t, shaped to multiply `like` (B, ...); a float for an int t."""
        if isinstance(t, int):
            return self.abars[t]
        if t.device not in self._on_device:
            self._on_device[t.device] = self.alphas_cumprod.to(t.device)
        return self._on_device[t.device][t].view(-1, *[1] * (like.ndim - 1))

    def noised(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, for t (B,)."""
        abar = self.abar(t, x0)
        return abar.sqrt() * x0 + (1 - abar).sqrt() * noise

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network should output at x_t; v is Salimans & Ho 2022, eq. in section 4."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return x0
        abar = self.abar(t, x0)
        return abar.sqrt() * noise - (1 - abar).sqrt() * x0

    def estimates(self, prediction: Tensor, x: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor]:
        """The pair (x_0, epsilon) that the prediction implies at x_t; x_0 clamped as the settings say."""
        abar = self.abar(t, x)
        signal, sigma = abar**0.5, (1 - abar) ** 0.5
        if self.prediction == "epsilon":
            x0, noise = (x - sigma * prediction) / signal, prediction
        elif self.prediction == "sample":
            x0, noise = prediction, (x - signal * prediction) / sigma
        else:
            x0, noise = signal * x - sigma * prediction, signal * prediction + sigma * x
        if self.threshold:
            limit = x0.flatten(1).abs().float().quantile(self.threshold, dim=1).to(x0.dtype)
            limit = limit.clamp(1.0, self.clip or 1.0).view(-1, *[1] * (x0.ndim - 1))
            x0 = x0.clamp(-limit, limit) / limit
        elif self.clip:
            x0 = x0.clamp(-self.clip, self.clip)
        return x0, noise

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio abar / (1 - abar), (B,)."""
        abar = torch.as_tensor(self.abar(t, t))
        return abar / (1 - abar)

    def min_snr_weight(self, t: Tensor, gamma: float) -> Tensor:
        """Min-SNR-gamma loss weights (B,), Hang et al. 2023, section 3.4: the x_0 weight min(SNR, gamma), divided by
        SNR for a network that predicts epsilon and by SNR + 1 for v."""
        snr = self.snr(t)
        divide = {"epsilon": snr, "sample": torch.ones_like(snr), "v": snr + 1}[self.prediction]
        return snr.clamp(max=gamma) / divide


# What a scheduler's file means where it is silent, by its class.
_DDPM = dict(
    num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", prediction_type="epsilon",
    timestep_spacing="leading", steps_offset=0, clip_sample=True, clip_sample_range=1.0, thresholding=False,
    dynamic_thresholding_ratio=0.995, sample_max_value=1.0, variance_type="fixed_small",
    set_alpha_to_one=True,
)  # fmt: skip
PUBLISHED = {
    "DDPMScheduler": _DDPM,
    "UnCLIPScheduler": _DDPM | dict(beta_schedule="squaredcos_cap_v2", timestep_spacing="linspace"),
    "DPMSolverMultistepScheduler": _DDPM | dict(clip_sample=False, timestep_spacing="linspace", variance_type=None),
    "DDIMScheduler": _DDPM,
    "PNDMScheduler": _DDPM | dict(clip_sample=False, skip_prk_steps=False, set_alpha_to_one=False),
    "EulerDiscreteScheduler": _DDPM | dict(clip_sample=False, timestep_spacing="linspace"),
}
CLIPPING = ("DDPMScheduler", "UnCLIPScheduler", "DDIMScheduler")  # the others leave x_0 alone, whatever a file says
KNOWN: dict[str, tuple] = {  # settings and their values that carry over; the first is what silence means
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "timestep_spacing": ("leading", "linspace"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "learned_range", None),
    "trained_betas": (None,),
    "rescale_betas_zero_snr": (False, None),
    "algorithm_type": ("dpmsolver++",),
    "solver_order": (2,),
    "solver_type": ("midpoint",),
    "lower_order_final": (True,),
    "euler_at_final": (False,),
    **dict.fromkeys(["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas",
                     "use_flow_sigmas"], (False, None)),
    "final_sigmas_type": ("zero",),
}  # fmt: skip
_LEADING = {"timestep_spacing": ("leading",)}  # on other grids these go to timesteps of their own, not to the next one
OF_CLASS: dict[str, dict[str, tuple]] = {
    "DDIMScheduler": _LEADING,
    "PNDMScheduler": _LEADING | {"skip_prk_steps": (True,), "prediction_type": ("epsilon",)},
    "EulerDiscreteScheduler": _LEADING | {"interpolation_type": ("linear",), "timestep_type": ("discrete",),
                                         "sigma_min": (None,), "sigma_max": (None,)},
}  # fmt: skip
