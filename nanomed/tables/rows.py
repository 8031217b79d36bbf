"""What a table is: plain data, which steps.py turns into commands.

A training stands for itself, because rows of several tables are measured on one and the same model. In place of every
system `--tiny` trains a toy stand-in for a few steps; `tiny` are its flags.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

Words = tuple[str, ...]  # of a command line

OTHER, INCEPTION = "{other captions}", "{a random Inception}"  # words that a file takes the place of
UNKNOWN = "not known here"  # where a paper's number is not known here: none is made up


@dataclass(frozen=True)
class Number:
    """A number that a paper prints."""

    value: float
    source: str  # where the paper or its code has it


@dataclass(frozen=True)
class Training:
    """A run of train.py."""

    name: str  # its folder
    flags: Words
    tiny: Words  # flags of the toy stand-in
    upon: str = ""  # the training whose run is its --base
    tiny_upon: str | None = None  # that of the stand-in, where it is another one


@dataclass(frozen=True)
class Row:
    """A model that is drawn from and measured."""

    name: str
    label: str  # as the table prints it
    training: str
    draw: Words = ()  # flags of sample.py
    measure: Words = ()  # flags of evaluate.py
    captions: str = ""  # in place of the data's, as train.py and evaluate.py have them
    paper: Mapping[str, Number] = field(default_factory=dict)  # {heading: number}
    follows: str = ""  # which text or code, where they disagree or say nothing


@dataclass(frozen=True)
class Column:
    """A heading, and the names that its number has in results.json; the first that is there is taken."""

    heading: str
    metrics: Words


@dataclass(frozen=True)
class Table:
    """A table of a paper."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    kind: str  # of the data, where --data names a folder alone
    setup: str  # evaluate.py --paper: which prompts are drawn, and which images are real
    measure: Words  # flags of evaluate.py for every row
    tiny: str  # data of the toy world
    tiny_measure: Words
    note: str  # what is known of the paper's own table, and what is not
    official: bool = False  # whether --real says the real images, and not the set-up


PARAMETERS = "trainable parameters"  # the one column that no metric fills: train.py says it
CLASSIFIED = tuple(
    Column(f"{short} {side}", (f"classifier {name} [{side}]",))
    for side in ("generated", "real")
    for short, name in (("F1", "F1 macro"), ("BACC", "balanced accuracy"), ("AUC", "AUC macro"))
)
STAND_IN = "toy-classifier "  # begins the names of what is measured without Inception
FID = Column("FID", ("FID", f"{STAND_IN}Frechet distance"))
KID = Column("KID", ("KID", f"{STAND_IN}KID"))
IS = Column("IS", ("IS",))
PRECISION, RECALL, F1 = (Column(name, (name,)) for name in ("precision", "recall", "F1"))
COLOUR = Column("colour distance", ("HLDF colour distance",))
COPIES = Column("copies", ("copies of training images",))
