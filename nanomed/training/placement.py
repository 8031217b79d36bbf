"""Where the parts live that a stage does not train: on the device, on the CPU, or in shares over the processes.

    --frozen device            beside what trains (the default)
    --frozen cpu               on the CPU, once all that they make of the data is on disk
    --frozen share             each process of torchrun holds a share of a text encoder's weights (FSDP2); the others,
                               hundreds of times smaller, stay on the device
    --frozen text_encoder=cpu,vae=device     part by part

A text encoder whose adapter trains is frozen, too: it can be shared, and its adapter stays whole.
"""

import torch
from torch import nn

from nanomed.adapters import lora
from nanomed.run.flags import UsageError
from nanomed.run.ranks import Ranks

PLACES = ("device", "cpu", "share")


def places_of(asked: str, system, stage: str, adapted: bool = False) -> dict[str, str]:
    """{part: place} of the parts that are frozen in a stage, as --frozen asks. Raises UsageError for a part or a place
    that is not there."""
    parts = [name for name, _ in system.named_children()]
    tuned = {name for name in parts if adapted and name.startswith("text_encoder")}
    frozen = [name for name in parts if name not in system.stages[stage] or name in tuned]
    if asked in PLACES:
        return dict.fromkeys(frozen, asked)
    places = dict.fromkeys(frozen, "device")
    for item in asked.split(","):
        name, _, place = item.strip().partition("=")
        if name not in parts or place not in PLACES:
            raise UsageError(f"--frozen {asked}: say {', '.join(PLACES)}, or PART=PLACE of {', '.join(parts)}")
        if name in places:
            places[name] = place
    return places


class Placement:
    """Puts the frozen parts of a stage where they are to live.

    last   whether no stage comes after it: else all parts stay whole, for they may train or be asked for later
    """

    def __init__(self, system, stage: str, asked: str, ranks: Ranks, last: bool = True):
        self.system, self.ranks = system, ranks
        adapted = any(lora.adapted(system.get_submodule(part)) for part in system.stages[stage])
        self.places = places_of(asked, system, stage, adapted)
        once = {part for part, _ in system.frozen(stage).values() for part in part.split()}
        self.idle = [part for part, place in self.places.items() if place == "cpu" and part in once]
        self.pieces: list[nn.Module] = []
        self.shared = [part for part, place in self.places.items() if
                       place == "share" and ranks.world > 1 and last and part.startswith("text_encoder")]  # fmt: skip

    def settle(self) -> None:
        """Call when what the frozen parts make of the data is on disk: now they may leave, or be cut. Prompts that are
        still asked of one on the CPU, those of images that are drawn, are encoded there."""
        for part in self.idle:
            self.system.get_submodule(part).cpu()
        for part in self.shared:
            self._share(self.system.get_submodule(part))

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

    def _share(self, module: nn.Module) -> None:
        """Leave each process a share of a frozen module's weights: a block is put together when it is used, forward and
        backward. Its adapters stay whole, and with them gradients, optimizer and files are as they always are."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        module.to(memory_format=torch.contiguous_format)  # all that FSDP2 takes
        mesh = init_device_mesh(self.ranks.device.type, (self.ranks.world,))
        kept = set(lora.parameters(module)) if lora.adapted(module) else set()
        lists = [child for child in module.modules() if isinstance(child, nn.ModuleList)]
        blocks = [block for blocks in lists for block in blocks if type(block).forward is not nn.Module.forward]
        blocks = [block for block in blocks if any(True for _ in block.parameters())]
        inner = {id(child) for block in blocks for child in block.modules() if child is not block}
        for piece in (*(block for block in blocks if id(block) not in inner), module):
            self.pieces.append(fully_shard(piece, mesh=mesh, ignored_params=kept))


def memory(system, stage: str, batch: int, places: dict[str, str], ranks: int) -> dict[str, float]:
    """GB on each device, by arithmetic on shapes: weights by place, what trains with its gradients and moments, what
    steps hold; "in all" with the longest step and what CUDA itself takes."""
    activations = system.activations(stage, batch)
    share = {"device": 1.0, "cpu": 0.0, "share": 1 / ranks}
    kept = {name: sum(p.nbytes for p in module.parameters()) * share[places.get(name, "device")]
            for name, module in system.named_children()}  # fmt: skip
    trained = sum(p.numel() for p in system.trainable(stage).values())
    gb = {"weights": sum(kept.values()) / 1e9, "what trains, and its moments": 16 * trained / 1e9}
    gb |= {name: held / 1e9 for name, held in activations.items()}
    gb["in all"] = gb["weights"] + 16 * trained / 1e9 + max(activations.values()) / 1e9 + 1.0
    return gb
