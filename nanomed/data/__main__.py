"""python -m nanomed.data check PATH: print what is wrong with a data set before training on it.

Exit codes: 0 nothing, 3 something, 2 a path or flag that makes no sense.
"""

import argparse
import sys
from itertools import groupby

from tqdm import tqdm

from nanomed.data import DataError
from nanomed.data.check import KINDS, check, counter

SHOWN = 5  # lines of a kind, unless --all


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m nanomed.data", allow_abbrev=False)
    doctor = parser.add_subparsers(dest="command", required=True).add_parser(
        "check", help="find what is wrong with a data set", allow_abbrev=False
    )
    doctor.add_argument("path", help="clef:DIR, folder:DIR, kvasir:DIR, ham10000:DIR, skin:DIR, or a folder alone")
    doctor.add_argument("--valid", default="", help="the validation set, to look for images in both")
    doctor.add_argument("--tokens", type=int, default=77, help="tokens a caption may have (MSDM 64, CLIP 77, T5 120)")
    doctor.add_argument("--vocab", default="", help="folder of the tokenizer that counts them; else an estimate")
    doctor.add_argument("--all", action="store_true", help="every finding, not the first five of a kind")
    config = parser.parse_args(arguments)
    try:
        count = counter(config.vocab) if config.vocab else None
        bar = lambda items, total: tqdm(items, total=total, unit="image", leave=False, disable=None)  # noqa: E731
        findings = check(config.path, config.valid, config.tokens, count, bar)
    except DataError as error:
        parser.error(str(error))
    for kind, group in groupby(findings, lambda finding: finding.kind):
        group = list(group)
        print(f"{kind}: {len(group)}   ({KINDS[kind]})")
        for finding in group if config.all else group[:SHOWN]:
            print(f"    {_plain(finding.where)}   {_plain(finding.what)}")
        if len(group) > SHOWN and not config.all:
            print(f"    and {len(group) - SHOWN} more; --all shows them")
    print(f"{config.path}: {len(findings)} findings" if findings else f"{config.path}: nothing wrong was found")
    return 3 if findings else 0


def _plain(text: str) -> str:
    """File names and prompts may hold anything; what is no visible character is printed as its escape."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


if __name__ == "__main__":
    sys.exit(main())
