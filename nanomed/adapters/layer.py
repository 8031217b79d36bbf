"""Linear and Conv2d layers with a low-rank adapter beside their weight.

    y = W x + s B A x + bias                                 s = alpha / r (Hu et al. 2021, section 4.1)
                                                             s = alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023, eq. 3)
    y = m / |W + s B A| (W x + s B A x) + bias               DoRA (Liu et al. 2024, eq. 5)

DoRA's norm is that of every output channel over the inputs, and as in the paper's section 4.3 its gradient is left
out. The adapted layer *is* the layer it was: `attach` changes its class in place, its weight stays the very tensor,
and beside it stand `lora_A.weight` (r, in), `lora_B.weight` (out, r) and, for DoRA, `lora_magnitude_vector`, PEFT's
names. So base names do not change, a base checkpoint loads strictly with the adapter in place (`load_state_dict`),
and the unmerged adapter copies nothing. `lora.py` says which layers, and reads and writes files.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Factor(nn.Module):
    """One of the two factors of an adapter: a weight under the name that PEFT gives it."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)


class Adapted:
    """What adapted layers of both kinds share. `alpha`, `rank_stabilised` and `base` are set by `attach`."""

    alpha: float
    rank_stabilised: bool
    base: tuple[nn.Parameter, ...]  # while merged: the weight as it was, kept from module's eyes by the tuple
    lora_magnitude_vector: nn.Parameter | None

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.lora_A.weight.shape[0]

    @property
    def scale(self) -> float:
        """What B A is multiplied by: alpha / rank, or alpha / sqrt(rank) of rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    @property
    def merged(self) -> bool:
        """Whether `weight` has the adapter in it; the bare one is in `base`."""
        return bool(self.base)

    def adapter(self) -> dict[str, nn.Parameter]:
        """The adapter's own parameters: `lora_A.weight`, `lora_B.weight` and, for DoRA, `lora_magnitude_vector`."""
        factors = {"lora_A.weight": self.lora_A.weight, "lora_B.weight": self.lora_B.weight}
        magnitude = self.lora_magnitude_vector
        return factors if magnitude is None else factors | {"lora_magnitude_vector": magnitude}

    def norm(self) -> Tensor:
        """|W + s B A| of every output channel (out,), without a gradient and without forming the sum:
        |W|^2 + 2 s <W, B A> + s^2 |B A|^2, where <W, B A> = B . (W A^T)."""
        w, a, b = self.weight.detach().flatten(1), self.lora_A.weight.detach(), self.lora_B.weight.detach()
        a, b = a.flatten(1), b.flatten(1)
        with torch.autocast(w.device.type, enabled=False):
            cross = torch.mm(a.to(w.dtype), w.t()).t().to(b.dtype)  # W A^T, (out, r)
            gram = torch.mm(b, torch.mm(a, a.t()))  # B A A^T, (out, r)
        square = torch.linalg.vector_norm(w, dim=1, dtype=b.dtype).square()
        square = square + (b * (2 * self.scale * cross + self.scale**2 * gram)).sum(1)
        return square.clamp_min(torch.finfo(b.dtype).tiny).sqrt()  # a row of zeros stays zero, not NaN

    def rescaled(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """m / |W + s B A| y + bias, with a gain in the adapter's dtype: bf16 has no number between 1 and 1.0078."""
        magnitude = self.lora_magnitude_vector
        gain = magnitude / self.norm().view_as(magnitude)
        out = y * gain if bias is None else torch.addcmul(bias.to(y.dtype).view_as(gain), y, gain)
        return out.to(y.dtype)

    def merged_weight(self) -> Tensor:
        """The weight that does alone what the layer and its adapter do; computed in fp32, in the layer's dtype."""
        a, b = self.lora_A.weight.detach().flatten(1), self.lora_B.weight.detach().flatten(1)
        with torch.autocast(a.device.type, enabled=False):
            weight = torch.addmm(self.weight.detach().flatten(1).to(a.dtype), b, a, alpha=self.scale)
        if self.lora_magnitude_vector is not None:
            norm = torch.linalg.vector_norm(weight, dim=1).clamp_min(torch.finfo(a.dtype).tiny)
            weight *= (self.lora_magnitude_vector.detach().flatten() / norm).unsqueeze(1)
        return weight.view_as(self.weight).to(self.weight.dtype)

    def merge(self) -> None:
        """Put the adapter into `weight`, until `unmerge`."""
        if not self.merged:
            self.base = (self.weight,)
            self.weight = nn.Parameter(self.merged_weight(), requires_grad=False)

    def unmerge(self) -> None:
        """Put the bare weight back, to the bit."""
        if self.merged:
            (base,) = self.base
            if base.device != self.weight.device:  # the network was moved while merged
                base.data = base.data.to(self.weight.device)
            self.base, self.weight = (), base

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:  # a state says the same, merged or not
            destination[prefix + "weight"] = self.base[0] if keep_vars else self.base[0].detach()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.unmerge()
        mine = {prefix + name: param for name, param in self.adapter().items()}
        if not mine.keys() & state_dict.keys():  # a base checkpoint: the adapter stays as it is
            state_dict.update(mine)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """As of the bare layer, with rank and alpha."""
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}"


