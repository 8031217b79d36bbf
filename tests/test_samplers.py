"""Noise schedules and samplers, against golden trajectories of the released code and of diffusers, and against a
Gaussian whose probability-flow solution is known in closed form."""

import json

import diffusers
import pytest
import torch
from conftest import close
from safetensors.torch import load_file

from nanomed.diffusion import samplers
from nanomed.diffusion.guidance import guided, self_conditioned
from nanomed.diffusion.process import Diffusion
from nanomed.weights import WeightsError

MSDM = dict(beta_start=0.002, beta_end=0.02, schedule="scaled_linear", spacing="msdm")

# What each golden run of schedulers.json needs beyond the fields that carry over by name.
RUNS = {
    "pixart_alpha": (samplers.dpmpp_2m, {}),
    "kandinsky22_prior": (samplers.unclip, dict(schedule="squaredcos", prediction="sample", spacing="unclip")),
    "kandinsky22_decoder": (samplers.ddpm, {}),
    "kandinsky3": (samplers.ddpm, dict(schedule="squaredcos")),
    "sd1": (samplers.pndm, {}),
    "sdxl": (samplers.euler, {}),
    "hunyuan_v1_1": (samplers.ddpm, dict(prediction="v")),
    "hunyuan_v1_2": (samplers.ddpm, dict(prediction="v")),
}


class Recorded:
    """A noise source that draws from one generator, in order."""

    def __init__(self, generator):
        self.generator = generator

    def randn(self, *shape):
        return torch.randn(1, *shape, generator=self.generator)


def from_config(config: dict, **more) -> Diffusion:
    names = {"beta_start": "beta_start", "beta_end": "beta_end", "beta_schedule": "schedule",
             "timestep_spacing": "spacing", "steps_offset": "offset"}  # fmt: skip
    settings = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    if config.get("clip_sample"):
        settings["clip"] = config["clip_sample_range"]
    if config.get("set_alpha_to_one") is False:  # then abar after the last step is abar_0
        first = Diffusion(**{k: settings[k] for k in ("beta_start", "beta_end", "schedule")})
        settings["final_alpha"] = first.alphas_cumprod[0].item()
    return Diffusion(**settings | more)


def golden_runs(path="tests/golden/schedulers.json"):
    from pathlib import Path

    runs = json.loads((Path(__file__).parent / "golden" / "schedulers.json").read_text())
    return [(name, steps) for name in RUNS for steps in runs[name]["runs"]]


@pytest.mark.parametrize("name, steps", golden_runs())
def test_every_published_scheduler_is_reproduced_step_for_step(golden, name, steps):
    """Grid, alphas and final sample of diffusers' scheduler, to 1e-5, with the same fake network and noise."""
    record = json.loads((golden / "schedulers.json").read_text())[name]
    run = record["runs"][steps]
    sampler, more = RUNS[name]
    diffusion = from_config(record["config"], **more)
    first, middle, last = record["alphas_cumprod_first_mid_last"]
    for t, expected in ((0, first), (499, middle), (999, last)):
        assert diffusion.alphas_cumprod[t].item() == pytest.approx(expected, rel=2e-5)

    visited, means = [], []

    def denoise(x, t):
        visited.append(t.item())
        means.append(x.mean().item())
        return torch.sin(0.7 * x + 0.001 * t)

    generator = torch.Generator().manual_seed(0)
    shape = (1, 16) if name == "kandinsky22_prior" else (1, 4, 2, 2)
    x = torch.randn(*shape, generator=generator)
    out = sampler(denoise, diffusion, x, int(steps), Recorded(generator))
    assert visited == run["timesteps"]
    close(out.flatten(), torch.tensor(run["final"]), 1e-5)


def test_msdm_schedule_equals_the_released_one(golden):
    record = load_file(golden / "schedule.safetensors")
    diffusion = Diffusion(**MSDM)
    close(diffusion.alphas_cumprod, record["alphas_cumprod"], 1e-6)
    close(diffusion.noised(record["x0"], record["t"], record["eps"]), record["xt"], 1e-6)
    assert diffusion.snr(torch.tensor([0])).item() == pytest.approx(499.006, rel=1e-5)
    assert diffusion.snr(torch.tensor([999])).item() == pytest.approx(7.4708e-5, rel=1e-4)


def test_msdm_sampler_equals_the_released_trajectory(golden):
    """10 steps, guidance 3.5 in the paper's convention = 4.5 on the standard scale, the recorded noise replayed."""
    record = load_file(golden / "sampler10.safetensors")
    uncond, cond = record["cond"].chunk(2)

    def network(x, t, c):
        return 0.5 * torch.tanh(x) + 0.3 * t.view(-1, 1, 1, 1) / 1000 + c.mean((1, 2)).view(-1, 1, 1, 1)

    class Replay:
        draws = iter(record["ddim_noise"])

        def randn(self, *shape):
            return next(self.draws)

    diffusion = Diffusion(**MSDM)
    assert diffusion.timesteps(10) == record["timesteps"].tolist()[::-1]
    denoise = guided(network, {"c": cond}, {"c": uncond}, 4.5)
    replay = Replay()
    out = samplers.ddim(denoise, diffusion, record["xT"], 10, replay, eta=1.0)
    close(out, record["x0"], 1e-5)
    assert next(replay.draws, None) is None  # every recorded draw was used


