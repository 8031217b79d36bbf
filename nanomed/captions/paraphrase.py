"""The same prompt in other words: an offline stand-in for the GPT paraphrases of the MMCP paper (section 3).

    python -m nanomed.captions.paraphrase clef:DIR --out paraphrases.csv
    python -m nanomed.captions.paraphrase prompt-gt.csv --out paraphrases.csv
    python train.py --model msdm --data clef:DIR --paraphrases paraphrases.csv

A paraphrase is an opening ("Create a medical image") and a statement ("with two visible polyps"). Both are tables of
patterns with slots, and `parse` reads a text back with the same tables, so that no wording can change what is said:
every text that this file makes means exactly what its prompt means.
"""

import csv
import io
import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

from nanomed import data
from nanomed.data import grammar
from nanomed.data.grammar import CELLS, PARIS, join
from nanomed.data.prompts import read_prompts
from nanomed.data.table import DataError
from nanomed.run import files, flags

VERBS = ("Create", "Produce", "Draw", "Render", "Synthesize", "Make", "Show", "Give me", "Depict", "Prepare")
NOUNS = ("an endoscopic image", "a medical image", "an endoscopy frame", "a picture from an endoscope")
OPENINGS = tuple(f"{verb} {noun}" for verb in VERBS for noun in NOUNS)

NUMBERS = {0: "no", 1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 16: "sixteen"}
THINGS = {  # singular, plural
    "polyp": (("polyp", "polyps"), ("polypoid growth", "polypoid growths")),
    "finding": (("finding", "findings"), ("abnormality", "abnormalities")),
    "instrument": (("instrument", "instruments"), ("medical tool", "medical tools")),
}
OBJECTS = {  # ways to name what an image contains
    "text": ("overlaid text", "some written text"),
    grammar.BOX: ("a green or black box artefact", "an artefact in the form of a green or black box"),
    "a polyp": ("a polyp", "a polypoid growth"),
    "ulcerative colitis": ("ulcerative colitis", "signs of ulcerative colitis"),
    "oesophagitis": ("oesophagitis", "an inflamed oesophagus"),
    "barretts": ("a Barrett oesophagus", "Barrett mucosa"),
    "the z-line": ("the z-line", "the squamocolumnar junction"),
    "the cecum": ("the cecum", "the blind end of the colon"),
    "the ileum": ("the ileum", "the end of the small bowel"),
    "the pylorus": ("the pylorus", "the outlet of the stomach"),
    "tube": ("a tube", "a piece of tubing"),
    "biopsy forceps": ("biopsy forceps", "a pair of biopsy forceps"),
    "polyp snare": ("a polyp snare", "a snare for polyps"),
    "metal clip": ("a metal clip", "a metallic clip"),
    "injection needle": ("an injection needle", "a needle for injections"),
}
CONTAINING = ("containing {}", "that contains {}", "in which {} can be seen", "that includes {}")
LACKING = ("without {}", "not containing {}", "that is free of {}", "in which there is no sign of {}")
COUNTED = ("with {}", "showing {}", "that displays {}", "in which {} can be counted")
ABSENT = ("with no {}", "showing an absence of {}", "without any {}", "in which no {} can be found")
SINGLE = ("with a single {}", "displaying exactly one {}", "showing one {}", "in which one {} can be counted")
PLACES = {"abnormality": ("an abnormality", "an abnormal finding"), "instrument": ("an instrument", "a medical tool"),
          "anatomical landmark": ("an anatomical landmark", "a landmark of the anatomy")}  # fmt: skip
LOCATED = ("with {} in the {}", "showing {} located in the {}", "that has {} at the {}")
AREAS = ("{}", "{} area", "{} part of the frame")
COLORED = (
    "with an abnormality coloured {}",
    "showing an abnormality whose colors are {}",
    "with an abnormal area in {}",
)
SIZED = ("with {} measuring {}", "showing {} with a size of {}", "in which {} of {} can be seen")
TYPED = (
    "with {} classified as Paris {}",
    "showing {} of Paris type {}",
    "in which {} of the Paris class {} can be seen",
)
PROCEDURES = ("taken during a {}", "recorded in the course of a {}", "that comes from a {} examination")
EXTENTS = {"< 5mm": "under 5 mm", "5-10mm": "5 to 10 mm", "11-20mm": "11 to 20 mm", ">20mm": "over 20 mm"}
PINK = ("with findings that are pink", "showing pinkish findings")


