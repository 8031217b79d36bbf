"""Adapters in files: what one is, in another format, or merged into the published weights.

    python -m nanomed.adapters show FILE                             rank, alpha, layers, dtype, base
    python -m nanomed.adapters RUN --to diffusers --out FILE         also peft, kohya
    python -m nanomed.adapters RUN --merge --out FOLDER              whole weights in the published layout

RUN is a run of train.py, or an adapter's file (also one of kohya's keys) or folder. Exit code 2: the command line;
4: the files; 5: the machine.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from nanomed.adapters import convert, onto
from nanomed.run import flags
from nanomed.run.flags import UsageError
from nanomed.weights import WeightsNotFound

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Show:
    path: str = ""  # a run, or an adapter's file or folder


@dataclass
class Config:
    path: str = ""  # a run, or an adapter's file or folder
    to: Annotated[str, " | peft | diffusers | kohya"] = ""  # the format to write
    merge: bool = False  # write whole weights in the published layout
    out: str = ""  # what to write: a file, for peft and --merge a folder; must not be there
    dtype: Annotated[str, " | bf16 | fp16 | fp32"] = ""  # of what is written; empty: as it is
    weights: str = ""  # where published files are, besides weights/ and the Hugging Face cache


def main(arguments: Sequence[str] | None = None) -> int:
    given = [*(sys.argv[1:] if arguments is None else arguments)]
    shown = given[:1] == ["show"]
    config: Any = Show if shown else Config
    words = flags.parse(config, given[shown:], description=__doc__, words=("path",))
    if not words.path or not onto.exists(words.path):
        raise WeightsNotFound(f"{words.path or 'an empty name'}: no such file or folder")
    written = convert.show(Path(words.path)) if shown else _write(words)
    print("\n".join(map(str, written)))
    return 0


def _write(words: Config) -> list[Path]:
    if bool(words.to) == words.merge or not words.out:
        raise UsageError("say --to peft, diffusers or kohya, or --merge, and --out NAME for what is written")
    path, out, dtype = Path(words.path), Path(words.out), DTYPES.get(words.dtype)
    convert.free(out)
    flags.check_place(f"--out {out}", words.out, folder=words.merge or words.to == "peft")
    if words.merge:
        return convert.merge(path, out, words.weights, dtype)
    layers = convert.read(path)
    if len(layers) > 1:
        raise UsageError(f"{path}: its adapter lies on {len(layers) - 1} others and means nothing without them; "
                         f"--merge writes them all")  # fmt: skip
    return convert.write(layers[0], words.to, out, dtype)


if __name__ == "__main__":
    flags.main(main)
