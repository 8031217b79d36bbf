"""The colour loss and its way back through a sampler: exact gradients, in the memory of one forward pass.

Oracles: numpy for the formula, finite differences in double precision for the gradients, autograd with every
activation held for `recomputed`, torch's profiler for the memory.
"""

import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from nanomed.diffusion import hldf, samplers
from nanomed.diffusion.guidance import guided
from nanomed.diffusion.process import Diffusion

SIDE, TOKENS, WIDTH = 4, 5, 16


class Denoiser(nn.Module):
    """A transformer in miniature: latents attend to text, a time, two layers."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.read, self.write = nn.Linear(4, width), nn.Linear(width, 4)
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        self.calls += 1
        h = self.read(x.flatten(2).transpose(1, 2)) + torch.cos(t.to(x.dtype) / 100)[:, None, None]
        k, v = self.kv(states).chunk(2, -1)
        h = h + F.scaled_dot_product_attention(self.q(h), k, v, mask[:, None])
        h = h + self.down(F.gelu(self.up(h)))
        return self.write(h).transpose(1, 2).unflatten(2, x.shape[2:])


class Toy:
    """Text encoder, denoiser and decoder with every step of HLDF between them."""

    def __init__(self, dtype: torch.dtype = torch.float64, batch: int = 2, width: int = WIDTH, side: int = SIDE):
        torch.manual_seed(0)
        self.denoiser = Denoiser(width).to(dtype)
        self.text = nn.Linear(6, width).to(dtype)
        self.decoder = nn.Sequential(nn.ConvTranspose2d(4, 8, 2, 2), nn.Tanh(), nn.Conv2d(8, 3, 1)).to(dtype)
        self.decoder.requires_grad_(False)
        self.words = torch.randn(2, batch, TOKENS, 6, dtype=dtype)
        self.noise = torch.randn(batch, 4, side, side, dtype=dtype)
        self.images = torch.rand(batch, 3, 2 * side, 2 * side, dtype=dtype) * 2 - 1
        self.mask = torch.ones(batch, TOKENS, dtype=torch.bool)
        self.mask[:, -1] = False
        self.params = [*self.denoiser.parameters()]
        self.diffusion = Diffusion()

    def loss(self, make=None, steps: int = 20, scale: float = 4.5, sampler=samplers.dpmpp_2m, **options) -> Tensor:
        """`make` is what stands in `guided`'s place; None: hldf.recomputed."""
        states, nothing = (self.text(words) for words in self.words)
        cond, null = {"states": states, "mask": self.mask}, {"states": nothing, "mask": self.mask}
        if make is None:
            denoise = hldf.recomputed(self.denoiser, cond, null, scale, self.params, hldf.Calls(steps, **options))
        else:
            denoise = make(self.denoiser, cond, null, scale)
        latents = sampler(denoise, self.diffusion, self.noise, steps)
        return hldf.colour_loss(self.decoder(latents), hldf.colours(self.images)) / steps

    def gradients(self, *arguments, **options) -> Tensor:
        """Of all that trains, in one vector."""
        loss = self.loss(*arguments, **options)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*self.params, *self.text.parameters()])])


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# ------------------------------------------------------------------------------------------------- the colour loss


def test_colour_loss_is_equation_4():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 2, (3, 3, 5, 7)), rng.uniform(-1, 1, (3, 3, 8, 8))  # beyond [-1, 1], and of another size
    expected = 0.0
    for x, y in zip(a, b):
        for c in range(3):
            expected += (x[c].mean() - y[c].mean()) ** 2 + (x[c].std(ddof=1) - y[c].std(ddof=1)) ** 2
    expected /= 3  # images
    images, targets = torch.from_numpy(a), hldf.colours(torch.from_numpy(b))
    loss = hldf.colour_loss(images, targets)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    released = hldf.colour_loss(images, targets, channels="mean")
    assert released.item() == pytest.approx(expected / 3, rel=1e-12)
    with pytest.raises(ValueError, match="sum"):
        hldf.colour_loss(images, targets, channels="max")


@pytest.mark.parametrize("channels", ["sum", "mean"])
def test_colour_loss_gradient_against_finite_differences(channels):
    torch.manual_seed(1)
    images = (3 * torch.randn(2, 3, 4, 4, dtype=torch.float64)).requires_grad_()
    targets = hldf.colours(torch.rand(2, 3, 4, 4, dtype=torch.float64) * 2 - 1)
    assert torch.autograd.gradcheck(lambda x: hldf.colour_loss(x, targets, channels), images, atol=1e-8, rtol=1e-6)


def test_oversaturated_pixels_have_a_gradient_and_flat_channels_a_finite_one():
    images = torch.full((1, 3, 4, 4), 5.0, requires_grad=True)
    hldf.colour_loss(images, torch.zeros(1, 6)).backward()
    assert torch.isfinite(images.grad).all() and (images.grad > 0).all()


# ------------------------------------------------------------------------------------------- exact, step by step


@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_gradients_equal_those_of_held_activations(dtype, tolerance, steps):
    toy = Toy(dtype)
    held = toy.gradients(guided, steps=steps)
    assert held.norm() > 0
    assert toy.loss(steps=steps).item() == toy.loss(guided, steps=steps).item()  # the same call forward, to the bit
    for keep in (0, 1, steps):
        assert relative(toy.gradients(steps=steps, keep=keep), held) < tolerance