@cache
def _statements() -> dict[str, dict]:
    """Every statement whose wording is a fixed phrase -> what it says."""
    said: dict[str, dict] = {}

    def add(text: str, meaning: dict) -> None:
        assert said.setdefault(text, meaning) == meaning, f"{text!r} would mean two things"

    for prompt in grammar.all_prompts():
        for text in _fixed(prompt):
            add(text, grammar.parse(prompt))
    return said


def _fixed(prompt: str) -> Iterator[str]:
    """The statements of a prompt that names objects, counts or a procedure."""
    if prompt == grammar.STRAY:
        yield from PINK
    elif match := re.fullmatch(r"Generate an image not containing (.+)\.", prompt):
        yield from (pattern.format(name) for pattern in LACKING for name in OBJECTS[match.group(1)])
    elif prompt.startswith("Generate an image containing"):
        names = [OBJECTS[thing] for thing in grammar.parse(prompt)["contains"]]
        for chosen in itertools.product(*names):
            yield from (pattern.format(" together with ".join(chosen)) for pattern in CONTAINING)
    elif match := re.fullmatch(r"Generate an image with (no|\d+) (finding|instrument|polyp)s?\.", prompt):
        number = 0 if match.group(1) == "no" else int(match.group(1))
        for one, many in THINGS[match.group(2)]:
            patterns = {0: ABSENT, 1: SINGLE}.get(number, COUNTED)
            yield from (pattern.format(f"{NUMBERS[number]} {many}" if number > 1 else (many, one)[number])
                        for pattern in patterns)  # fmt: skip
    elif match := re.fullmatch(r"Generate an image from a (\w+) procedure\.", prompt):
        yield from (pattern.format(match.group(1)) for pattern in PROCEDURES)


def _listed(prompt: str) -> Iterator[str]:
    """The statements of a prompt that lists places, colors, sizes or types."""
    said = grammar.parse(prompt)
    if match := re.fullmatch(r"Generate an image with an an (.+) located in the (.+)\.", prompt):
        places = re.split(r", | and ", match.group(2).replace("rigth", "right"))
        words = join(place.replace("-", " ") for place in places)
        for pattern, thing, area in itertools.product(LOCATED, PLACES[match.group(1)], AREAS):
            yield pattern.format(thing, area.format(words))
    elif "colors" in said:
        yield from (pattern.format(join(said["colors"])) for pattern in COLORED)
    elif "sizes" in said:
        things = ("a polyp", "a polypoid growth") if len(said["sizes"]) == 1 else ("polyps", "polypoid growths")
        words = join(EXTENTS[size] for size in said["sizes"])
        yield from (pattern.format(thing, words) for pattern in SIZED for thing in things)
    elif "paris" in said:
        things = ("a polyp", "a polypoid growth") if len(said["paris"]) == 1 else ("polyps", "polypoid growths")
        words = join(kind.capitalize() for kind in said["paris"])
        yield from (pattern.format(thing, words) for pattern in TYPED for thing in things)


