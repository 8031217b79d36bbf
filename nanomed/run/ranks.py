"""The processes of a run and what they do together. One process is the case `ALONE`, and no caller asks which it is.

    ranks = Ranks.join()                       under torchrun all of its processes, else this one
    for rows in ranks.share(batches): ...      every rank a part
    if ranks.first: ...                        files and messages

Nothing that all ranks must reach may stand behind `first`: they would wait for each other for ever.
"""

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanomed.run.flags import UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among `world` of them, and the device it works on."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @classmethod
    def join(cls, device: str = "", float64: bool = False) -> "Ranks":
        """The ranks of torchrun, joined by NCCL on GPUs and by gloo elsewhere; without torchrun this process alone.

        `device` is the --device that was asked for; `float64`: the work needs such numbers (see `device_of`).
        """
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if world > 1 and ":" in device:
            raise UsageError(f"--device {device}: of several processes each takes its own; say cuda")
        if world > 1 and device == "mps":
            raise UsageError("--device mps: there is one, and several processes do not meet on it; say cpu")
        place = device_of(device, int(os.environ.get("LOCAL_RANK", 0)), float64 or world > 1)
        cuda = place.type == "cuda"
        if cuda:
            torch.cuda.set_device(place)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
            # Its way back gave NaN for kandinsky3-tiny in bf16 (H100, PyTorch 2.11), where the other kernels gave none.
            torch.backends.cuda.enable_cudnn_sdp(False)
        if world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")
        return cls(rank, world, place)

    @property
    def meeting(self) -> torch.device:
        """Where small tensors of all ranks meet: NCCL wants them on the GPU, gloo on the CPU."""
        return self.device if self.device.type == "cuda" else torch.device("cpu")

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every world-th item, beginning with the rank's own."""
        return items[self.rank :: self.world]

    def divided(self, batch: int, accumulate: int, before: int) -> tuple[int, int]:
        """(samples at a time, passes a step) of each process, for a run that began on `before` of them with these: as
        many samples in a step, and the same ones. Passes stay whole where they can, and with them every number.

        Raises UsageError, with the numbers of processes that would do, where the samples of a step cannot be shared.
        """
        passes, samples = accumulate * before, batch * accumulate * before
        if passes % self.world == 0:
            return batch, passes // self.world
        if samples % self.world:
            fit = ", ".join(str(count) for count in range(1, samples + 1) if samples % count == 0)
            raise UsageError(f"{self.world} processes cannot share the {samples} samples of a step: start {fit}")
        each = samples // self.world
        passes = next(count for count in range(1, each + 1) if each % count == 0 and each // count <= batch)
        return each // passes, passes

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """True on every rank when it is true on one. Waits for the device."""
        if self.world == 1:
            return flag
        value = torch.tensor(int(flag), device=self.meeting)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def parallel(self, module: nn.Module) -> nn.Module:
        """The module as it is to be called in training: its gradients are the means over the ranks once the backward
        pass has ended (DistributedDataParallel, which sends them while it runs). Alone it is the module itself.

        Parameters without a gradient are allowed. The ranks have made the same weights from the same seeds, so none are
        sent at the start; those that are in shares could not be.
        """
        if self.world == 1:
            return module
        warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified")
        return nn.parallel.DistributedDataParallel(
            module,
            process_group=dist.new_group(),  # of its own: parts in shares send at the same time, in another order
            init_sync=False,
            find_unused_parameters=True,
            gradient_as_bucket_view=True,
        )

    def mean(self, value: float, count: int) -> float:
        """The mean of `value`, each rank's weighted by its `count`."""
        pair = torch.tensor([value * count, count], dtype=torch.float64, device=self.meeting)
        if self.world > 1:
            dist.all_reduce(pair)
        return (pair[0] / pair[1].clamp(min=1)).item()

    def gather(self, mine: Tensor, count: int, chunk: int) -> Tensor:
        """Put rows together, on the CPU, that ranks made chunk by chunk in turn: rank r has chunks r, r + world, ..."""
        if self.world == 1:
            return mine
        full = torch.zeros(count, *mine.shape[1:], dtype=mine.dtype)
        starts = self.share(range(0, count, chunk))
        full[[i for start in starts for i in range(start, min(start + chunk, count))]] = mine
        full = full.to(self.meeting)
        dist.all_reduce(full)  # every row is zero on all ranks but one
        return full.cpu()

    def agree(self, value: T) -> T:
        """The first rank's `value`, on all of them; any object that can be pickled, among processes of one run."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]


def device_of(asked: str = "", local: int = 0, float64: bool = False) -> torch.device:
    """The device of a process: what --device asks for, or else the best there is, CUDA before Apple's MPS before the
    CPU. "cuda" is the process's own GPU, the `local`-th of this machine. MPS has no float64, so it is left out where
    the work needs that. Raises UsageError for a device that is not here.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if not asked:
        asked = "cuda" if cuda else "mps" if mps and not float64 else "cpu"
    kind, _, number = asked.partition(":")
    if kind not in ("cuda", "mps", "cpu") or (number and not (kind == "cuda" and re.fullmatch("[0-9]{1,3}", number))):
        raise UsageError(f"--device {asked}: say cuda, cuda:1, mps or cpu")
    if kind == "cuda":
        index, count = int(number or local), torch.cuda.device_count() if cuda else 0
        if index >= count:
            raise UsageError(f"--device {asked}: {count or 'no'} CUDA device{'s are' if count > 1 else ' is'} here")
        return torch.device("cuda", index)
    if kind == "mps" and (float64 or not mps):
        raise UsageError("--device mps: " + ("it has no float64, which this needs" if mps else "it is not here"))
    return torch.device(kind)


ALONE = Ranks()
