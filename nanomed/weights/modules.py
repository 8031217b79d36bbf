"""Tensors into modules: built on the meta device, filled by name and shape, recognised by a fingerprint."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nanomed.run.progress import progress
from nanomed.weights.header import WeightsError
from nanomed.weights.tensors import some

TOLERATED = ("*position_ids", "*num_batches_tracked", "*inv_freq")  # tables that files hold or not, as it happened
M = TypeVar("M", bound=nn.Module)


def build(make: Callable[..., M], *args, **kwargs) -> M:
    """`make(*args, **kwargs)` on the meta device: the names and shapes of a module, and no memory for its weights.

    A table that no file holds (sinusoids, masks, positions) must not be a buffer then, for `load` could not fill it:
    the modules here compute such tables where they use them.
    """
    with torch.device("meta"), _Unfilled():
        return make(*args, **kwargs)


class _Unfilled(TorchFunctionMode):
    """Leaves out normal draws: they fill nothing on the meta device, and the first imports as much as torch itself."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (Tensor.normal_, nn.init.normal_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def load(module: M, tensors: Mapping[str, Tensor], optional: Iterable[str] = ()) -> M:
    """Make `tensors` the weights of `module`, which may be on the meta device; returns the module.

    Names and shapes must agree exactly. `optional` (names or patterns with *) may be in the file without a place in
    the module; so may position_ids, num_batches_tracked and inv_freq, which may be absent too. The tensors are not
    copied and keep their dtype; whether a parameter trains is left as it was.

    Raises WeightsError that lists what is missing, not expected, or of another shape.
    """
    expected = module.state_dict()
    spared = (*TOLERATED, *optional)
    missing = [n for n in expected.keys() - tensors.keys() if not any(fnmatchcase(n, p) for p in TOLERATED)]
    unexpected = [n for n in tensors.keys() - expected.keys() if not any(fnmatchcase(n, p) for p in spared)]
    taken = {name: tensors[name] for name in expected if name in tensors}
    shapes = [f"{name} {tuple(tensor.shape)} for {tuple(expected[name].shape)}"
              for name, tensor in taken.items() if tensor.shape != expected[name].shape]  # fmt: skip
    if missing or unexpected or shapes:
        problems = some(missing, "missing") + some(unexpected, "not expected") + some(shapes, "of another shape")
        raise WeightsError(f"these are not the weights of this {type(module).__name__}: {problems.rstrip('; ')}")
    for name in expected.keys() - tensors.keys():
        if name.endswith("num_batches_tracked"):
            taken[name] = torch.zeros((), dtype=torch.int64)
    module.load_state_dict(taken, strict=False, assign=True)
    if empty := [name for name, t in [*module.named_parameters(), *module.named_buffers()] if t.is_meta]:
        raise WeightsError(f"{type(module).__name__}: {some(empty, 'still on the meta device').rstrip('; ')}")
    return module


def fingerprint(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of the weights, in the order of the names.

    The same on every device and whichever file they came from; any other bit is another fingerprint.
    """
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights

    def digest(item: tuple[str, Tensor]) -> str:
        name, tensor = item
        tensor = tensor.detach().cpu().contiguous()
        content = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy()).hexdigest()
        return f"{name} {tensor.dtype} {tuple(tensor.shape)} {content}\n"

    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter free
        digests = progress(pool.map(digest, sorted(state.items())), "hashing weights", "tensor", len(state))
        return hashlib.sha256("".join(digests).encode()).hexdigest()
