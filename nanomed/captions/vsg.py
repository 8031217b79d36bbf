"""The Visual Symptom Generator of Med-Art (Guo et al. 2025): captions of what is seen, by a vision-language model.

A question names the category and the features to describe; an answer is drawn and judged, and drawn again while it is
refused, `attempts` times at most:

echo       it says the list of features instead of using it
opening    it does not begin with the words that it was told to begin with
long       more than 120 tokens of T5, also after T5-large was asked to shorten it, where one is given
empty      nothing

The released code (VSG.py) counts with the captioner's own tokenizer; the paper speaks of what T5 reads, which is the
default. That code repeats for ever; here a picture that gets no caption is listed with its reasons.

Every answer depends on (seed, file, attempt) alone. What is known of a picture is one line of OUT.jsonl (journal.py);
the CSV is made of these. So a run that was killed goes on, and several processes share the work.
"""

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from PIL import Image

from nanomed import data
from nanomed.captions import journal
from nanomed.captions.networks.tiles import Narrow
from nanomed.data import ranges
from nanomed.data.images import listing, open_rgb
from nanomed.data.table import DataError, Row, Table
from nanomed.run import files
from nanomed.run.flags import UsageError

LIMIT = 120  # tokens that T5 reads in PixArt-alpha
SAMPLING = dict(temperature=0.8, top_k=50, top_p=0.9, max_new_tokens=150)  # VSG.py
MODALITIES = {  # how a caption begins, and the features: endoscopy's are the paper's, the others are in its manner
    "endoscopy": ("An endoscopic image", "endoscopic image",
                  "specific color, shape, surrounding mucosa, surface texture, bleeding condition"),
    "skin": ("A dermoscopic image", "dermoscopic image",
             "specific color, shape, border, surrounding skin, surface texture, pigment network"),
    "xray": ("An X-ray image", "X-ray image", "anatomical region, density, shape, borders, symmetry"),
    "fundus": ("A fundus image", "fundus image", "optic disc, vessels, macula, lesions, specific color"),
    "microscopy": ("A microscopic image", "microscopic image",
                   "staining, specific color, cell shape, arrangement, surrounding tissue"),
}  # fmt: skip

# What a caption of a patient's picture must not hold; a person looks at every one that is marked.
_MONTH = (
    r"(?:January|February|March|April|May|June|July|August|September|October|November|December|"
    r"(?:Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)\b\.?)"
)
SUSPICIOUS = {
    "person": r"\b(?i:patient(?:'s)? name|surname|date of birth|DOB|name ?:)|\b(?:Mr|Mrs|Ms|Dr|Prof)\b\.? ?|"
              r"\b(?:[Pp]atient|[Dd]octor|[Pp]rofessor),? [A-Z]\w+|\bnamed [A-Z]\w+|\b[A-Z][a-z]+ [A-Z][a-z]+'s\b",
    "date": rf"\b\d{{1,4}}([-/.])\d{{1,2}}\1\d{{1,4}}\b|\b(?:19|20)\d\d\b|\b{_MONTH} \d|"
            rf"\b\d{{1,2}}(?:st|nd|rd|th)?(?: of)? {_MONTH}",
    "hospital": r"\b(?i:hospitals?|infirmary|clinics?|medical cent(?:er|re)|institutes?|university|department of)\b",
    "burnt-in text": r"\b(?:reads|text says|labell?ed|captioned|overlay(?:s|ed)?|ID) ?[:\"'\u201c\u2018\d]|"
                     r"\b(?i:watermark|timestamp|time stamp|logo)s?\b|\b\d{1,2}:\d\d\b|"
                     r"\b(?i:text|words?|letters|label|caption) ?[\"'\u201c\u2018]|"
                     r"\b(?i:text|words|letters|numbers|label)\b(?! of)(?: \w+){0,3} (?:in|at|on) (?:\w+[- ]){1,3}"
                     r"(?:corner|top|bottom|edge|side)\b|"
                     r"\b(?i:overlaid|written|printed|on-screen) (?i:text|words|letters|numbers)\b",
}  # fmt: skip
# A category that has a word of the left, and what its captions cannot say is there, ...
IMPOSSIBLE = (
    (r"\bnormal\b|\bhealthy\b", r"\b(?:polyps?|tumou?rs?|ulcers?|cancer(?:ous)?|malignant|inflamed|lesions?)\b"),
    (r"\b(?:colitis|oesophagitis|esophagitis)\b", r"\bhealthy\b"),
    (r"\bmelanoma\b|\bcarcinoma\b", r"\bbenign\b"),
    (r"\b(?:nevus|nevi|benign)\b", r"\bmalignant\b|\bmelanoma\b"),
)
# ... and what they cannot say is not.
NEEDED = (
    (r"\bpolyps?\b", r"polyps?"),
    (r"\b(?:colitis|oesophagitis|esophagitis)\b", r"inflammation"),
)
_NOT = r"\b(?:no|not|nor|neither|without|absence of|absent|free (?:of|from)|lacks?|lacking|rather than)\b"
_OF = r"(?: (?:an?|any|visible|obvious|apparent|clear|evident|evidence of|signs? of|presence of))*"


