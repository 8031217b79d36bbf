"""A training step on shapes alone: the bytes that are alive at its worst moment, and the operations that it takes.

A shadow of a system has PyTorch's fake tensors in the place of its weights: they have shape, dtype, device and strides,
and no numbers. A stage's own forward pass, backward pass and optimizer run on it, and a mode sees every operation and
counts the storages that live. So no system needs a formula of its own, and the largest takes seconds and no memory.

Counted is every tensor: gradients, moments, averages, the batch, what autograd keeps, and what lies between operations.
Not counted is what one kernel takes for itself and gives back (workspaces of convolutions), what CUDA's allocator
rounds up (tensors to 512 bytes, blocks to 2 MB) or cannot fill, and CUDA itself (about 0.5 GB). Texts have their full
length, as the longest of a batch may.

Operations are those of the device. Of what a CPU does otherwise than a card, two things are undone for `card`: its own
convolutions of maps with channels last (layers/convolution.py), and the norms of autocast, which CUDA computes in
float32. Attention keeps the same on both, as far as a card has a kernel for its mask.
"""

import copy
import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from nanomed.run.hardware import autocast
from nanomed.run.randomness import seed_all
from nanomed.training.optimizer import Descent

# A CPU's attention, which PyTorch's own counter does not know: as that of a GPU.
FLOPS = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda dy, q, k, v, *_, **__: sdpa_backward_flop_count(dy.shape, q.shape, k.shape, v.shape),
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """Of a step: the most bytes that are alive in it beside the weights, and floating-point operations."""

    bytes: int
    flops: int


class Float32Norms(TorchFunctionMode):
    """Under autocast, norms in float32 as CUDA has them (the list in the documentation of torch.amp); a CPU's stay in
    the dtype that they find."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in (F.layer_norm, F.group_norm) or not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
        return func(*args, **kwargs)


def cost_of(config, system, stage: str, card: bool, **settings) -> Cost:
    """What a step of a stage costs, once the optimizer has its state. The system has its adapters, and what trains in
    the stage has `requires_grad`; nothing of it is changed.

    card       as on a card, where the system is on a CPU
    settings   attributes of the system under which the step is made (`System.kinds`)
    """
    mode, card = FakeTensorMode(allow_non_fake_inputs=True), card and system.device.type == "cpu"
    shadow = shadow_of(system, mode, contiguous=card)
    for name, value in settings.items():
        setattr(shadow, name, value)
    like = Float32Norms() if card else nullcontext()
    with mode, torch.device(system.device), like, Alive(shadow.parameters()) as alive:
        descent = descent_of(config, shadow)
        for param in descent.params.values():
            param.grad = torch.zeros_like(param)
        descent.step(0.0, 0.0)  # makes the optimizer's state
        alive.flops = 0
        one_step(config, shadow, stage, descent)
    return Cost(alive.most, alive.flops)


def shadow_of(module: nn.Module, mode: FakeTensorMode, contiguous: bool = False) -> nn.Module:
    """A copy with fake parameters, which knows what the module knows and shares nothing with it."""

    def fake(param: nn.Parameter) -> nn.Parameter:
        like = mode.from_tensor(param)
        with mode:
            return nn.Parameter(like.detach().contiguous(), param.requires_grad) if contiguous else like

    return copy.deepcopy(module, {id(param): fake(param) for param in module.parameters()})


def descent_of(config, system) -> Descent:
    """The optimizer of what has `requires_grad`; no scaler of fp16, which asks the device whether all is finite."""
    params = {name: param for name, param in system.named_parameters() if param.requires_grad}
    return Descent(params, config.weight_decay, config.ema, fp16=False, eps=config.eps)


def one_step(config, system, stage: str, descent: Descent, clip: float = 0.0) -> None:
    """A training step as train.py makes it, of shapes or of numbers, on a batch of random ones; weights stay."""
    seed_all(0)
    with autocast(config.precision, system.device):
        loss = system(system.example(stage, config.batch, system.device), stage, 1)["loss"]
    descent.backward(loss)
    del loss
    descent.step(0.0, clip)


class Alive(TorchDispatchMode):
    """Counts, over all operations, the bytes of the storages that they make, as long as these live, and floating-point
    operations. `most` is the most bytes there were at one time; those of `apart` are not among them."""

    def __init__(self, apart: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.most = self.flops = 0
        self.known = weakref.WeakSet(tensor.untyped_storage() for tensor in apart)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if count := FLOPS.get(func.overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=made)
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.note(tensor.untyped_storage())
        return made

    def note(self, storage: torch.UntypedStorage) -> None:
        """Count a storage once, until it is gone."""
        if storage not in self.known:
            size = storage.nbytes()
            self.known.add(storage)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.gone, size)

    def gone(self, size: int) -> None:
        """A storage of so many bytes lives no longer."""
        self.now -= size
