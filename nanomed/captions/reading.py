"""What a free text about an endoscopic image states, for a judge of who rewords the prompts of the organisers' grammar.

    facts("Draw a frame showing two polyps.") == facts_of("Generate an image with 2 polyps.")

`grammar.parse` and `paraphrase.parse` read the wordings of their own tables and no other. Here any text is looked
through for the words that the grammar knows: a thing more, another number or place, or a "no" that was not there, and
the facts are no longer the same. What fits no statement makes "unread" one of them.
"""

import re
from collections.abc import Iterable, Iterator
from functools import cache

from nanomed.data import grammar
from nanomed.data.grammar import BOX, COLORS, PARIS

NUMBERS = {"one": 1, "single": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "sixteen": 16}
MANY = r"(?:several|many|multiple|few|some|numerous|both|pair of|couple of)"
THINGS = {  # what is counted, and what has a place, a colour, a size or a type
    "polyp": r"polyps?|polypoid (?:growth|lesion)s?",
    "finding": r"findings?|abnormalit(?:y|ies)|abnormal (?:area|region|finding)s?|lesions?|anomal(?:y|ies)",
    "instrument": r"(?:medical |surgical |endoscopic )?(?:instrument|tool|device)s?",
    "landmark": r"landmarks?",
}
OBJECTS = {  # what an image contains
    BOX: r"(?:art[ei]facts? in the (?:form|shape) of )?(?:a )?(?:green|black)(?:(?:/| or )(?:green|black))?[ -]"
         r"(?:box(?:es)?|rectangles?)(?:[ -]art[ei]facts?)?|box[ -]art[ei]facts?",
    "text": r"(?:some )?(?:(?:written|overlaid) )?(?:texts?|writing|letters|annotations?)",
    "ulcerative colitis": r"ulcerative colitis",
    "oesophagitis": r"o?esophagitis|inflamed o?esophagus|inflammation of the o?esophagus",
    "barretts": r"barrett(?:'?s)?",
    "the z-line": r"z[- ]line|squamocolumnar junction",
    "the cecum": r"ca?ecum|blind end of the (?:colon|large bowel)",
    "the ileum": r"ileum|end of the small (?:bowel|intestine)",
    "the pylorus": r"pylorus|outlet of the stomach",
    "biopsy forceps": r"(?:pair of )?(?:biopsy )?forceps",
    "polyp snare": r"(?:polyp |polypectomy )?snares?(?: for polyps)?",
    "metal clip": r"(?:metal |metallic )?clips?",
    "injection needle": r"(?:injection )?needles?(?: for injections?)?",
    "tube": r"tub(?:e|es|ing)",
}  # fmt: skip
SIZES = {"< 5mm": r"(?:<|under|below|(?:less|smaller) than) ?5(?: ?mm)?",
         ">20mm": r"(?:>|over|above|(?:more|larger|greater|bigger) than) ?20(?: ?mm)?",
         "5-10mm": r"5(?: ?mm)? ?(?:-|\u2013|to|and) ?10(?: ?mm)?",
         "11-20mm": r"11(?: ?mm)? ?(?:-|\u2013|to|and) ?20(?: ?mm)?"}  # fmt: skip
STRANGE = (  # what a prompt of the grammar never says, and a model may add
    r"bleed\w*|blood\w*|hemorrh\w*|haemorrh\w*|ulcer\w*|tumou?rs?|cancer\w*|carcinoma|malignan\w*|benign|healthy|"
    r"inflam\w*|necro\w*|colitis|diverticul\w*|stool|f(?:a)?eces|scar\w*|stents?|catheters?|probes?|mass(?:es)?|"
    r"nodul\w*|adenoma\w*|small|large|tiny|huge|big|mild|severe|flat|pedunculated|sessile"
)
NO = r"no|not|without|free (?:of|from)|absence of|absent|lack(?:s|ing)?|devoid of|zero|0|nor|none|never"
ROWS = {"upper": "upper|top", "lower": "lower|bottom", "center": "cent(?:er|re|ral)|middle"}
COLUMNS = {"left": "left", "right": "right|rigth", "center": "cent(?:er|re|ral)|middle"}
PLACES = {"polyp": "abnormality_at", "finding": "abnormality_at", "instrument": "instrument_at",
          "landmark": "landmark_at"}  # fmt: skip


def facts_of(prompt: str) -> dict:
    """What a prompt of the grammar says, in the form of `facts`. Raises ValueError for other text."""
    said = grammar.parse(prompt)
    for name in ("contains", "colors", "sizes", "paris"):
        if name in said:
            return {name: frozenset(said[name])}
    return {name: value for name, value in said.items() if name not in ("polyp", "instrument")}


