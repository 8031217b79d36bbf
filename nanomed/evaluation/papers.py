"""The papers' own set-ups: which prompts to draw, which real images to compare with.

mmcp     MSDM (Chaichuk & Tutubalina 2024): 2,000 rows drawn without replacement from all pairs of prompt and image, so
         that prompts are as frequent as they are; against all images, those of training included, squashed to 256
         x 256; MSDM's own images were each stretched to their full range
medart   Med-Art: 80/20 split of every class; as many images as there are test images, from captions of random training
         images, one an image; against the test images
"""

import csv
import io
import random
from dataclasses import dataclass, replace
from pathlib import Path

from nanomed import data
from nanomed.data import ranges
from nanomed.data.table import DataError
from nanomed.evaluation.imagesets import ImageSet, of_table
from nanomed.run import files

ROWS, SIDE = 2000, 256  # of mmcp
HELD_OUT = 0.2  # of medart


@dataclass(frozen=True)
class Setup:
    """What a paper compares."""

    name: str
    real: ImageSet
    train: ImageSet  # what a model of the paper was trained on
    prompts: tuple[str, ...]  # row i is to be drawn as image i
    labels: tuple[str, ...]  # of the prompts; empty where the data has no classes
    metrics: str  # what the paper reports
    drawing: str  # flags of sample.py that the paper's images were drawn with
    note: str  # in words, with the numbers

    def write(self, path: Path) -> None:
        """The prompts as a file for sample.py, with the classes beside them."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["prompt", "label"] if self.labels else ["prompt"])
        writer.writerows(zip(self.prompts, self.labels) if self.labels else [[prompt] for prompt in self.prompts])
        files.write_text(path, text.getvalue())

    def first(self, count: int) -> "Setup":
        """The same with no more than so many prompts and so many real images; training images stay what they are."""
        real = self.real.keep(range(min(count, len(self.real))))
        train = real if self.train is self.real else self.train
        note = f"{self.note}; of each the first {count:,} at most"
        prompts, labels = self.prompts[:count], self.labels[:count]
        return replace(self, real=real, train=train, prompts=prompts, labels=labels, note=note)

    def drawn(self, fake: ImageSet, where: str) -> ImageSet:
        """The generated images with the prompts and classes they were drawn for; a DataError where they are others."""
        if len(fake) != len(self.prompts):
            raise DataError(f"{where}: {len(fake):,} images, but --paper {self.name} needs {len(self.prompts):,}, one "
                            f"for every row of its prompts; draw them with sample.py")  # fmt: skip
        for row, said in enumerate(fake.prompts):
            known = (self.prompts[row].strip(), *self.labels[row : row + 1])  # a class is the prompt of some systems
            if said[0].strip() not in known:
                raise DataError(f"{where}: {fake.title(row)} was drawn from {said[0]!r}, but row {row} of the set-up "
                                f"is {self.prompts[row]!r}; say the same --seed for both, or draw again")  # fmt: skip
        prompts = tuple((prompt,) for prompt in self.prompts)
        return ImageSet(fake.name, fake.sources, prompts, self.labels, ranges=fake.ranges, hashes=fake.hashes)


def find(name: str, spec: str, cache: str, seed: int = 0, captions: str = "", span: str = "") -> Setup:
    """The set-up of that name over a data set such as clef:DIR, with other `captions` as train.py takes them, read by
    the --range `span`. Raises DataError."""
    table = data.load(spec, cache, SIDE)
    table = ranges.ranged(table, ranges.of_table(table, span))
    table = data.with_captions(table, captions) if captions else table
    if not any(row.prompts for row in table.rows):
        raise DataError(f"{spec}: no prompts, which --paper {name} draws from")
    if name == "mmcp":
        return _mmcp(table, spec, seed)
    if name == "medart":
        return _medart(table, spec, seed)
    raise DataError(f"--paper {name}: choose mmcp or medart")


def _mmcp(table: data.Table, spec: str, seed: int) -> Setup:
    pairs = [prompt for row in table.rows for prompt in row.prompts]
    chosen = random.Random(f"mmcp {seed}").sample(pairs, min(ROWS, len(pairs)))
    real = of_table(table, spec, side=SIDE)
    note = (
        f"mmcp: {len(chosen):,} rows of {len(pairs):,} pairs, against all {len(real):,} images squashed to {SIDE} x "
        f"{SIDE}, training images included"
    )
    return Setup("mmcp", real, real, tuple(chosen), (), "fid,pr,colour,memorisation", " --minmax", note)


def _medart(table: data.Table, spec: str, seed: int) -> Setup:
    train, test = table.split(HELD_OUT, seed, by_label=None)
    draw = random.Random(f"medart {seed}")
    told = [row for row in train.rows if row.prompts]
    rows = draw.sample(told, len(test.rows)) if len(test.rows) <= len(told) else draw.choices(told, k=len(test.rows))
    labels = tuple(row.label for row in rows) if all(row.label for row in rows) else ()
    note = (
        f"medart: {len(rows):,} captions of {len(train.rows):,} training images, against the {len(test.rows):,} test "
        f"images, {HELD_OUT:.0%} of every class"
    )
    own = {"kvasir": ",kfd", "skin": ",hfd", "ham10000": ",hfd"}.get(table.name, "")
    return Setup("medart", of_table(test, f"{spec} (test)"), of_table(train, f"{spec} (training)"),
                 tuple(draw.choice(row.prompts) for row in rows), labels, f"fid,kid,is{own},colour,memorisation",
                 "", note)  # fmt: skip
