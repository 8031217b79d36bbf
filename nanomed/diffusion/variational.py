"""The training loss of a network that also learns its variance (Nichol & Dhariwal 2021), as DiT is trained:

    L = ||epsilon - epsilon_theta||^2 + L_vlb            per image, means over its elements

L_vlb, in bits a dimension, is one term of the variational bound: KL( q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t) ), and
at t = 0 the negative log-likelihood of x_0 itself. It trains the variance only: the mean inside it is detached. It is
one random term of the sum over T = 1000, and not multiplied (their L_hybrid's weight 0.001 of T terms is the same).
"""

import math

import torch
from torch import Tensor

from nanomed.diffusion.process import Diffusion


def hybrid_loss(
    diffusion: Diffusion, output: Tensor, x0: Tensor, xt: Tensor, t: Tensor, noise: Tensor
) -> dict[str, Tensor]:
    """The loss of each image and its two summands: {"loss", "mse", "vlb"}, (B,) each.

    output (B, 2 C, ...) is what the network says at xt = diffusion.noised(x0, t, noise): epsilon, then v. x0, xt and
    noise (B, C, ...), t int64 (B,). Raises ValueError for a network that predicts anything but epsilon.
    """
    if diffusion.prediction != "epsilon":
        raise ValueError(f"a learned variance is trained beside epsilon here, not beside {diffusion.prediction}")
    epsilon, v = output.chunk(2, dim=1)
    mse = (noise - epsilon).square().flatten(1).mean(1)
    vlb = vlb_term(diffusion, epsilon.detach(), v, x0, xt, t)
    return {"loss": mse + vlb, "mse": mse, "vlb": vlb}


def vlb_term(diffusion: Diffusion, epsilon: Tensor, v: Tensor, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
    """The term of the bound at t, in bits a dimension, (B,): eq. 4 to 6, with the variance of eq. 15,

        log sigma^2 = f log beta_t + (1 - f) log beta~_t,    f = (v + 1) / 2,    v nominally in [-1, 1].

    beta~_0 is 0, so beta~_1 stands in for it.
    """
    betas = diffusion.betas.double()  # (T,); all tables in float64, rounded once they are looked up
    abar = torch.cumprod(1 - betas, 0)
    before = torch.cat([abar.new_ones(1), abar[:-1]])
    posterior = betas * (1 - before) / (1 - abar)  # beta~, eq. 7
    posterior[0] = posterior[1]

    def at(table: Tensor) -> Tensor:
        return table.to(xt.device)[t].to(xt.dtype).view(-1, *[1] * (xt.ndim - 1))

    of_x0 = at(betas * before.sqrt() / (1 - abar))
    of_xt = at((1 - betas).sqrt() * (1 - before) / (1 - abar))
    low, high = at(posterior.log()), at(betas.log())
    between = (v + 1) / 2
    log_variance = between * high + (1 - between) * low
    predicted = at((1 / abar).sqrt()) * xt - at((1 / abar - 1).sqrt()) * epsilon  # x_0, never clamped here
    mean, true_mean = of_x0 * predicted + of_xt * xt, of_x0 * x0 + of_xt * xt
    kl = 0.5 * (log_variance - low + (low - log_variance).exp() - 1 + (true_mean - mean).square() / log_variance.exp())
    first = -discretised_log_likelihood(x0, mean, 0.5 * log_variance)
    term = torch.where(t.view(at(betas).shape) == 0, first, kl)
    return term.flatten(1).mean(1) / math.log(2)


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log of the mass that N(mean, exp(log_scale)^2) puts on the bin around x, of 256 bins in [-1, 1] whose outer two
    are open (Ho et al. 2020, eq. 13). Latents are no 8-bit pixels, but DiT is trained with it all the same."""
    centred, inverse = x - mean, (-log_scale).exp()
    above, below = _normal_cdf(inverse * (centred + 1 / 255)), _normal_cdf(inverse * (centred - 1 / 255))
    inside = torch.where(x > 0.999, 1 - below, above - below)
    return torch.where(x < -0.999, above, inside).clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the normal's distribution function, which the published loss uses."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
