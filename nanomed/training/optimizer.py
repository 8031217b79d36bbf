"""What moves the weights: AdamW, clipping, a step that skips itself where it is broken, and the average of weights that
is drawn from. Nothing here waits for the device, but for `Descent.health` and `Descent.state`.
"""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Descent:
    """Gradient descent on named parameters, and all of its state that a checkpoint holds.

    A step whose gradients are not finite changes nothing. That is decided on the device: the fused kernels take the
    verdict as a tensor. `health` asks for it.
    """

    PATIENCE = 3  # broken steps in a row

    def __init__(
        self, params: dict[str, Tensor], weight_decay: float, average: float, fp16: bool, eps: float = 1e-8
    ):
        self.params = params
        device = next(iter(params.values())).device
        self.optimizer = adamw(params.values(), lr=0.0, weight_decay=weight_decay, eps=eps)
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        self.average = EMA(params, average) if average else None
        self.skipped = torch.zeros(3, device=device)  # steps: in all, in a row now, the most in a row since asked

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, scaled where float16 asks for it."""
        self.scaler.scale(loss).backward()

    def step(self, lr: float, clip: float) -> tuple[Tensor, int]:
        """One step; returns the norm of the gradients before they are clipped, and how many tensors had one."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        norm, clipped = clip_gradients(list(self.params.values()), clip)
        broken = (~torch.isfinite(norm)).float().to(self.skipped.device)
        if self.scaler.is_enabled():  # it skips steps that overflow, and scales down: no fault of the weights
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.skipped[0] += broken
        else:
            self.optimizer.found_inf = broken
            self.optimizer.step()
            total, row, most = self.skipped
            row = (row + 1) * broken
            self.skipped = torch.stack([total + broken, row, torch.maximum(most, row)])
        if self.average:
            self.average.update()
        self.optimizer.zero_grad()
        return norm, clipped

    def health(self, stage: str, step: int) -> int:
        """Steps skipped so far. Raises FloatingPointError where three in a row were, since it was last asked."""
        total, row, most = self.skipped.tolist()
        self.skipped = torch.tensor([total, row, row], device=self.skipped.device)
        if most >= self.PATIENCE:
            raise FloatingPointError(
                f"{stage}: loss or gradient was not finite for 3 steps in a row, up to step {step}; the weights are "
                f"those before them. Lower --lr, or use --precision bf16 or fp32"
            )
        return int(total)

    @property
    def count(self) -> int:
        """How many numbers train."""
        return sum(param.numel() for param in self.params.values())

    def state(self) -> dict:
        """What a checkpoint says besides its tensors."""
        updates = self.average.updates if self.average else 0
        return {"skipped": int(self.skipped[0].item()), "ema_updates": updates, "scaler": self.scaler.state_dict()}

    def load(self, state: dict) -> None:
        """Take `state` back; the tensors have their places already (runs.py)."""
        self.skipped = torch.tensor([float(state["skipped"]), 0.0, 0.0], device=self.skipped.device)
        if self.average:
            self.average.updates = state["ema_updates"]
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


# What `_init_group` of PyTorch 2.6 to 2.13 takes; in 2.6 with the flag amsgrad among them.
INSIDE = ["self", "group", "params_with_grad", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps"]


def adamw(params: Iterable[Tensor], **options: Any) -> torch.optim.AdamW:
    """PyTorch's fused AdamW; on a CPU one that hands it channels-last weights without copies, as long as the inner
    workings of PyTorch are those that it knows."""
    params = list(params)
    inside = [name for name in inspect.signature(torch.optim.AdamW._init_group).parameters if name != "amsgrad"]
    if params[0].device.type == "cpu" and inside == INSIDE:
        return LaidOutAdamW(params, fused=True, **options)
    return torch.optim.AdamW(params, fused=True, **options)


class LaidOutAdamW(torch.optim.AdamW):
    """Fused AdamW that never copies. PyTorch's kernel for CPUs copies each tensor that is not contiguous, which costs
    three times the step; channels-last weights are therefore handed to it in the order in which they lie in memory."""

    def _init_group(self, group, params, *others) -> bool:
        found = super()._init_group(group, params, *others)
        # PyTorch 2.6 has the flag amsgrad among the lists of gradients, first and second moments, and so on.
        gradients, first, second = [other for other in others if isinstance(other, list)][:3]
        for tensors in (gradients, first, second, params):  # the parameters last: they say how all of them lie
            tensors[:] = [as_it_lies(tensor, param) for tensor, param in zip(tensors, params)]
        return found


def as_it_lies(tensor: Tensor, like: Tensor) -> Tensor:
    """A view whose order of axes is that of memory, if `like` is a channels-last weight; otherwise the tensor."""
    return tensor.permute(0, 2, 3, 1) if like.ndim == 4 and not like.is_contiguous() else tensor


def clip_gradients(params: Sequence[Tensor], limit: float) -> tuple[Tensor, int]:
    """Scale all gradients together so that their norm is at most `limit` (0 = leave them).

    Returns the norm before and the number of tensors that had a gradient: a trainer that logs this number cannot
    clip an empty list and not notice, as several published LoRA scripts do.
    """
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        return torch.tensor(0.0), 0
    if all(type(g) is Tensor and g.device.type == "cpu" and g.dtype == torch.float32 for g in grads):
        # Twice as fast as norms, and right to 1e-6 for ten million numbers, where PyTorch's norm is off by 3e-4.
        flat = [as_it_lies(g, g).flatten() for g in grads]
        norm = torch.stack([torch.dot(g, g) for g in flat]).sum().sqrt()
    else:
        norm = torch.linalg.vector_norm(torch.stack([n.float() for n in torch._foreach_norm(grads)]))
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    if limit and (norm.device.type != "cpu" or scale.numpy() < 1):  # a CPU can be asked for nothing, and saves a pass
        torch._foreach_mul_(grads, scale)
    return norm, len(grads)


class EMA:
    """Exponential moving average of parameters: average += (1 - decay) (parameter - average).

    The decay warms up as (1 + n) / (10 + n) so that the first updates are not drowned by the initial weights.
    """

    def __init__(self, params: dict[str, Tensor], decay: float):
        self.params, self.decay, self.updates = params, decay, 0
        self.average = {name: p.detach().clone() for name, p in params.items()}

    def update(self) -> None:
        """Move the averages towards the parameters: fast at first, then by `decay`."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.params.values()], 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Put the averages in the network's place; the tensors trade storage, nothing is copied."""
        try:
            self._swap()
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, param in self.params.items():
            param.data, self.average[name] = self.average[name], param.data
