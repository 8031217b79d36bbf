"""HLDF, hybrid-level diffusion fine-tuning (Guo et al. 2025, "Med-Art"): beside the loss on noise, a loss on finished
images that is back-propagated through the sampler which drew them (eq. 5).

    denoise = recomputed(denoiser, cond, null, 4.5, params, Calls(20))      in the place of guided(denoiser, ...)
    latents = samplers.dpmpp_2m(denoise, diffusion, noise, steps=20)       the sampler, untouched
    loss = colour_loss(decode(latents), colours(images)) / 20              eq. 4, with the weight 1 / M
    loss.backward()

How a gradient comes back through a sampler
-------------------------------------------
A sampler is a recursion that autograd differentiates like any other:

    e_i = denoise(x_i, t_i) = (1 - s) null_i + s cond_i,     x_{i+1} = a_i x_i + b_i e_i + c_i e_{i-1}

With `guided` in the place of `recomputed` the four lines above are right, and they hold the activations of M steps and
two branches, 40 forward passes of the denoiser, until the backward pass comes to them. But a step can be computed
again from x_i, which is a few kilobytes. So here e_i is one node of the graph (`_Step`). On the way forward it runs the
network without a graph and keeps x_i. On the way back the gradient v of e_i arrives, and the node makes the graph of
one branch, takes one vector-Jacobian product, forgets the graph, and does the other branch. They can be apart because
guidance is linear: v is worth s v to the prompt's branch and (1 - s) v to the other.

Everything else follows from e_i being an ordinary node:

- The graph of the decoder is the last one made and the first one used up. It is gone when the first step is computed
  again, so the peak is the larger of the two and not their sum.
- A node returns gradients of the text states. Autograd adds them up over the steps and runs the text encoder's
  backward pass once, when the last has come; likewise for the parameters.
- Nothing of this is an approximation: the gradients are those of the four lines with `guided`.

Arithmetic: M steps cost 2 forward passes of time each for the gradients as they are and 3 when recomputed. `keep` buys
that back where there is memory, step by step.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanomed.diffusion.guidance import guided
from nanomed.diffusion.process import Cond, Denoise


def colours(images: Tensor) -> Tensor:
    """The means of an image's channels and their unbiased standard deviations: (B, 3, H, W) to (B, 6)."""
    return torch.cat([images.mean((2, 3)), images.std((2, 3))], dim=1)


def colour_loss(images: Tensor, targets: Tensor, channels: str = "sum") -> Tensor:
    """Med-Art's eq. 4: the squared differences of every channel's mean and standard deviation, image by image.

        L = mean over images of sum over c of (mean_c - mean*_c)^2 + (std_c - std*_c)^2

    images     (B, 3, H, W), nominally in [-1, 1] and not clamped, or what is oversaturated would have no gradient
    targets    what `colours` says of the data's images, (B, 6)
    channels   "sum", as in the paper, or "mean", as in the released code: a third of it
    """
    if channels not in ("sum", "mean"):
        raise ValueError(f"channels={channels!r}: sum (the paper) or mean (the released code)")
    distance = (colours(images) - targets).square().sum(1).mean()
    return distance if channels == "sum" else distance / 3


class Calls(NamedTuple):
    """The calls of a sampler that is back-propagated through."""

    steps: int  # how often it will call
    keep: int = 0  # that many of the last calls hold their activations, and are not computed again
    last: int | None = None  # back-propagate through the last calls alone, as DRaFT-K does (Clark et al. 2023): less
    # time, another gradient. None: through all


def recomputed(
    denoiser: Callable[..., Tensor], cond: Cond, null: Cond, scale: float, params: Sequence[Tensor], calls: Calls
) -> Denoise:
    """`guided(denoiser, cond, null, scale)` for one run of a sampler that is to be back-propagated through.

    The same numbers forward and, from the backward pass, the same gradients; but each call holds on to x alone and
    computes its activations again, one branch at a time, when its gradient comes. So the memory is that of one
    forward pass, whatever the number of steps.

    denoiser   deterministic, as it is called twice: no dropout. It may checkpoint its blocks to need still less
    params     what trains in it; text encoders train through the tensors of `cond` and `null`

    The closure counts its calls, so make one per sample.
    """
    call, first = 0, 0 if calls.last is None else calls.steps - calls.last
    tensors = [*cond.values(), *(null[name] for name in cond), *params]
    held = guided(denoiser, cond, null, scale)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        nonlocal call
        call += 1
        if first < call <= calls.steps - calls.keep:
            return _Step.apply(held, denoiser, tuple(cond), scale, x, t, *tensors)
        return held(x, t) if call > first else _Step.apply(held, denoiser, (), scale, x.detach(), t)

    return denoise


class _Step(torch.autograd.Function):
    """One guided prediction e = (1 - s) null + s cond as a node of the graph that remembers x and t.

    Inputs: e as a function of (x, t), the network, the names of its conditions, s, x, t, and then what has gradients:
    the tensors of cond, those of null, and the parameters.
    """

    @staticmethod
    def forward(ctx, guided, denoiser, names: tuple[str, ...], scale: float, x: Tensor, t: Tensor, *tensors: Tensor):
        ctx.denoiser, ctx.names, ctx.scale = denoiser, names, scale
        ctx.save_for_backward(x, t, *tensors)
        kind = x.device.type
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        return guided(x, t)  # no graph is made inside a Function

    @staticmethod
    @once_differentiable
    def backward(ctx, v: Tensor):
        x, t, *tensors = ctx.saved_tensors
        wanted_x, _, *wanted = ctx.needs_input_grad[4:]
        n = len(ctx.names)
        of_x, of_tensors = None, [None] * len(tensors)
        for share, first in ((ctx.scale, 0), (1 - ctx.scale, n)):  # the branch of the prompt, then the other
            if share == 0:
                continue
            places = [i for i in (*range(first, first + n), *range(2 * n, len(tensors))) if wanted[i]]
            with torch.enable_grad(), torch.autocast(*ctx.autocast):
                here = x.detach().requires_grad_(wanted_x)
                for i in range(first, first + n):  # the graph of this branch ends at its conditions
                    tensors[i] = tensors[i].detach().requires_grad_(wanted[i])
                out = ctx.denoiser(here, t, **dict(zip(ctx.names, tensors[first : first + n])))
                leaves = [here] * wanted_x + [tensors[i] for i in places]
                found = torch.autograd.grad(out, leaves, share * v, allow_unused=True)
            del out
            if wanted_x:
                of_x, found = _plus(of_x, found[0]), found[1:]
            for i, gradient in zip(places, found):
                of_tensors[i] = _plus(of_tensors[i], gradient)
        return None, None, None, None, of_x, None, *of_tensors


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
