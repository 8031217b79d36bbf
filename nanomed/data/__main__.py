"""python -m nanomed.data check PATH [--valid PATH]: what is wrong with a data set, as one table and one exit code.

PATH is a folder or a spec such as clef:DIR. Exit code 0: nothing serious; 3: something is; 2: usage.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from nanomed.data import ranges
from nanomed.data.check import check, counter
from nanomed.run import flags


@dataclass
class Config:
    """Flags of `check`."""

    verb: Annotated[str, "check"] = ""  # what to do
    path: str = ""  # folder or spec of the data set
    valid: str = ""  # another set that must share no image with it
    tokens: Annotated[int, "1 .. 10^6"] = 77  # tokens a caption may have: MSDM 64, CLIP 77, T5 120
    vocab: str = ""  # folder of the tokenizer to count with; else they are estimated
    range: str = ""  # auto | BITS | LOW:HIGH: black and white of images with more than 8 bits; empty: 0 and 2^16 - 1
    all: bool = False  # name every place, not the first of each kind


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    words = flags.parse(Config, arguments, description=__doc__, words=("verb", "path"))
    if not words.path.strip():
        raise flags.UsageError("path: say a folder, or a data set such as clef:DIR")
    ranges.judge(words.range)
    count = counter(words.vocab) if words.vocab else None
    table, findings = check(words.path, words.valid, tokens=words.tokens, count=count, span=words.range)
    prompts = [prompt for row in table.rows for prompt in row.prompts]
    print(f"{len(table.rows):,} images, {len(prompts):,} prompts, {len(set(prompts)):,} of them distinct")
    if words.range:
        print(ranges.told(table, words.range))
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
    flags.main(main)