@pytest.mark.parametrize("sampler", [samplers.ddim, samplers.euler, samplers.pndm])
def test_any_sampler_serves(sampler):
    toy, steps = Toy(), 6
    calls = steps + (sampler is samplers.pndm)  # whose first step is made twice

    def recomputed(*arguments):
        return hldf.recomputed(*arguments, toy.params, hldf.Calls(calls))

    assert (
        relative(toy.gradients(recomputed, steps, sampler=sampler), toy.gradients(guided, steps, sampler=sampler))
        < 1e-10
    )


def test_without_guidance_the_other_branch_is_not_computed():
    toy = Toy()
    held = toy.gradients(guided, scale=1.0)
    toy.denoiser.calls = 0
    assert relative(toy.gradients(scale=1.0), held) < 1e-10
    assert toy.denoiser.calls == 2 * 20  # forward, and once more on the way back


def test_gradient_through_twenty_steps_against_finite_differences():
    toy = Toy()
    weights = [*toy.params, *toy.text.parameters()]
    directions = [torch.randn_like(weight) for weight in weights]
    slope = (toy.gradients() * torch.cat([d.flatten() for d in directions])).sum().item()
    values = []
    for h in (1e-6, -1e-6):
        with torch.no_grad():
            for weight, direction in zip(weights, directions):
                weight += h * direction
            values.append(toy.loss().item())
            for weight, direction in zip(weights, directions):
                weight -= h * direction
    assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6)


def test_the_initial_noise_has_a_gradient_where_it_is_asked_for():
    toy = Toy()
    toy.noise.requires_grad_()
    (held,) = torch.autograd.grad(toy.loss(guided), toy.noise)
    (ours,) = torch.autograd.grad(toy.loss(), toy.noise)
    assert relative(ours, held) < 1e-10


def test_text_encoder_runs_backward_once_for_all_steps():
    toy, backward = Toy(), []
    toy.text.register_forward_hook(
        lambda layer, words, states: states.register_hook(lambda _: backward.append(1)) and None
    )
    toy.loss().backward()
    assert len(backward) == 2  # the prompt and the empty prompt


@pytest.mark.parametrize("keep", [0, 2])
def test_last_steps_alone(keep):
    """As if the sampler had started, without a history, from what the first steps left."""
    toy, last, steps = Toy(), 5, 20

    def cut(denoiser, cond, null, scale):
        whole, calls = guided(denoiser, cond, null, scale), 0

        def denoise(x, t):
            nonlocal calls
            calls += 1
            return whole(x, t) if calls > steps - last else whole(x, t).detach()

        return denoise

    truncated = toy.gradients(last=last, keep=keep)
    assert relative(truncated, toy.gradients(cut)) < 1e-10
    assert relative(truncated, toy.gradients()) > 1e-2
    assert relative(toy.gradients(last=steps), toy.gradients()) < 1e-10


def test_recomputation_is_in_the_precision_of_the_forward_pass():
    """backward() is called outside the autocast context, as a training loop does."""
    toy, seen = Toy(torch.float32), []
    toy.denoiser.write.register_forward_hook(lambda layer, x, y: seen.append(y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = toy.loss(steps=3)
    loss.backward()
    assert set(seen) == {torch.bfloat16} and len(seen) == 3 * 3


def test_parameters_that_changed_in_between_are_an_error_and_not_a_wrong_gradient():
    toy = Toy()
    loss = toy.loss()
    with torch.no_grad():
        toy.denoiser.down.weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ------------------------------------------------------------------------------------------------------- memory


def peak_bytes(run) -> int:
    """The most bytes of tensors alive at one time during `run()`, beyond those that were before."""
    run()  # what is made once and kept
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        run()
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in measured.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    level = peak = 0
    for _, change in changes:
        level += change
        peak = max(peak, level)
    return peak


def test_peak_memory_hardly_grows_with_the_number_of_steps():
    """The bar is 1.5 from M = 2 to M = 20; what grows is a latent a step. Held activations grow by the steps."""
    toy = Toy(torch.float32, width=64, side=16)

    def run(*make, **options):
        def step():
            toy.loss(*make, **options).backward()
            for param in toy.params:
                param.grad = None

        return step

    ours = {steps: peak_bytes(run(steps=steps)) for steps in (2, 20)}
    assert ours[20] <= 1.5 * ours[2], ours
    held = {steps: peak_bytes(run(guided, steps=steps)) for steps in (2, 20)}
    assert held[20] > 5 * held[2] and held[20] > 20 * ours[20], (held, ours)  # so the meter can see what is held
    kept = peak_bytes(run(steps=20, keep=4))
    assert ours[20] + 0.8 * (4 / 20) * held[20] < kept < ours[20] + 1.2 * (4 / 20) * held[20], (kept, ours, held)


def test_the_decoders_graph_is_gone_before_a_step_is_computed_again():
    toy, alive, counts = Toy(), weakref.WeakSet(), []

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor

    def pack(tensor):
        kept = Kept(tensor)
        alive.add(kept)
        return kept

    decode = toy.decoder.forward

    def watched(latents):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
            return decode(latents)

    toy.decoder.forward = watched
    loss = toy.loss()
    assert len(alive) > 0
    toy.denoiser.register_forward_hook(lambda *_: counts.append(len(alive)))
    loss.backward()
    assert len(counts) == 2 * 20 and set(counts) == {0}
