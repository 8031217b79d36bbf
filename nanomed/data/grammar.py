"""The prompts of ImageCLEFmed MEDVQA-GI 2024: a small grammar, typos included.

Every image of the development set has 7 to 14 prompts that each state one thing: "Generate an image with 2 polyps.",
"Generate an image with an an abnormality located in the upper-left." The doubled "an" and the "lower-rigth" of
landmark prompts are in the real data, so models trained on it know them.

The functions below write the prompts; `parse` reads any of them back. The organisers' file is not redistributable:
the 483 prompts of `all_prompts` have its kinds and its number of each kind, but which lists of colours and places
occur is chosen here.
"""

import itertools
import re
from collections.abc import Iterable

ROWS, COLUMNS = ("upper", "center", "lower"), ("left", "center", "right")
CELLS = tuple("center" if row == column == "center" else f"{row}-{column}" for row in ROWS for column in COLUMNS)
COLORS = ("pink", "red", "white", "yellow", "orange", "grey", "brown", "black", "blue", "purple", "green", "violet",
          "burgundy")  # fmt: skip
SIZES = ("< 5mm", "5-10mm", "11-20mm", ">20mm")
PARIS = ("is", "ip", "iia")
BOX = "a green/black box artefact"
INSTRUMENTS = ("tube", "biopsy forceps", "polyp snare", "metal clip", "injection needle")
FINDINGS = ("a polyp", "ulcerative colitis", "oesophagitis", "barretts")
LANDMARKS = ("the z-line", "the cecum", "the ileum", "the pylorus")
GLUED = (("polyp snare", "tube"), ("a polyp", "oesophagitis"), ("biopsy forceps", "tube"),
         ("biopsy forceps", "metal clip"), ("a polyp", "ulcerative colitis"), ("polyp snare", "metal clip"),
         ("metal clip", "tube"))  # fmt: skip
COUNTS = {"finding": (0, 1, 2, 3, 4, 5, 6, 16), "instrument": (0, 1, 2, 3), "polyp": (0, 1, 2, 3, 4, 5, 6, 16)}
STRAY = "Generate an image with Pink findings."

# ------------------------------------------------------------------------------------------------- writing prompts


def join(items: Iterable[str]) -> str:
    """a / a and b / a, b and c."""
    items = list(items)
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def containing(*objects: str) -> str:
    """Objects of one prompt are glued together: "polyp snareandtube"."""
    return f"Generate an image containing {'and'.join(objects)}."


def not_containing(thing: str) -> str:
    """`thing` is "text" or BOX."""
    return f"Generate an image not containing {thing}."


def count(what: str, number: int) -> str:
    """`what` is "finding", "instrument" or "polyp"."""
    return f"Generate an image with {number or 'no'} {what}{'' if number == 1 else 's'}."


def colors(names: Iterable[str]) -> str:
    """As the toy world says it, which the shipped checkpoint has learned. The organisers write "the color black." and
    "the colors black, grey and white."; `parse` reads all three."""
    return f"Generate an image with an abnormality with the color(s) {join(names)}."


def sizes(names: Iterable[str]) -> str:
    """Entries of SIZES; several stand for several polyps."""
    names = list(names)
    return f"Generate an image with {'a polyp' if len(names) == 1 else 'polyps'} of size {join(names)}."


def paris(types: Iterable[str]) -> str:
    """Of the shapes that are there, such as "is" and "iia"."""
    types = [f"paris {kind}" for kind in types]
    return f"Generate {'a polyp' if len(types) == 1 else 'polyps'} of type {join(types)}."


def procedure(name: str) -> str:
    """`name` is "colonoscopy" or "gastroscopy"."""
    return f"Generate an image from a {name} procedure."


def located(what: str, cells: Iterable[str]) -> str:
    """`what` is "abnormality", "instrument" or "anatomical landmark"; the last one spells "lower-rigth"."""
    place = join(cell for cell in CELLS if cell in set(cells))
    if what == "anatomical landmark":
        place = place.replace("lower-right", "lower-rigth")
    return f"Generate an image with an an {what} located in the {place}."


# ------------------------------------------------------------------------------------------------- reading prompts

_OBJECTS = {name: (name,) for name in ("text", BOX, *INSTRUMENTS, *FINDINGS, *LANDMARKS)}
_OBJECTS |= {"and".join(pair): pair for pair in GLUED}
_PLACES = {"abnormality": "abnormality_at", "instrument": "instrument_at", "anatomical landmark": "landmark_at"}
_CELL = "|".join(CELLS)
_PATTERNS = {
    kind: re.compile(pattern)
    for kind, pattern in {
        "containing": r"Generate an image containing (.+)\.",
        "not_containing": rf"Generate an image not containing (text|{re.escape(BOX)})\.",
        "count": r"Generate an image with (no|\d+) (finding|instrument|polyp)s?\.",
        "colors": r"Generate an image with an abnormality with the (?:color\(s\)|colors?) (.+)\.",
        "sizes": r"Generate an image with (?:a polyp|polyps) of size (.+)\.",
        "paris": r"Generate (?:a polyp|polyps) of type (.+)\.",
        "procedure": r"Generate an image from a (colonoscopy|gastroscopy) procedure\.",
        "located": r"Generate an image with an an (abnormality|instrument|anatomical landmark) located in the (.+)\.",
    }.items()
}