class Captioner(Protocol):
    """What `nanomed.captions.load` gives."""

    def ask(self, question: str) -> str:
        """The whole prompt of a question about an image, in the family's template."""
        ...

    def generate(self, images: list, texts: list[str], max_new_tokens: int, **how) -> list[str]:
        """What it writes of each image, behind its prompt."""
        ...

    def count(self, text: str) -> int:
        """Its own tokens of a text."""
        ...


@dataclass(frozen=True)
class Picture:
    """An image to be captioned."""

    name: str  # relative to the data folder: the CSV's `file_name`
    path: Path
    category: str  # "" where nothing says it
    range: str = ""  # which of its values are black and white (data/ranges.py)


@dataclass
class Result:
    """What is known of one picture: one line of the journal."""

    file_name: str
    category: str
    text: str = ""  # "" where every attempt was refused
    attempts: int = 0
    tokens: int = 0
    flags: list[str] = field(default_factory=list)
    refused: list[dict] = field(default_factory=list)  # {"attempt", "why", "text"}, in order
    simplified: bool = False


@dataclass(frozen=True)
class Rules:
    """How an answer is judged. `count` counts tokens; `shorten`, if there is one, is given texts that are too long."""

    opening: str
    features: str
    count: Callable[[str], int]
    limit: int = LIMIT
    shorten: Callable[[str], str] | None = None

    def judge(self, answer: str) -> tuple[str, str, bool]:
        """(the caption, why it is refused or "", whether it was shortened)."""
        text = " ".join(answer.split())  # VSG.py wants a newline in front, the end of Llama 3's header
        if not text:
            return text, "empty", False
        if self.features in text:
            return text, "echo", False
        if not text.startswith(self.opening):
            return text, "opening", False
        if self.count(text) <= self.limit:
            return text, "", False
        if self.shorten is None:
            return text, "long", False
        short = " ".join(self.shorten(text).split())
        refused = "long" if self.count(short) > self.limit else "" if short.startswith(self.opening) else "opening"
        return short, refused, True


def question(modality: str, category: str) -> tuple[str, str, str]:
    """(the question, the words that an answer begins with, the list of features) for a picture."""
    if modality not in MODALITIES:
        raise UsageError(f"--modality {modality}: choose {', '.join(MODALITIES)}")
    opening, kind, features = MODALITIES[modality]
    start = f"{opening} of {category}" if category else opening
    what = f"the {kind} of {category}" if category else f"the {kind}"
    asked = (
        f"{start}. Please describe {what} using the following visual features: {features}, and other relevant details. "
        f"Start with '{start}' and ensure the description does not exceed 100 words."
    )
    return asked, opening, features


def flags(text: str, category: str) -> list[str]:
    """Why a person should look at a caption: what it gives away, and where it contradicts its category."""
    found = [name for name, pattern in SUSPICIOUS.items() if re.search(pattern, text)]
    rest = re.sub(rf"^(An? [\w-]+ image) of {re.escape(category)}", r"\1", text)  # the words it was told to begin with
    denied = "|".join(what for given, what in NEEDED if re.search(given, category, re.I))
    there = re.sub(rf"{_NOT}(?:(?!\b(?:but|however|although|with)\b)[^.;])*", "", rest, flags=re.I)  # what it affirms
    wrong = "|".join(what for given, what in IMPOSSIBLE if re.search(given, category, re.I))
    if denied and re.search(rf"{_NOT}{_OF} (?:{denied})\b", rest, re.I) or wrong and re.search(wrong, there, re.I):
        found.append("contradicts the category")
    return found


def pictures(spec: str, cache: str | Path = "runs/cache", span: str = "") -> list[Picture]:
    """The images of a data set, read by the --range `span`; of `folder:DIR` all that are in it, whether they have
    captions or not. The category is the class folder, or what the data set says."""
    sets = data.parts(spec)
    kind, _, where = sets[0][0].partition(":") if len(sets) == 1 else ("", "", "")
    if kind == "folder" and where and not any(Path(where, name).is_file() for name in METADATA):
        root = Path(where).expanduser()
        if not root.is_dir():
            raise DataError(f"{root}: no such folder")
        files = listing(root, "**/*")
        labels = ["" if path.parent == root else path.parent.name for path in files]
        table = Table("folder", tuple(Row(path, label=label) for path, label in zip(files, labels)))
    else:
        table = data.load(spec, cache)
        root = Path(os.path.commonpath([row.file.parent for row in table.rows])) if table.rows else Path()
    if not table.rows:
        raise DataError(f"{spec}: no images")
    table = ranges.ranged(table, ranges.of_table(table, span))
    return [Picture(row.file.relative_to(root).as_posix(), row.file, named(row.label), row.range) for row in table.rows]


