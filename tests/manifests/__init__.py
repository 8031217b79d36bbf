"""Names and shapes of the tensors in published checkpoints: what a module must have to load them strictly.

One text file a component. First come `key: JSON` lines (repository, config, parameters, ...) and an empty line,
then the tensors as a tree, two spaces a level. Braces hold siblings that look alike:

    encoder.layers.{0..11}                             # 12 layers that look alike
      {layer_norm1,layer_norm2}.{weight,bias} 768      # one name, one shape
      mlp.fc1 weight 3072x768 bias 3072                # one module, pairs of a name and a shape

`()` is the shape of a scalar. Comments are for this explanation only; the files have none.
"""

import itertools
import json
import re
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
_GROUP = re.compile(r"\{([^}]*)\}|([^{]+)")


def components() -> list[str]:
    """All components, e.g. `sd14_unet`; adapters are `lora/sd14_unet_r4`."""
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.txt"))


def about(component: str) -> dict:
    """A manifest's head: repo, files, config, params, `optional` (what the file may have besides), ..."""
    head, _ = _read(component)
    return {key: json.loads(value) for key, value in (line.split(": ", 1) for line in head)}


def config(component: str) -> dict:
    """The component's published `config.json`, as far as it shapes the network."""
    return about(component)["config"]


def names_and_shapes(component: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of the component, in tree order: its name in the published file and its shape."""
    tensors: dict[str, tuple[int, ...]] = {}
    stack: list[str] = []
    for line in _read(component)[1]:
        path, *rest = line.split()
        depth = (len(line) - len(line.lstrip())) // 2
        stack[depth:] = [path]
        parent = ".".join(stack)
        if len(rest) == 1:
            leaves = [(parent, rest[0])]
        else:
            leaves = [(f"{parent}.{name}", shape) for name, shape in zip(rest[::2], rest[1::2], strict=True)]
        for pattern, shape in leaves:
            for name in _expand(pattern):
                assert name not in tensors, f"{component}: {name} twice"
                tensors[name] = () if shape == "()" else tuple(int(size) for size in shape.split("x"))
    return tensors


@cache
def _read(component: str) -> tuple[list[str], list[str]]:
    head, tree = (FOLDER / f"{component}.txt").read_text(encoding="utf-8").split("\n\n", 1)
    return head.splitlines(), tree.splitlines()


def _expand(pattern: str) -> list[str]:
    """`a.{0..2}.{b,c}` -> a.0.b, a.0.c, a.1.b, ..."""
    choices = []
    for group, plain in _GROUP.findall(pattern):
        if plain:
            choices.append([plain])
            continue
        items = []
        for item in group.split(","):
            first, dots, last = item.partition("..")
            items += [str(number) for number in range(int(first), int(last) + 1)] if dots else [item]
        choices.append(items)
    return ["".join(parts) for parts in itertools.product(*choices)]
