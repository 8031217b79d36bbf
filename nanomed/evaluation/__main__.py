"""Which number to believe: every measure that needs no download, against twelve known damages of the toy world.

    python -m nanomed.evaluation --out results/damages      matrix.html, matrix.json, matrix.md; about ten minutes
"""

import argparse
import sys
from pathlib import Path

import torch

from nanomed.evaluation import damages
from nanomed.run import files


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m nanomed.evaluation", description=__doc__)
    parser.add_argument("--out", default="results/damages", help="folder for the page, the JSON and the table")
    parser.add_argument("--images", type=int, default=200, help="on each side; 40 or more")
    parser.add_argument("--side", type=int, default=64, help="pixels")
    args = parser.parse_args(arguments)
    if args.images < 40 or args.side < 32:
        parser.error("--images 40 or more, of --side 32 or more")
    counts = sorted({n for n in (25, 50, 100, 200, 400, 800, 1600) if n < args.images} | {args.images})
    with torch.inference_mode():
        found = damages.matrix(args.images, args.side, counts, lambda line: print(line, flush=True))
    out = Path(args.out)
    files.write_text(out / "matrix.json", damages.as_json(found))
    files.write_text(out / "matrix.md", damages.markdown(found))
    files.write_text(out / "matrix.html", damages.page(found, args.side))
    print(out / "matrix.html")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