def named(label: str) -> str:
    """A class folder's name as words. Marks such as `<image>` have a meaning in a prompt, and are left out."""
    return " ".join(re.sub(r"<[^<>\s]*>|[-_]", " ", label).split())


METADATA = ("metadata.csv", "metadata.jsonl")


def caption(
    model: Captioner, batch: list[Picture], modality: str, rules: Callable[[str, str], Rules], attempts: int, seed: int
) -> Iterator[Result]:
    """Results of a few pictures, asked together; those that are refused are asked again together."""
    asked = {p.name: question(modality, p.category) for p in batch}
    results = {p.name: Result(p.name, p.category) for p in batch}
    images: dict[str, Image.Image] = {p.name: open_rgb(p.path, p.range) for p in batch}
    waiting, known = list(batch), {}
    for attempt in range(1, attempts + 1):
        prompts = [model.ask(asked[p.name][0]) for p in waiting]
        try:
            answers = model.generate([images[p.name] for p in waiting], prompts, seed=seed,
                                     keys=[(p.name, attempt) for p in waiting], known=known, **SAMPLING)  # fmt: skip
        except Narrow as error:
            raise DataError(f"{', '.join(str(p.path) for p in waiting)}: {error}") from error
        again = []
        for picture, answer in zip(waiting, answers):
            result, judge = results[picture.name], rules(*asked[picture.name][1:])
            text, why, result.simplified = judge.judge(answer)
            result.attempts = attempt
            if why:
                result.refused.append({"attempt": attempt, "why": why, "text": text})
                again.append(picture)
            else:
                result.text, result.tokens = text, judge.count(text)
                result.flags = flags(text, picture.category)
        waiting = again
        if not waiting:
            break
    yield from results.values()


# --------------------------------------------------------------------------------------------------------- the journal


class Journal(journal.Journal):
    """OUT.jsonl with a line for each picture, and the CSV that is made of it."""

    def __init__(self, out: str | Path, settings: dict):
        super().__init__(out, settings, key="file_name")

    def append(self, result: Result) -> None:
        """Write a picture's line, unless another process has."""
        super().append(asdict(result))

    def results(self) -> dict[str, Result]:
        """All pictures that are done, by name."""
        return {name: Result(**record) for name, record in self.records().items()}

    def write_csv(self) -> None:
        """OUT of all lines so far, for `--captions`: file_name,text,category,tokens,attempts,flags; sorted by name."""
        out = io.StringIO(newline="")
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["file_name", "text", "category", "tokens", "attempts", "flags"])
        for _, r in sorted(self.results().items()):
            if r.text:
                writer.writerow([r.file_name, r.text, r.category, r.tokens, r.attempts, "; ".join(r.flags)])
        files.write_text(self.out, out.getvalue())


def statistics(results: Iterable[Result]) -> str:
    """What a run has come to, in a few lines: accepted at which attempt, lengths, refused why, what to look at."""
    results = list(results)
    done = [r for r in results if r.text]
    at, why = Counter(r.attempts for r in done), Counter(x["why"] for r in results for x in r.refused)
    marks = Counter(mark for r in done for mark in r.flags)
    lengths = sorted(r.tokens for r in done)
    said = [f"{len(done):,} of {len(results):,} pictures have a caption"]
    if done:
        said[0] += f"; {lengths[0]} to {lengths[-1]} tokens, half of them at most {lengths[(len(lengths) - 1) // 2]}"
        said.append("accepted at attempt  " + ", ".join(f"{n}: {at[n]:,}" for n in sorted(at)))
    if short := sum(r.simplified for r in done):
        said.append(f"shortened            {short:,}")
    if why:
        said.append("refused              " + ", ".join(f"{name}: {n:,}" for name, n in why.most_common()))
    if marks:
        said.append("to be looked at      " + ", ".join(f"{name}: {n:,}" for name, n in marks.most_common()))
    for r in [r for r in results if not r.text][:5]:
        reasons = ", ".join(f"{name} {n}x" for name, n in Counter(x["why"] for x in r.refused).items())
        said.append(f"no caption           {r.file_name} ({reasons})")
    return "\n".join(said)
