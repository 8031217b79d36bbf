"""python -m nanomed.data check PATH [--valid PATH]: what is wrong with a data set, as one table and one exit code.

PATH is a folder or a spec such as clef:DIR. Exit code 0: nothing serious; 3: something is; 2: usage.
"""

import argparse
import sys
from collections import defaultdict

from nanomed.data.check import check
from nanomed.data.table import DataError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m nanomed.data", description=__doc__)
    parser.add_argument("verb", choices=["check"])
    parser.add_argument("path", help="folder or spec of the data set")
    parser.add_argument("--valid", default="", help="another set that must share no image with it")
    words = parser.parse_args()
    try:
        table, findings = check(words.path, words.valid)
    except DataError as error:
        print(error, file=sys.stderr)
        return 3
    prompts = [prompt for row in table.rows for prompt in row.prompts]
    print(f"{len(table.rows):,} images, {len(prompts):,} prompts, {len(set(prompts)):,} of them distinct")
    groups = defaultdict(list)
    for finding in findings:
        groups[not finding.serious, finding.what].append(finding.where)
    for (harmless, what), places in sorted(groups.items()):
        mark = "look at" if harmless else "WRONG"
        print(f"{mark:8} {len(places):>6}  {what:52} {places[0]}{' ...' if len(places) > 1 else ''}")
    if not findings:
        print("nothing is wrong")
    return 3 if any(finding.serious for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
