"""Which number to believe: every measure that needs no download, against twelve known damages of the toy world.

    python -m nanomed.evaluation --out results/damages      matrix.html, matrix.json, matrix.md; about ten minutes
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from nanomed.evaluation import damages
from nanomed.run import files, flags


@dataclass
class Config:
    """Flags of the matrix."""

    out: Annotated[str, "a folder to write"] = "results/damages"  # folder for the page, the JSON and the table
    images: Annotated[int, "40 .. 100000"] = 200  # on each side
    side: Annotated[int, "32 .. 4096"] = 64  # pixels


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    config = flags.parse(Config, sys.argv[1:] if arguments is None else arguments, description=__doc__)
    flags.check_place(f"--out {config.out}", config.out, folder=True)
    out = Path(config.out)
    written = [out / f"matrix.{kind}" for kind in ("json", "md", "html")]
    files.expect_own(*written)
    counts = sorted({n for n in (25, 50, 100, 200, 400, 800, 1600) if n < config.images} | {config.images})
    with torch.inference_mode():
        found = damages.matrix(config.images, config.side, counts, lambda line: print(line, flush=True))
    texts = damages.as_json(found), damages.markdown(found), damages.page(found, config.side)
    for path, text in zip(written, texts):
        files.write_text(path, text)
    files.mark_own(*written)
    print(written[-1])
    return 0


if __name__ == "__main__":
    flags.main(main)