def _items(text: str, allowed: Iterable[str], prompt: str) -> tuple[str, ...]:
    items = tuple(re.split(r", | and ", text))
    if not set(items) <= set(allowed):
        raise ValueError(f"not a prompt of the MEDVQA-GI grammar: {prompt!r}")
    return items


def _free(text: str, prompt: str) -> tuple[str, ...]:
    """Colours are the annotators' own words: pink, pale pink, pink/red."""
    items = tuple(re.split(r", | and ", text))
    if not all(item == item.strip() and item for item in items):
        raise ValueError(f"not a prompt of the MEDVQA-GI grammar: {prompt!r}")
    return items


def parse(prompt: str) -> dict[str, object]:
    """What a prompt says, and nothing that it does not say.

    Keys: "box", "text", "polyp", "instrument" (bool); "polyps", "findings", "instruments" (int); "contains" (tuple of
    the named objects); "abnormality_at", "instrument_at", "landmark_at" (frozenset of cells); "colors", "sizes",
    "paris" (tuple); "procedure" (str). Raises ValueError for text outside the grammar.
    """
    if prompt == STRAY:
        return {"colors": ("pink",)}
    for kind, pattern in _PATTERNS.items():
        if match := pattern.fullmatch(prompt):
            return _READ[kind](prompt, *match.groups())
    raise ValueError(f"not a prompt of the MEDVQA-GI grammar: {prompt!r}")


def _contains(prompt: str, text: str) -> dict[str, object]:
    if text not in _OBJECTS:
        raise ValueError(f"not a prompt of the MEDVQA-GI grammar: {prompt!r}")
    objects = _OBJECTS[text]
    says: dict[str, object] = {"contains": objects}
    if "text" in objects:
        says["text"] = True
    if BOX in objects:
        says["box"] = True
    if "a polyp" in objects:
        says["polyp"] = True
    if set(objects) & set(INSTRUMENTS):
        says["instrument"] = True
    return says


def _counts(prompt: str, number: str, what: str) -> dict[str, object]:
    value = 0 if number == "no" else int(number)
    says: dict[str, object] = {f"{what}s": value}
    return says if what == "finding" else says | {what: value > 0}


def _located(prompt: str, what: str, text: str) -> dict[str, object]:
    return {_PLACES[what]: frozenset(_items(text.replace("rigth", "right"), CELLS, prompt))}


_READ = {
    "containing": _contains,
    "not_containing": lambda prompt, thing: {"text" if thing == "text" else "box": False},
    "count": _counts,
    "colors": lambda prompt, text: {"colors": _free(text, prompt)},
    "sizes": lambda prompt, text: {"sizes": _items(text, SIZES, prompt)},
    "paris": lambda prompt, text: {"paris": _items(text.replace("paris ", ""), PARIS, prompt)},
    "procedure": lambda prompt, name: {"procedure": name},
    "located": _located,
}


# ------------------------------------------------------------------------------------------------------ all prompts


def _subsets(items: tuple[str, ...], number: int) -> list[tuple[str, ...]]:
    """The first `number` non-empty subsets, small ones first."""
    every = itertools.chain.from_iterable(itertools.combinations(items, n) for n in range(1, len(items) + 1))
    return list(itertools.islice(every, number))


def all_prompts() -> list[str]:
    """483 distinct prompts with the real set's number of each kind."""
    pairs = itertools.permutations(COLORS[:6], 2)
    triples = itertools.permutations(COLORS[:5], 3)
    palettes = [*((name,) for name in COLORS), *pairs, *itertools.islice(triples, 99 - 13 - 30)]
    prompts = [containing(*objects) for objects in _OBJECTS.values()]
    prompts += [not_containing("text"), not_containing(BOX)]
    prompts += [count(what, number) for what, numbers in COUNTS.items() for number in numbers]
    prompts += [colors(palette) for palette in palettes]
    prompts += [sizes(group) for group in _subsets(SIZES, 12)]
    prompts += [paris(group) for group in _subsets(PARIS, 6)]
    prompts += [procedure("colonoscopy"), procedure("gastroscopy")]
    prompts += [located("abnormality", cells) for cells in _subsets(CELLS, 132)]
    prompts += [located("instrument", cells) for cells in _subsets(CELLS, 80)]
    prompts += [located("anatomical landmark", cells) for cells in _subsets(CELLS, 107)]
    return [*prompts, STRAY]