def test_msdm_grid_of_150_steps():
    grid = Diffusion(**MSDM).timesteps(150)[::-1]
    assert grid[:12] == [0, 6, 13, 20, 26, 33, 40, 46, 53, 60, 67, 73]
    assert grid[-8:] == [952, 958, 965, 972, 978, 985, 992, 999]


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v"])
def test_estimates_invert_the_noising(prediction):
    """From the exact target the network would output, x_0 and epsilon come back."""
    diffusion = Diffusion(prediction=prediction)
    x0, noise = torch.randn(4, 3, 5, dtype=torch.float64), torch.randn(4, 3, 5, dtype=torch.float64)
    t = torch.tensor([0, 10, 500, 900])
    x = diffusion.noised(x0, t, noise)
    x0_hat, noise_hat = diffusion.estimates(diffusion.target(x0, t, noise), x, t)
    close(x0_hat, x0, 1e-4)  # abar is held in float32
    close(noise_hat, noise, 1e-4)


@pytest.mark.parametrize("sampler, bound", [("ddim", 0.014), ("dpmpp_2m", 0.0015), ("euler", 0.014), ("pndm", 5e-4)])
def test_deterministic_samplers_solve_the_probability_flow_of_a_gaussian(sampler, bound):
    """For data N(0, s^2) the exact epsilon is known, and the flow maps x_T to x_T s / sqrt(abar s^2 + 1 - abar):
    every solver must land there, with an error that falls with the number of steps. The bounds at 250 steps also rank
    the first-order solvers behind the multistep ones."""
    s = 0.5
    diffusion = Diffusion(0.00085, 0.012, "scaled_linear", spacing="leading", offset=1)
    abar = diffusion.alphas_cumprod.double()

    def denoise(x, t):
        a = abar[t].view(-1, 1)
        return (1 - a).sqrt() / (a * s**2 + 1 - a) * x

    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1)
    errors = []
    for steps in (10, 250):
        start = abar[diffusion.timesteps(steps)[0]]
        exact = x * s / (start * s**2 + 1 - start).sqrt()
        errors.append((getattr(samplers, sampler)(denoise, diffusion, x, steps) - exact).abs().max().item())
    assert errors[1] < bound
    assert errors[1] < errors[0] / 10


def test_guidance_of_one_is_the_conditional_branch_and_is_linear_in_the_scale():
    def network(x, t, c):
        return x * 2 + c

    cond, null = {"c": torch.ones(2, 1)}, {"c": torch.zeros(2, 1)}
    x, t = torch.randn(2, 3), torch.tensor([5, 5])
    assert torch.equal(guided(network, cond, null, 1)(x, t), 2 * x + 1)
    close(guided(network, cond, null, 4.5)(x, t), 2 * x + 4.5, 1e-6)


def test_self_conditioning_starts_with_zeros_and_then_carries_the_estimate():
    diffusion = Diffusion(**MSDM)
    seen = []

    def denoise(x, t, self_cond):
        seen.append(self_cond)
        return 0.1 * x

    start = torch.randn(2, 4)
    samplers.ddim(self_conditioned(denoise, diffusion), diffusion, start, 3)
    assert torch.equal(seen[0], torch.zeros(2, 4)) and len(seen) == 3
    expected = diffusion.estimates(0.1 * start, start, torch.tensor([999, 999]))[0]
    assert torch.equal(seen[1], expected) and not torch.equal(seen[1], seen[2])


def test_samplers_are_differentiable_from_end_to_end():
    weight = torch.ones((), requires_grad=True, dtype=torch.float64)
    diffusion = Diffusion()
    x = torch.randn(2, 3, dtype=torch.float64)

    def loss(w):
        return samplers.dpmpp_2m(lambda x, t: torch.tanh(w * x), diffusion, x, 4).square().sum()

    (gradient,) = torch.autograd.grad(loss(weight), weight)
    h = 1e-5
    numeric = (loss(weight.detach() + h) - loss(weight.detach() - h)) / (2 * h)
    assert gradient.item() == pytest.approx(numeric.item(), rel=1e-6)


def test_min_snr_weights_follow_the_prediction_type():
    t = torch.tensor([0, 500, 999])
    for prediction, expected in (("epsilon", lambda s: s.clamp(max=5) / s), ("sample", lambda s: s.clamp(max=5)),
                                 ("v", lambda s: s.clamp(max=5) / (s + 1))):  # fmt: skip
        diffusion = Diffusion(prediction=prediction)
        close(diffusion.min_snr_weight(t, 5.0), expected(diffusion.snr(t)), 1e-6)


