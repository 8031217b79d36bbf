"""Adapters in files: what one is, in another format, or merged into the published weights.

    python -m nanomed.adapters show FILE                             rank, alpha, layers, dtype, base
    python -m nanomed.adapters RUN --to diffusers --out FILE         also peft, kohya
    python -m nanomed.adapters RUN --merge --out FOLDER              whole weights in the published layout

RUN is a run of train.py, or an adapter's file (also one of kohya's keys) or folder. Exit code 0; 2: the command line;
4: the files.
"""

import argparse
import sys
from pathlib import Path

import torch

from nanomed.adapters import convert, onto
from nanomed.run.flags import UsageError
from nanomed.weights import WeightsError, WeightsNotFound

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def main(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    shown = arguments[:1] == ["show"]
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m nanomed.adapters", description=__doc__, formatter_class=about, allow_abbrev=False
    )
    parser.add_argument("path", help="a run, or an adapter's file or folder")
    if not shown:
        parser.add_argument("--to", choices=("peft", "diffusers", "kohya"), help="the format to write")
        parser.add_argument("--merge", action="store_true", help="write whole weights in the published layout")
        parser.add_argument("--out", help="what to write: a file, for peft and --merge a folder; must not be there")
        parser.add_argument("--dtype", choices=sorted(DTYPES), help="of what is written; default: as it is")
        parser.add_argument("--weights", help="where published files are, besides weights/ and the Hugging Face cache")
    words = parser.parse_args(arguments[1:] if shown else arguments)
    try:
        path = Path(words.path)
        if not words.path or not onto.exists(words.path):
            raise WeightsNotFound(f"{words.path or 'an empty name'}: no such file or folder")
        if shown:
            print("\n".join(convert.show(path)))
            return 0
        written = _write(path, words)
    except (UsageError, WeightsError, OSError) as error:
        print(f"python -m nanomed.adapters: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 4
    print("\n".join(map(str, written)))
    return 0


def _write(path: Path, words: argparse.Namespace) -> list[Path]:
    if bool(words.to) == words.merge or not words.out:
        raise UsageError("say --to peft, diffusers or kohya, or --merge, and --out NAME for what is written")
    out, dtype = Path(words.out), DTYPES.get(words.dtype)
    if words.merge:
        return convert.merge(path, out, words.weights, dtype)
    layers = convert.read(path)
    if len(layers) > 1:
        raise UsageError(f"{path}: its adapter lies on {len(layers) - 1} others and means nothing without them; "
                         f"--merge writes them all")  # fmt: skip
    return convert.write(layers[0], words.to, out, dtype)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
