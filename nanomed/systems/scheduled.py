"""Systems that draw as a published `scheduler_config.json` says: Stable Diffusion and Kandinsky 3."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from nanomed.diffusion import samplers
from nanomed.diffusion.guidance import guided
from nanomed.systems.assembly import Found
from nanomed.systems.base import System


class Scheduled(System):
    """A system with a `unet` that draws as its folder's `scheduler_config.json` says, or by another sampler on the
    same noise.

    scheduler  settings of noise and sampler, in the words of that file
    guidance   on the standard scale, 1 = none
    """

    defaults = dict(dropout=0.0, snr_gamma=0.0)
    denoiser = "unet"
    own_sampler = False

    def __init__(self, found: Found, **settings: Any):
        super().__init__(found, **settings)
        self.diffusion, _ = samplers.chosen(self.scheduler, "scheduler")

    @classmethod
    def stated(cls, place: Callable[[str], Path]) -> dict:
        return {"scheduler": samplers.read_scheduler(place("scheduler"))}

    def sample(
        self,
        prompts: list[str],
        noise: samplers.Noise,
        steps: int | None = None,
        guidance: float | None = None,
        negative_prompts: list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        sampler: str = "",
    ) -> Tensor:
        """Draw one image for each prompt: (B, 3, height, width) in [0, 1], of the size of `latent_size`.

        `noise.randn` is asked for the initial latents, and by "ddpm" then once a step. `sampler` is one of
        samplers.SAMPLERS in place of the scheduler's own.
        """
        if negative_prompts and len(negative_prompts) != len(prompts):
            raise ValueError(f"{len(negative_prompts)} negative prompts for {len(prompts)} prompts")
        height, width = height or self.size, width or self.size
        diffusion, draw = samplers.chosen(self.scheduler, "scheduler", sampler)
        x = noise.randn(*self.latent_size(height, width))
        cond, null = self.conditions(prompts, negative_prompts, height, width)
        denoise = self.noise_of(guided(self.unet, cond, null, self.guidance if guidance is None else guidance))
        return self.to_unit(self.decode(draw(denoise, diffusion, x, steps or self.steps, noise)))