def test_steps_outside_the_table_are_refused():
    with pytest.raises(ValueError, match="steps = 0"):
        Diffusion().timesteps(0)


# ---------------------------------------------------------------------------------------- Stable Diffusion's own files

LATENT = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
              steps_offset=1, trained_betas=None, set_alpha_to_one=False)  # fmt: skip
STATED = {  # `scheduler_config.json` as published
    "sd14": LATENT | dict(_class_name="PNDMScheduler", skip_prk_steps=True),
    "sd15": LATENT | dict(_class_name="PNDMScheduler", skip_prk_steps=True, clip_sample=False),
    "sdxl": LATENT | dict(_class_name="EulerDiscreteScheduler", clip_sample=False, interpolation_type="linear",
                          prediction_type="epsilon", sample_max_value=1.0, skip_prk_steps=True,
                          timestep_spacing="leading", use_karras_sigmas=False),
    "ddim": LATENT | dict(_class_name="DDIMScheduler", clip_sample=False, skip_prk_steps=True),
    "ddim_v": LATENT | dict(_class_name="DDIMScheduler", clip_sample=False, prediction_type="v_prediction"),
    "ddpm": LATENT | dict(_class_name="DDPMScheduler", clip_sample=False),
}  # fmt: skip
BY_CLASS = {"PNDMScheduler": samplers.pndm, "EulerDiscreteScheduler": samplers.euler, "DDIMScheduler": samplers.ddim,
            "DDPMScheduler": samplers.ddpm}  # fmt: skip


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 20, 50, 150])
@pytest.mark.parametrize("name", STATED)
def test_stable_diffusions_schedulers_are_followed_from_their_files(tmp_path, name, steps):
    """Every input of the network and the last sample, to 1e-5, on the file as it is published: the grid, where it
    ends, the deviation Euler starts with and the scale of what its network sees."""
    (tmp_path / "scheduler_config.json").write_text(json.dumps(STATED[name]))
    scheduler = getattr(diffusers, STATED[name]["_class_name"]).from_pretrained(tmp_path)
    scheduler.set_timesteps(steps)
    torch.manual_seed(0)
    start = torch.randn(3, 4, 2, 2)
    seen, expected = [], []

    def network(x, t):
        return torch.sin(0.7 * x + 0.001 * t.view(-1, 1, 1, 1))

    generator = torch.Generator().manual_seed(1)
    x = start * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        expected.append((scaled, int(t)))
        more = {"generator": generator} if "ddpm" in name else {}
        x = scheduler.step(network(scaled, t.expand(3)), t, x, **more).prev_sample

    class Drawn:
        generator = torch.Generator().manual_seed(1)

        def randn(self, *shape):
            return torch.randn(3, *shape, generator=self.generator)

    def denoise(x, t):
        seen.append((x, t[0].item()))
        return network(x, t)

    diffusion = Diffusion.from_json(tmp_path)
    out = BY_CLASS[STATED[name]["_class_name"]](denoise, diffusion, start, steps, Drawn())
    assert [t for _, t in seen] == [t for _, t in expected]
    for (a, _), (b, _) in zip(seen, expected):
        close(a, b, 1e-5)
    close(out, x, 1e-5)


@pytest.mark.parametrize(
    "name, change, says",
    [
        ("sd15", {"skip_prk_steps": False}, "skip_prk_steps = False"),
        ("sd15", {"timestep_spacing": "trailing"}, "timestep_spacing = 'trailing'"),
        ("sd15", {"prediction_type": "v_prediction"}, "prediction_type = 'v_prediction'"),
        ("ddim", {"timestep_spacing": "linspace"}, "timestep_spacing = 'linspace'"),
        ("sdxl", {"timestep_spacing": "linspace"}, "timestep_spacing = 'linspace'"),
        ("sdxl", {"interpolation_type": "log_linear"}, "interpolation_type = 'log_linear'"),
        ("sdxl", {"timestep_type": "continuous"}, "timestep_type = 'continuous'"),
        ("sdxl", {"use_karras_sigmas": True}, "use_karras_sigmas = True"),
        ("sdxl", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr = True"),
        ("sdxl", {"_class_name": "EulerAncestralDiscreteScheduler"}, "EulerAncestralDiscreteScheduler"),
    ],
)
def test_what_a_scheduler_asks_for_and_is_not_known_is_refused_by_name(name, change, says):
    with pytest.raises(WeightsError, match=says):
        Diffusion.from_settings(STATED[name] | change, "scheduler")


def test_a_grid_that_leaves_the_table_is_refused():
    with pytest.raises(ValueError, match="offset of 1"):
        Diffusion(spacing="leading", offset=1).timesteps(1000)
