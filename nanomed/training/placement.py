"""Where the parts live that a stage does not train: on the device, on the CPU, or in shares over the processes.

    --frozen device            beside what trains (the default)
    --frozen cpu               on the CPU, once all that they make of the data is on disk
    --frozen share             each process of torchrun holds a share of their weights (FSDP2)
    --frozen text_encoder=cpu,vae=device     part by part

A text encoder whose adapter trains is frozen, too: it can be shared, and its adapter stays whole.
"""

import torch
from torch import nn

from nanomed.adapters import lora
from nanomed.run.flags import UsageError
from nanomed.run.ranks import Ranks

PLACES = ("device", "cpu", "share")
TEXT = "text_encoder"  # how the names of text encoders begin


def places_of(asked: str, system, stage: str) -> dict[str, str]:
    """{part: place} of the parts that are frozen in a stage: where --frozen asks for, as far as that place is for them.

    The CPU is for parts whose results are kept. Shares are for all of them, a text encoder whose adapter trains
    included. Raises UsageError for a part or a place that is not there.
    """
    parts = [name for name, _ in system.named_children()]
    if asked not in PLACES:
        for item in asked.split(","):
            name, _, place = item.strip().partition("=")
            if name not in parts or place not in PLACES:
                raise UsageError(f"--frozen {asked}: say {', '.join(PLACES)}, or PART=PLACE of {', '.join(parts)}")
    wishes = dict.fromkeys(parts, asked) if asked in PLACES else dict(
        item.strip().split("=") for item in asked.split(","))  # fmt: skip
    trained = set(system.stages[stage])
    tuned = {name for name in trained if name.startswith(TEXT) and lora.adapted(system.get_submodule(name))}
    kept = {part for several, _ in system.frozen(stage).values() for part in several.split()}
    frozen = [name for name in parts if name not in trained or name in tuned]
    possible = {"device": set(parts), "cpu": kept, "share": set(frozen)}
    return {name: place if name in possible[place := wishes.get(name, "device")] else "device" for name in frozen}


class Placement:
    """Puts the frozen parts of a stage where they are to live.

    last   whether no stage comes after it: else none is cut in shares, for it may train or be asked for later
    """

    def __init__(self, system, stage: str, asked: str, ranks: Ranks, last: bool = True):
        self.system, self.ranks, self.pieces = system, ranks, []
        places = places_of(asked, system, stage)
        self.idle = [part for part, place in places.items() if place == "cpu"]
        self.shared = [part for part, place in places.items() if place == "share" and ranks.world > 1 and last]

    def settle(self) -> None:
        """Call when what the frozen parts make of the data is on disk: now they may leave, or be cut. Prompts that are
        still asked of one on the CPU, those of images that are drawn, are encoded there."""
        for part in self.idle:
            self.system.get_submodule(part).cpu()
        for part in self.shared:
            self._share(part)

    def whole(self) -> None:
        """Put shared parts together in every process: those that share out images need not draw equally many, and none
        waits for another."""
        for piece in self.pieces:
            piece.set_reshard_after_forward(False, recurse=False)
            piece.unshard()

    def apart(self) -> None:
        """Take them apart again, for training."""
        for piece in self.pieces:
            piece.set_reshard_after_forward(True, recurse=False)
            piece.reshard()

    def _share(self, part: str) -> None:
        """Leave each process a share of a frozen part's weights: a block is put together when it is called, forward and
        backward, and so is a vocabulary. What lies between blocks stays whole, because the methods of a part (`encode`,
        `features`) read it directly; adapters do too, and with them gradients, optimizer and files are as they always
        are."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        module = self.system.get_submodule(part)
        module.to(memory_format=torch.contiguous_format)  # all that FSDP2 takes
        mesh = init_device_mesh(self.ranks.device.type, (self.ranks.world,))
        kept = set(lora.parameters(module)) if lora.adapted(module) else set()
        for piece in pieces(module, vocabulary=part.startswith(TEXT)):
            self.pieces.append(fully_shard(piece, mesh=mesh, ignored_params=kept))


def pieces(module: nn.Module, vocabulary: bool) -> list[nn.Module]:
    """The outermost modules in lists that are called and have weights, such as the blocks of a transformer, and the
    embedding with the most rows where there is a vocabulary. An `Upsample` is left whole: on a CPU it hands on a view,
    of which FSDP cannot promise gradients, and it is one convolution."""
    lists = [child for child in module.modules() if isinstance(child, nn.ModuleList)]
    called = [block for blocks in lists for block in blocks if type(block).forward is not nn.Module.forward]
    called = [block for block in called if type(block).__name__ != "Upsample"]
    blocks = [block for block in called if any(True for _ in block.parameters())]
    inner = {id(child) for block in blocks for child in block.modules() if child is not block}
    tables = [child for child in module.modules() if isinstance(child, nn.Embedding)] if vocabulary else []
    largest = max(tables, key=lambda table: table.num_embeddings, default=None)
    return [block for block in blocks if id(block) not in inner] + ([largest] if largest is not None else [])


def gigabytes(system, places: dict[str, str], step: float, ranks: int) -> float:
    """What a stage needs on each device, by arithmetic on shapes: weights by place, the bytes that a step holds beside
    them (shadow.py), and what CUDA itself and its libraries take."""

    def kept(name: str, module: nn.Module) -> float:
        whole, place = sum(p.nbytes for p in module.parameters()), places.get(name, "device")
        if place == "cpu":
            return 0.0
        cut = pieces(module, name.startswith(TEXT)) if place == "share" else []
        return whole - sum(p.nbytes for piece in cut for p in piece.parameters()) * (1 - 1 / ranks)

    return (sum(kept(name, module) for name, module in system.named_children()) + step) / 1e9 + 1.0
