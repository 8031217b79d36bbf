"""What a script needs around a network: its command line, its ranks, its random numbers, its precision and averages.

Nothing here knows diffusion. The rules that make runs repeatable live here too: every random number of a training
step is a function of (seed, stage, step, rank), every random number of an image a function of (seed, row).
"""

import ctypes
import dataclasses
import hashlib
import inspect
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

PREEMPTED = 75  # exit code of a run that was asked to stop and has saved its state (EX_TEMPFAIL)

# ------------------------------------------------------------------------------------------------------ command line

# What people type from diffusers, kohya and nanoGPT, and what it is called here.
ALIASES = {
    "learning_rate": "lr", "lr_scheduler": "schedule", "lr_warmup_steps": "warmup", "max_train_steps": "steps",
    "train_batch_size": "batch", "batch_size": "batch", "gradient_accumulation_steps": "accumulate",
    "mixed_precision": "precision", "max_grad_norm": "clip", "grad_clip": "clip", "adam_weight_decay": "weight_decay",
    "output_dir": "out", "out_dir": "out", "train_data_dir": "data", "resolution": "size", "lora_alpha": "alpha",
    "network_dim": "rank", "network_alpha": "alpha", "resume_from_checkpoint": "resume",
    "checkpointing_steps": "save_every", "checkpoints_total_limit": "keep", "validation_steps": "save_every",
    "validation_prompts": "grid_prompts", "ema_decay": "ema", "num_inference_steps": "steps",
    "guidance_scale": "guidance", "cfg_scale": "guidance", "pretrained_model_name_or_path": "weights",
}  # fmt: skip

Config = TypeVar("Config")


class UsageError(ValueError):
    """A command line that cannot be run; one line says why."""


def parse(
    cls: type[Config],
    argv: Sequence[str] | None = None,
    presets: Callable[[str], dict[str, Any]] | None = None,
    description: str = "",
) -> Config:
    """Make an instance of the dataclass `cls` from command-line flags: one field a flag, its comment the help.

    Values come from the command line, else from `presets(model)`, else from the field's default. `-` and `_` are
    the same in flag names, the names in `ALIASES` are understood, and unknown flags are errors. The fields that the
    command line named are listed in the instance's `given`.
    """
    import argparse

    fields = {field.name: field for field in dataclasses.fields(cls)}
    comments = _comments(cls)
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    shown = (lambda name: None) if presets is None else (lambda name: presets(fields["model"].default).get(name))
    for name, field in fields.items():
        default = shown(name) if shown(name) is not None else field.default
        help_text = comments.get(name, "") + ("" if default in ("", None) else f" (default: {default})")
        kind = _kind(field.type)
        options = {"nargs": "?", "const": "true"} if kind is bool else {}
        parser.add_argument(
            f"--{name}", type=str, default=None, metavar=_METAVAR[kind], help=help_text.replace("%", "%%"), **options
        )

    words = [_normal(word, fields) for word in (sys.argv[1:] if argv is None else argv)]
    raw = {name: value for name, value in vars(parser.parse_args(words)).items() if value is not None}
    given = {name: _convert(name, value, _kind(fields[name].type)) for name, value in raw.items()}
    preset = presets(given.get("model", fields["model"].default)) if presets else {}
    config = cls(**preset | given)
    config.given = tuple(given)
    return config


_METAVAR = {bool: "BOOL", int: "N", float: "X", str: "TEXT"}


def _kind(annotation: Any) -> type:
    """bool, int, float or str of an annotation such as `int | None`."""
    for kind in (bool, int, float, str):
        if annotation is kind or re.search(rf"\b{kind.__name__}\b", str(annotation)):
            return kind
    raise TypeError(f"a flag cannot be of type {annotation}")


