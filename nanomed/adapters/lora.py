"""LoRA, rsLoRA and DoRA on the Linear and Conv2d layers of any network.

    params = lora.inject(transformer, rank=8, targets=("to_q", "to_k", "to_v", "to_out.0"))
    ...train params...
    formats.save_peft("run/transformer_lora", transformer)

    formats.load_peft("run/transformer_lora", transformer)        # in place of inject, on the bare network
    lora.fold(transformer)                                     # W <- W + s B A: no adapter left, nothing to pay for it

What an adapted layer computes is in layer.py, the file formats are in formats.py.
"""

import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from nanomed.adapters.layer import Adapted, attach, detach, start

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # the usual targets in diffusers' names
KINDS = ("lora", "rslora", "dora", "rsdora")

# ----------------------------------------------------------------------------------------------------- the life of one


def inject(
    module: nn.Module,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] = ATTENTION,
    kind: str = "lora",
    init: str = "gaussian",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> list[nn.Parameter]:
    """Adapt the layers of `module` that `targets` name, freeze everything else in it, return what trains.

    alpha     numerator of the scale; None: each layer's own rank, so that the scale of "lora" and "dora" is 1
    targets   whole names or suffixes behind a dot, as in PEFT: "to_q" is to_q and any x.y.to_q
    kind      "lora", "rslora" (scale alpha / sqrt r), "dora", or "rsdora" (both)
    init      of A: "gaussian", N(0, (1/r)^2), or "kaiming", uniform with a = sqrt 5 as nn.Linear has it. B is zero,
              so the network starts as it was
    patterns  other ranks and alphas for some layers: {name, suffix or, as in PEFT, regular expression of them: value}

    Adapters are fp32 (fp64 in an fp64 network) whatever the dtype of the network. Order: that of the layers; of each
    A, B and, for DoRA, the magnitude.

    Raises ValueError for a network that has an adapter, targets that match nothing, and targets that are neither
    nn.Linear nor a plain nn.Conv2d. A single target that matches nothing is only warned about: the released Med-Art
    script has two of them.
    """
    if kind not in KINDS or init not in ("gaussian", "kaiming"):
        raise ValueError(f"kind={kind!r}, init={init!r}: kinds are {', '.join(KINDS)}; starts gaussian and kaiming")
    expect_bare(module)
    targets = (targets,) if isinstance(targets, str) else targets
    chosen = {name: layer for name, layer in module.named_modules() if matches(name, targets)}
    unused = [target for target in targets if not any(matches(name, (target,)) for name in chosen)]
    if not chosen:
        raise ValueError(f"no layer of {type(module).__name__} is named {' or '.join(targets)}: {_endings(module)}")
    for name, layer in chosen.items():
        expect_adaptable(name, layer)
    if unused:
        warnings.warn(f"LoRA targets that no layer has: {', '.join(unused)}; {_endings(module)}", stacklevel=2)
    ranks = {name: int(by_pattern(rank_pattern, name, rank)) for name in chosen}
    if bad := [name for name, r in ranks.items() if r < 1]:
        raise ValueError(f"rank {ranks[bad[0]]} of {bad[0]}: a rank is at least 1")
    module.requires_grad_(False)
    for name, layer in chosen.items():
        own = by_pattern(alpha_pattern, name, ranks[name] if alpha is None else alpha)
        attach(layer, *start(layer.weight, ranks[name], init, dora="dora" in kind), own, kind.startswith("rs"))
    return parameters(module)


def adapted(module: nn.Module) -> bool:
    """Whether a network has an adapter."""
    return any(isinstance(layer, Adapted) for layer in module.modules())


def parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of the adapter, in the order of the layers."""
    return [param for layer in layers_of(module).values() for param in layer.adapter().values()]


def state(module: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under their names in `module`: `blocks.0.to_q.lora_A.weight`, ..."""
    layers = layers_of(module)
    return {f"{name}.{key}": p.detach() for name, layer in layers.items() for key, p in layer.adapter().items()}


def merge(module: nn.Module) -> None:
    """Put the adapter into the weights, which then cost nothing extra. The weights as they were are kept beside them
    (one more copy of the adapted weights, until `unmerge`). `state_dict` still gives base and adapter apart.

    In a bf16 network the sum is made in fp32 and rounded once; what is below half a bit of W is lost while merged.
    """
    for layer in layers_of(module).values():
        layer.merge()


def unmerge(module: nn.Module) -> None:
    """Put the very weights back that `merge` set aside: the same parameters, the same bits."""
    for layer in layers_of(module).values():
        layer.unmerge()


@contextmanager
def merged(module: nn.Module) -> Iterator[None]:
    """Merged inside the `with`, for drawing images in the middle of training."""
    try:
        merge(module)
        yield
    finally:
        unmerge(module)


def remove(module: nn.Module) -> None:
    """Take the adapter away; the network is what it was before, to the bit (and frozen)."""
    for layer in layers_of(module).values():
        layer.unmerge()
        detach(layer)


def fold(module: nn.Module) -> None:
    """Merge for good, layer by layer, as sampling wants it: adapter and old weights go, no copy is held beside them."""
    for layer in layers_of(module).values():
        layer.merge()
        detach(layer)


def layers_of(module: nn.Module) -> dict[str, nn.Module]:
    """The adapted layers by name; ValueError where there are none."""
    found: dict[str, nn.Module] = {name: each for name, each in module.named_modules() if isinstance(each, Adapted)}  # type: ignore[misc]
    if not found:
        raise ValueError(f"this {type(module).__name__} has no adapter: inject or load one first")
    return found


def expect_bare(module: nn.Module) -> None:
    """ValueError for a network that has an adapter."""
    if adapted(module):
        raise ValueError(f"this {type(module).__name__} has an adapter already: fold or remove it first")


def expect_adaptable(name: str, layer: nn.Module) -> None:
    """ValueError for a layer that cannot have an adapter."""
    # Exactly these classes: a subclass may read its weight in a way of its own, and would miss the adapter.
    if type(layer) not in (nn.Linear, nn.Conv2d):
        raise ValueError(f"{name} is a {type(layer).__name__}: adapters are for nn.Linear and nn.Conv2d")
    if getattr(layer, "groups", 1) != 1:
        raise ValueError(f"{name} is a convolution in {layer.groups} groups: adapters are for one group")


def matches(name: str, targets: Collection[str]) -> bool:
    """Whether a name is a target, or ends in one behind a dot."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def by_pattern(patterns: Mapping[str, float] | None, name: str, default: float) -> float:
    """The value of the first pattern that a whole name, or its end behind a dot, matches (PEFT's rule)."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def adaptable(module: nn.Module) -> dict[str, nn.Module]:
    """The layers by name that an adapter could be put on."""
    return {name: layer for name, layer in module.named_modules() if type(layer) in (nn.Linear, nn.Conv2d)}


def ending(name: str) -> str:
    """The shortest end of a name that says something: to_q, but to_out.0."""
    parts = name.split(".")
    start = next((i for i in reversed(range(len(parts))) if not parts[i].isdigit()), 0)
    return ".".join(parts[start:])


def _endings(module: nn.Module) -> str:
    return f"its layers are named {', '.join(sorted({ending(name) for name in adaptable(module)}))}"