def paraphrases(prompt: str, n: int | None = 40) -> list[str]:
    """`n` texts (None: all) that say what the prompt says, the same ones every time, in varied order.

    Raises ValueError for text outside the grammar.
    """
    grammar.parse(prompt)
    statements = list(_fixed(prompt)) or list(_listed(prompt))
    texts = [f"{opening} {statement}." for opening, statement in itertools.product(OPENINGS, statements)]
    stride = next(k for k in range(len(texts) * 5 // 8, len(texts) + 2) if _coprime(k, len(texts)))
    mixed = [texts[i * stride % len(texts)] for i in range(len(texts))]  # neighbours differ in opening and statement
    return mixed[:n]


def _coprime(a: int, b: int) -> bool:
    while b:
        a, b = b, a % b
    return a == 1


# ---------------------------------------------------------------------------------------------------------- reading


def _pattern(template: str, *slots: str) -> str:
    """A template as a regular expression whose slots are the given groups."""
    parts = [re.escape(part) for part in template.split("{}")]
    return "".join(itertools.chain(*itertools.zip_longest(parts, slots, fillvalue="")))


@cache
def _readers() -> list[tuple[re.Pattern, str, object]]:
    """(pattern, key, how to read its one group) of all statements that list something."""

    def listed(words: dict[str, str]) -> str:
        word = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
        return rf"((?:{word})(?:(?:, | and )(?:{word}))*)"

    cells = {cell.replace("-", " "): cell for cell in CELLS}
    extents = {words: size for size, words in EXTENTS.items()}
    kinds = {kind.capitalize(): kind for kind in PARIS}
    keys = {"abnormality": "abnormality_at", "instrument": "instrument_at", "anatomical landmark": "landmark_at"}
    readers = []
    for what, things in PLACES.items():
        for template, thing, area in itertools.product(LOCATED, things, AREAS):
            readers.append(
                (_pattern(template.replace("{}", thing, 1), _pattern(area, listed(cells))), keys[what], cells)
            )
    readers += [(_pattern(template, "(.+)"), "colors", {}) for template in COLORED]  # in anybody's words
    growths = r"(?:a polyp|a polypoid growth|polyps|polypoid growths)"
    readers += [(_pattern(template, growths, listed(extents)), "sizes", extents) for template in SIZED]
    readers += [(_pattern(template, growths, listed(kinds)), "paris", kinds) for template in TYPED]
    return [(re.compile(pattern), key, words) for pattern, key, words in readers]


def parse(text: str) -> dict[str, object]:
    """What a paraphrase says, in the words of `grammar.parse`. Raises ValueError for any other text."""
    for opening in OPENINGS:
        if text.startswith(f"{opening} ") and text.endswith("."):
            statement = text[len(opening) + 1 : -1]
            if statement in _statements():
                return _statements()[statement]
            for pattern, key, words in _readers():
                if match := pattern.fullmatch(statement):
                    items = [words.get(word, word) for word in re.split(r", | and ", match.group(1))]
                    return {key: frozenset(items) if key.endswith("_at") else tuple(items)}
    raise ValueError(f"not a paraphrase that this file makes: {text!r}")


def write_csv(path: str | Path, prompts: Iterable[str], n: int = 40) -> tuple[int, list[str]]:
    """Write `Prompt,Paraphrase` lines, up to `n` for each distinct prompt. Returns how many, and the prompts that no
    rule covers: they stand in the file as they are, and train under their own words."""
    out, count, uncovered = io.StringIO(newline=""), 0, []
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["Prompt", "Paraphrase"])
    for prompt in dict.fromkeys(prompts):
        try:
            texts = paraphrases(prompt, n)
        except ValueError:
            uncovered.append(prompt)
            writer.writerow([prompt, prompt])
            continue
        writer.writerows((prompt, text) for text in texts)
        count += len(texts)
    files.write_text(path, out.getvalue())
    return count, uncovered


def read_source(source: str) -> list[str]:
    """The prompts of a data set as train.py names it, or of a file of prompts. Raises DataError."""
    kind, colon, where = source.partition(":")
    if not Path(source).exists() and (colon or kind == "toy"):
        return [prompt for row in data.load(source).rows for prompt in row.prompts]
    if Path(source).is_dir():
        raise DataError(f"{source} is a folder: say which kind of data set, such as clef:{source}")
    return read_prompts(source)


@dataclass
class Config:
    """Flags of `python -m nanomed.captions.paraphrase`."""

    source: str = ""  # a file of prompts, or a data set such as clef:DIR
    out: Annotated[str, "a file to write"] = ""  # the CSV file to write, for train.py --paraphrases
    n: Annotated[int, "1 .. 1000"] = 40  # paraphrases of a prompt


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the paraphrases of a file of prompts, and name the prompts that no rule covers."""
    config = flags.parse(Config, arguments, description=__doc__, words=("source",))
    if not config.source or not config.out:
        raise flags.UsageError("say what to paraphrase and where to write it: SOURCE --out FILE")
    files.expect_own(config.out)
    prompts = [prompt for prompt in dict.fromkeys(read_source(config.source)) if prompt]
    if not prompts:
        raise DataError(f"{config.source}: no prompts")
    count, uncovered = write_csv(config.out, prompts, config.n)
    files.mark_own(config.out)
    sys.stdout.write(f"{config.out}: {count:,} paraphrases of {len(prompts) - len(uncovered):,} prompts\n")
    if uncovered:
        sys.stdout.write(f"{len(uncovered):,} that no rule covers train under their own words:\n")
        sys.stdout.writelines(f"    {prompt!r}\n" for prompt in uncovered)
    return 0


if __name__ == "__main__":
    flags.main(main)
