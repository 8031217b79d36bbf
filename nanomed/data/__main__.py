"""python -m nanomed.data check PATH [--valid PATH]: what is wrong with a data set, as one table and one exit code.

PATH is a folder or a spec such as clef:DIR. Exit code 0: nothing serious; 3: something is; 2: usage.
"""

import argparse
import sys
from collections import defaultdict

from tqdm import tqdm

from nanomed.data.check import check, counter
from nanomed.data.table import DataError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m nanomed.data", description=__doc__, allow_abbrev=False)
    parser.add_argument("verb", choices=["check"])
    parser.add_argument("path", help="folder or spec of the data set")
    parser.add_argument("--valid", default="", help="another set that must share no image with it")
    parser.add_argument("--tokens", type=int, default=77, help="tokens a caption may have: MSDM 64, CLIP 77, T5 120")
    parser.add_argument("--vocab", default="", help="folder of the tokenizer to count with; else they are estimated")
    parser.add_argument("--all", action="store_true", help="name every place, not the first of each kind")
    words = parser.parse_args(arguments)
    try:
        count = counter(words.vocab) if words.vocab else None
        bar = lambda items, total: tqdm(items, total=total, unit="image", leave=False, disable=None)  # noqa: E731
        table, findings = check(words.path, words.valid, tokens=words.tokens, count=count, progress=bar)
    except DataError as error:
        print(_plain(str(error)), file=sys.stderr)
        return 3
    prompts = [prompt for row in table.rows for prompt in row.prompts]
    print(f"{len(table.rows):,} images, {len(prompts):,} prompts, {len(set(prompts)):,} of them distinct")
    groups = defaultdict(list)
    for finding in findings:
        groups[not finding.serious, finding.what].append(_plain(finding.where))
    for (harmless, what), places in sorted(groups.items()):
        mark = "look at" if harmless else "WRONG"
        print(f"{mark:8} {len(places):>6}  {what:52} {places[0]}{' ...' if len(places) > 1 and not words.all else ''}")
        for place in places[1:] if words.all else ():
            print(f"{'':69}{place}")
    if not findings:
        print("nothing is wrong")
    return 3 if any(finding.serious for finding in findings) else 0


def _plain(text: str) -> str:
    """File names and prompts may hold anything; what is no visible character is printed as its escape."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


if __name__ == "__main__":
    sys.exit(main())