def facts(text: str, colors: Iterable[str] = ()) -> dict:
    """What a text states, as `grammar.parse` has it, with sets for lists.

    colors   words for colours, besides the grammar's, that are to be known
    """
    try:
        return facts_of(text)  # some of its wordings are misspelt
    except ValueError:
        pass
    found: dict[str, list] = {kind: [] for kind in ("paris", "size", "procedure", "object", "thing", "cell", "color",
                                                    "number", "no", "unread")}  # fmt: skip
    for kind, value in _words(text, colors):
        found[kind].append(value)
    things, objects, cells = set(found["thing"]), frozenset(found["object"]), frozenset(found["cell"])
    said: dict = {}
    for kind, name, carriers in (("paris", "paris", {"polyp"}), ("size", "sizes", {"polyp"}),
                                 ("color", "colors", {"finding"})):  # fmt: skip
        if found[kind]:
            said[name] = frozenset(found[kind])
            if things - carriers:
                said["unread"] = True
    if found["procedure"]:
        said["procedure"] = found["procedure"][0]
        if things or len(set(found["procedure"])) > 1:
            said["unread"] = True
    if cells:
        said |= {PLACES[thing]: cells for thing in things} if things else {"unread": True}
    only = next(iter(things)) if len(things) == 1 else None
    if found["number"]:
        said |= {f"{only}s": found["number"][0]} if only and len(found["number"]) == 1 else {"unread": True}
    if found["no"]:
        denied = {BOX: "box", "text": "text"}
        if said or len(objects) + len(things) != 1 or objects - denied.keys() or only == "landmark":
            said["unread"] = True
        else:
            said |= {f"{only}s": 0} if only else {denied[name]: False for name in objects}
    elif objects or not said:
        said["contains"] = objects | ({"a polyp"} if "polyp" in things else set())
        if things - {"polyp"}:
            said["unread"] = True
    if found["unread"]:
        said["unread"] = True
    return said


@cache
def _pattern(colors: tuple[str, ...]) -> tuple[re.Pattern, list[tuple[str, object]]]:
    """What finds the words that mean something, and (kind, value) of each of its groups."""
    hues = sorted({*COLORS, "gray", *(color.lower() for color in colors)}, key=len, reverse=True)
    types = "|".join(PARIS)
    introduced = r"(?:paris|type|class)(?:\W+(?:paris|class(?:ification|ified)?|type|as))*\W+"
    parts = [  # "Is" is a type, "is" only right behind "paris", where the organisers write it so
        ("paris", None, rf"(?:{introduced}(?-i:Is|(?i:ip|iia))\b|paris is\b)"
                        rf"(?:(?:, | and | or |, and )(?:paris )?(?:{types})\b)*"),
        *(("size", name, pattern) for name, pattern in SIZES.items()),
        ("procedure", "colonoscopy", r"colonoscop\w+"), ("procedure", "gastroscopy", r"gastroscop\w+"),
        *(("object", name, pattern) for name, pattern in OBJECTS.items()),
        *(("thing", name, pattern) for name, pattern in THINGS.items()),
        *(("cell", f"{row}-{column}".replace("center-center", "center"), rf"(?:{a})(?:[- ]|-?most[- ])(?:{b})")
          for row, a in ROWS.items() for column, b in COLUMNS.items()),
        ("cell", "center", ROWS["center"]),
        ("color", None, rf"(?:(?:pale|dark|light|bright|deep)[- ])?(?:{'|'.join(map(re.escape, hues))})(?:ish)?"),
        ("number", None, "|".join(NUMBERS) + r"|\d+"),
        ("no", True, NO),
        ("unread", True, rf"left|right|upper|lower|top|bottom|{MANY}|{STRANGE}"),
    ]  # fmt: skip
    whole = "|".join(rf"(?P<g{i}>{pattern})" for i, (_, _, pattern) in enumerate(parts))
    return re.compile(rf"(?<![\w<>])(?:{whole})(?!\w)", re.I), [(kind, value) for kind, value, _ in parts]


def _words(text: str, colors: Iterable[str]) -> Iterator[tuple[str, object]]:
    """(kind, value) of all words that mean something here, from left to right."""
    pattern, groups = _pattern(tuple(colors))
    for match in pattern.finditer(text):
        kind, value = groups[int(match.lastgroup[1:])]
        word = match[0].lower()
        if kind == "paris":
            yield from (("paris", one) for one in re.findall(rf"\b({'|'.join(PARIS)})\b", word))
        elif kind == "color":
            yield "color", word.removesuffix("ish").replace("gray", "grey")
        elif kind == "number":
            number = int(word) if word.isdigit() else NUMBERS[word]
            yield ("number", number) if number else ("no", True)
        else:
            yield kind, value
