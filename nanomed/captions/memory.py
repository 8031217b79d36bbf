"""A language model on a card that is too small for it. What it needs there is in sizes.py.

    to_int8(decoder)                its products in whole numbers, row by row: half of bfloat16's memory
    LayersInTurn(network, device)   its layers stay on the CPU and come to the device one by one
    Shares(network, ranks)          every process of torchrun holds a share of each layer (FSDP2)

Embedding and head, an image tower and the cache of keys and values stay whole and on the device in all of them.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from nanomed.captions.networks.decoder import Decoder
from nanomed.run.ranks import Ranks


def writer_of(network: nn.Module) -> Decoder:
    """The language model of a network: itself, or what reads for its eyes."""
    return network if isinstance(network, Decoder) else network.writer


class Int8Linear(nn.Module):
    """A product with a matrix of whole numbers, each row with its own scale: half of bfloat16's memory.

    The largest of a row becomes 127, so a weight is off by half a step, 1/254 of it, at most.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.float().abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        self.register_buffer("weight", (linear.weight.float() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale[:, 0].to(linear.weight.dtype))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out): the matrix becomes numbers of x's type, and rows are scaled behind the product."""
        y = nn.functional.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


def to_int8(decoder: Decoder) -> None:
    """Put every product inside the layers of a decoder into whole numbers; embedding and head stay as they are."""
    for layer in decoder.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                setattr(part, name, Int8Linear(linear))


def compiled(decoder: Decoder) -> None:
    """Let torch.compile fuse what stands between the attentions, once for all lengths. The cache grows in the
    attention, which stays as it is."""
    for layer in decoder.model.layers:
        for name, part in layer.named_children():
            if name != "self_attn":
                part.compile(dynamic=True)


def rest_to(network: nn.Module, device: torch.device) -> None:
    """Move all of a network but its writer's layers."""
    stack = writer_of(network).model
    layers, stack.layers = stack.layers, nn.ModuleList()
    network.to(device)
    stack.layers = layers


# ------------------------------------------------------------------------------------------------------ layers in turn


class LayersInTurn:
    """The writer's layers, kept in the memory of the host and copied to the device when their turn comes.

    The device has room for two of them, so that the next is on its way while one works; behind the last comes the first
    again. On CUDA the host's copies are pinned and a stream of their own carries them.
    """

    def __init__(self, network: nn.Module, device: torch.device | str):
        self.device = torch.device(device)
        cuda = self.device.type == "cuda"
        self.layers = list(writer_of(network).model.layers)
        self.homes = [_packed(layer, pin=cuda) for layer in self.layers]
        self.slots = [torch.empty(max(map(len, self.homes)), dtype=torch.uint8, device=self.device) for _ in range(2)]
        self.holds: list[int | None] = [None, None]  # the layer in each slot
        self.stream = torch.cuda.Stream(self.device) if cuda else None
        self.arrived: list = [None, None]  # CUDA events: the copy into a slot, and the last use of what it held
        self.used: list = [None, None]
        for i, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(partial(self._enter, i))
            layer.register_forward_hook(partial(self._leave, i))
        rest_to(network, self.device)

    def _bring(self, i: int, slot: int) -> None:
        home = self.homes[i]
        self.holds[slot] = i
        if self.stream is None:
            self.slots[slot][: len(home)].copy_(home)
            return
        with torch.cuda.stream(self.stream):
            if self.used[slot] is not None:
                self.stream.wait_event(self.used[slot])
            self.slots[slot][: len(home)].copy_(home, non_blocking=True)
            self.arrived[slot] = self.stream.record_event()

    def _enter(self, i: int, layer: nn.Module, _given) -> None:
        if i not in self.holds:  # the first of all, or after an interruption
            self._bring(i, 0)
        slot = self.holds.index(i)
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self.arrived[slot])
        _place(layer, self.slots[slot])
        following = (i + 1) % len(self.layers)
        if following not in self.holds:
            self._bring(following, 1 - slot)

    def _leave(self, i: int, layer: nn.Module, _given, _made) -> None:
        if self.stream is not None:
            self.used[self.holds.index(i)] = torch.cuda.current_stream(self.device).record_event()
        _place(layer, self.homes[i])


def tensors_of(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """(owner, name, tensor) of all parameters and buffers, always in the same order."""
    for owner in module.modules():
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None:
                yield owner, name, tensor


def _packed(layer: nn.Module, pin: bool) -> Tensor:
    """All weights of a layer in one block of bytes, which they are views of from now on."""
    total = sum(_room(tensor) for _, _, tensor in tensors_of(layer))
    block, start = torch.empty(total, dtype=torch.uint8, pin_memory=pin), 0
    for _, _, tensor in tensors_of(layer):
        block[start : start + tensor.nbytes] = tensor.detach().contiguous().view(-1).view(torch.uint8)
        start += _room(tensor)
    _place(layer, block)
    return block


def _place(layer: nn.Module, block: Tensor) -> None:
    """Make a layer's weights views of a block of bytes."""
    start = 0
    for owner, name, tensor in tensors_of(layer):
        view = block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        start += _room(tensor)
        if name in owner._parameters:
            tensor.data = view
        else:
            owner._buffers[name] = view


def _room(tensor: Tensor) -> int:
    """Bytes, up to the next 64: products are fastest from there, and the same to the bit as elsewhere."""
    return -(-tensor.nbytes // 64) * 64


# --------------------------------------------------------------------------------------------------- shares of layers


class Shares:
    """Each process holds a share of every layer; a layer is put together where it is used, on all processes at once.

    They write different captions, of different lengths, so before each pass of the writer all say whether they go on.
    Those with nothing left to write take part until the last is done: `finish` does that, and all must call it.
    """

    def __init__(self, network: nn.Module, ranks: Ranks):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.ranks, self.writer = ranks, writer_of(network)
        mesh = init_device_mesh(ranks.device.type, (ranks.world,))
        for layer in self.writer.model.layers:
            for parameter in layer.parameters():
                parameter.data = parameter.data.contiguous()  # all that FSDP2 takes
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)  # each is a root, which would stay whole
        rest_to(network, ranks.device)
        self.writer.register_forward_pre_hook(lambda *_: ranks.any(True) and None)

    def finish(self) -> None:
        """Help with the passes of the others, until none goes on."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.ranks.device)
        while self.ranks.any(False):
            self.writer.forward(token)  # without the hook: this process has answered already