class LoraLinear(Adapted, nn.Linear):
    """y = W x + s B A x + bias; with DoRA, y = m / |W + s B A| (W x + s B A x) + bias."""

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if self.merged:
            return super().forward(x)
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled(x.device.type):  # a Function's insides are not autocast
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        plain = self.lora_magnitude_vector is None
        tensors = x, weight, bias if plain else None, self.lora_A.weight, self.lora_B.weight, self.scale
        y = LowRankLinear.apply(*tensors) if torch.is_grad_enabled() else low_rank(*tensors)[0]
        return y if plain else self.rescaled(y, bias)


class LoraConv2d(Adapted, nn.Conv2d):
    """The same with convolutions: A has the layer's kernel, stride and padding, B is 1x1."""

    def forward(self, x: Tensor) -> Tensor:  # (N, in, H, W) -> (N, out, H', W')
        if self.merged:
            return super().forward(x)
        plain = self.lora_magnitude_vector is None
        y = self._conv_forward(x, self.weight, self.bias if plain else None)
        h = self._conv_forward(x, self.lora_A.weight.to(x.dtype), None)  # (N, r, H', W')
        y = torch.add(y, F.conv2d(h, self.lora_B.weight.to(h.dtype)), alpha=self.scale)
        if plain:
            return y
        return self.rescaled(y, self.bias)


def low_rank(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """x W^T + bias + s (x A^T) B^T, (..., out), and x A^T, (N, r)."""
    y = F.linear(x, weight, bias)  # the very call that the layer makes without an adapter
    h = torch.mm(x.reshape(-1, x.shape[-1]), a.to(x.dtype).t())
    y.view(-1, y.shape[-1]).addmm_(h, b.to(x.dtype).t(), alpha=scale)
    return y, h


class LowRankLinear(torch.autograd.Function):
    """y = x W^T + bias + s (x A^T) B^T, with a backward that costs what the mathematics costs: 2.0 forwards for a
    frozen W, and no temporary of the size of x or y besides the results.

    The base product is a plain one and the adapter is added into it, forward and backward. A and B may be wider than
    x (fp32 adapters, bf16 network): they are narrowed, which is small, instead of widening x, which is not. Saved are
    x, which sibling layers share, and x A^T, which is thin; written (N, r), CPU libraries make it up to 1.6 times as
    fast as (r, N).
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        y, h = low_rank(x, weight, bias, a, b, scale)
        ctx.save_for_backward(x, weight, a, b, h)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        with torch.autocast(dy.device.type, enabled=False):  # for a backward() inside the context
            return LowRankLinear._gradients(ctx.needs_input_grad, dy, *ctx.saved_tensors, ctx.scale)

    @staticmethod
    def _gradients(asked, dy: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, h: Tensor, scale: float):
        rows, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])  # (N, in), (N, out)
        dx = dw = dbias = da = db = None
        if asked[0] or asked[3]:
            g = torch.mm(dy, b.to(dy.dtype)).mul_(scale)  # s dy B, (N, r)
        if asked[0]:
            dx = torch.mm(dy, weight).addmm_(g, a.to(dy.dtype)).view(x.shape)
        if asked[1]:  # only where the base trains too
            dw = torch.mm(dy.t(), rows)
        if asked[2]:
            dbias = dy.sum(0)
        if asked[3]:
            da = torch.mm(g.t(), rows).to(a.dtype)  # (r, in)
        if asked[4]:
            db = torch.mm(h.t(), dy).mul_(scale).t().to(b.dtype)  # (out, r)
        return dx, dw, dbias, da, db, None


def start(weight: Tensor, rank: int, init: str, dora: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """A, B and DoRA's magnitude (or None) for a layer's weight, at their start: A gaussian with std 1/r or "kaiming",
    B zero, m = |W|; in fp32, or in fp64 where the weight is."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    a = torch.empty(rank, *weight.shape[1:], dtype=dtype, device=weight.device)
    b = torch.zeros(weight.shape[0], rank, *[1] * (weight.dim() - 2), dtype=dtype, device=weight.device)
    if init == "gaussian":
        nn.init.normal_(a, std=1 / rank)
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    return a, b, weight.detach().flatten(1).to(dtype).norm(dim=1) if dora else None


def attach(layer: nn.Module, a: Tensor, b: Tensor, magnitude: Tensor | None, alpha: float, stabilised: bool) -> None:
    """Make an adapted layer of a bare one in place, with A and B, and for DoRA the magnitude of each output channel."""
    layer.__class__ = LoraLinear if type(layer) is nn.Linear else LoraConv2d
    layer.alpha, layer.rank_stabilised, layer.base = int(alpha) if alpha == int(alpha) else alpha, stabilised, ()
    layer.lora_A, layer.lora_B = Factor(a), Factor(b)
    if magnitude is not None and layer.weight.dim() == 4:
        magnitude = magnitude.view(1, -1, 1, 1)
    layer.register_parameter("lora_magnitude_vector", None if magnitude is None else nn.Parameter(magnitude))


def detach(layer: nn.Module) -> None:
    """Make the bare layer of an adapted one again, in place."""
    for name in ("lora_A", "lora_B", "lora_magnitude_vector", "alpha", "rank_stabilised", "base"):
        delattr(layer, name)
    layer.__class__ = nn.Linear if type(layer) is LoraLinear else nn.Conv2d
