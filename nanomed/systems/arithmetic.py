"""What a pass of a network holds for its way back, by shapes alone: nothing is computed."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode


def held(module: nn.Module, *passes: Callable[[], object]) -> tuple[int, ...]:
    """Bytes that autograd holds after each of some passes through parts of `module`, without the weights.

    They run on shapes, in the place of tensors, wherever the weights are; what they make they make inside themselves.
    """
    own = {param.untyped_storage()._cdata for param in module.parameters()}
    device = next(module.parameters()).device

    def bytes_of(run: Callable[[], object]) -> int:
        found = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            found[storage._cdata] = storage  # held, so that no other storage takes its place
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            run()
        return sum(storage.nbytes() for place, storage in found.items() if place not in own)

    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.device(device):
        shadows = [mode.from_tensor(param) for param in module.parameters()]  # weights appear as they are and as shapes
        own |= {shadow.untyped_storage()._cdata for shadow in shadows}
        return tuple(bytes_of(run) for run in passes)
