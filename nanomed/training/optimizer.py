"""What moves the weights: AdamW, the clipping of gradients, and the average of weights that is drawn from."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class AdamW(torch.optim.AdamW):
    """Fused AdamW that never copies. PyTorch's kernel for CPUs copies each tensor that is not contiguous, which costs
    three times the step; channels-last weights are therefore handed to it in the order in which they lie in memory."""

    def __init__(self, params: Iterable[Tensor], **options: Any):
        super().__init__(params, fused=True, **options)

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
    if limit and (scale := (limit / (norm + 1e-6)).item()) < 1:
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


def number(value: Tensor) -> float | None:
    """A scalar tensor for a JSON log: None where it is not finite, which JSON cannot say."""
    value = value.item()
    return round(value, 6) if abs(value) < float("inf") else None