def _convert(name: str, text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() in ("true", "1", "yes", "on"):
            return True
        if text.lower() in ("false", "0", "no", "off"):
            return False
        raise UsageError(f"--{name} {text}: say true or false")
    try:
        return kind(text.replace("_", "") if kind is int else text)
    except ValueError:
        raise UsageError(f"--{name} {text}: not {'a whole number' if kind is int else 'a number'}") from None


def _normal(word: str, fields: dict[str, Any]) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    name = name.replace("-", "_")
    if name not in fields and ALIASES.get(name) in fields:
        name = ALIASES[name]
    return f"--{name}{equals}{value}"


def _comments(cls: type) -> dict[str, str]:
    """The trailing comment of every field, and comment lines directly below that continue it."""
    comments, last = {}, None
    for line in inspect.getsource(cls).splitlines():
        if match := re.match(r"\s+(\w+)\s*:.*?#\s*(.*)$", line):
            last, text = match.groups()
            comments[last] = text
        elif last and (match := re.match(r"\s+#\s*(.*)$", line)):
            comments[last] += " " + match.group(1)
        else:
            last = None
    return comments


def main(run: Callable[[], int | None]) -> None:
    """Run a script. A user's mistake becomes one line on standard error and an exit code: 2 the command line,
    3 data, 4 weights; 1 is a training that diverged, 75 means asked to stop, state saved. Anything else is a bug and
    keeps its traceback."""
    codes = {"UsageError": 2, "DataError": 3, "WeightsError": 4, "FloatingPointError": 1}
    try:
        code = run() or 0
    except (ValueError, OSError, FloatingPointError) as error:
        code = next((codes[c.__name__] for c in type(error).__mro__ if c.__name__ in codes), None)
        if code is None:
            raise
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


# ------------------------------------------------------------------------------------------------------------- ranks


def init() -> tuple[int, int, torch.device]:
    """(rank, number of ranks, this rank's device). Under torchrun the ranks are joined: NCCL on GPUs, else gloo."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    return rank, world, device


def barrier() -> None:
    """Wait until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def average_gradients(params: Iterable[Tensor], bucket_bytes: int = 64 << 20) -> None:
    """Replace every gradient by its mean over the ranks, in flat buckets; the whole of data parallelism here.

    Done after the last backward of a step, so that losses with unusual graphs (a sampler inside the loss) need no
    wrapper around the network. Parameters without a gradient on any rank take part with zeros.
    """
    if not dist.is_initialized():
        return
    world, bucket, size = dist.get_world_size(), [], 0
    params = [p for p in params if p.requires_grad]
    for param in params:
        if param.grad is None:
            param.grad = torch.zeros_like(param)
    for i, param in enumerate(params):
        bucket.append(param.grad)
        size += param.grad.nbytes
        if size >= bucket_bytes or i == len(params) - 1 or params[i + 1].dtype != param.dtype:
            flat = torch._utils._flatten_dense_tensors(bucket)
            dist.all_reduce(flat)
            flat /= world
            for grad, mean in zip(bucket, torch._utils._unflatten_dense_tensors(flat, bucket)):
                grad.copy_(mean)
            bucket, size = [], 0


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank when it is true on one."""
    if not dist.is_initialized():
        return flag
    value = torch.tensor(int(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def mean_over_ranks(value: float, count: int, device: torch.device) -> float:
    """The mean of `value`, each rank's weighted by its `count`."""
    pair = torch.tensor([value * count, count], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(pair)
    return (pair[0] / pair[1].clamp(min=1)).item()


def gather_rows(mine: Tensor, count: int, chunk: int, rank: int, world: int, device: torch.device) -> Tensor:
    """Put rows together that ranks made chunk by chunk in turn (rank r has chunks r, r + world, ...), on the CPU."""
    if world == 1:
        return mine
    full = torch.zeros(count, *mine.shape[1:], dtype=mine.dtype)
    places = [i for start in list(range(0, count, chunk))[rank::world] for i in range(start, min(start + chunk, count))]
    full[places] = mine
    full = full.to(device)
    dist.all_reduce(full)  # every row is zero on all ranks but one
    return full.cpu()


# --------------------------------------------------------------------------------------------------- random numbers


def seed_of(*key: int | str) -> int:
    """A 63-bit seed from a key, the same on every machine and version."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class ImageNoise:
    """Noise that belongs to images: one generator for each, keyed by (seed, row), on the CPU.

    An image's first draw and every later one come from its own generator, so neither the batch it is drawn in nor
    the ranks or a restart change it.
    """

    def __init__(self, seed: int, rows: Sequence[int], device: torch.device | str = "cpu"):
        self.device = device
        self.generators = [torch.Generator().manual_seed(seed_of("image", seed, row)) for row in rows]

    def randn(self, *shape: int) -> Tensor:
        """Standard normals (B, *shape) in float32."""
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators]).to(self.device)


# ------------------------------------------------------------------------------------------- precision and averages


def autocast(precision: str, device: torch.device) -> Any:
    """The context for forward passes: nothing for fp32, autocast for bf16 and fp16."""
    if precision == "fp32":
        return nullcontext()
    if precision not in ("bf16", "fp16"):
        raise UsageError(f"--precision {precision}: choose fp32, bf16 or fp16")
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


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


def as_it_lies(tensor: Tensor, like: Tensor) -> Tensor:
    """A view whose order of axes is that of memory, if `like` is a channels-last weight; otherwise the tensor."""
    return tensor.permute(0, 2, 3, 1) if like.ndim == 4 and not like.is_contiguous() else tensor


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


def keep_memory() -> bool:
    """Ask glibc to keep freed blocks instead of returning them to the kernel; call before the first big tensor.

    By default every large temporary is mapped, page-faulted and unmapped anew, a fifth of a CPU training step. The
    price is a heap that never shrinks. Returns whether this C library has the switches.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, -1) and mallopt(m_top_pad, 64 << 20))


# -------------------------------------------------------------------------------------------------------- interrupts


class StopSignal:
    """Remembers that SIGTERM or SIGINT came; the loop asks between steps. A second SIGINT stops at once."""

    def __init__(self):
        self.received = ""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: Any) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: of the GPU's allocator, or of this process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def number(value: Tensor) -> float | None:
    """A scalar tensor for a JSON log: None where it is not finite, which JSON cannot say."""
    value = value.item()
    return round(value, 6) if abs(value) < float("inf") else None


def trained(module: nn.Module, parts: Iterable[str]) -> dict[str, nn.Parameter]:
    """The named parameters of the given parts of a module that require a gradient."""
    named = {f"{part}.{name}": p for part in parts for name, p in module.get_submodule(part).named_parameters()}
    return {name: param for name, param in named.items() if param.requires_grad}
