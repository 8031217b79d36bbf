"""From a row to its commands: prompts, training, drawing, measuring, each a line that a reader could type.

    OUT/trained/NAME-on-DATA/       a run of train.py, upon which others may stand
    OUT/prompts/SETUP-on-DATA/      prompts.csv, of evaluate.py --paper
    OUT/drawn/SETUP-on-DATA/NAME/   images, which rows of several tables may measure
    OUT/TABLE/ROW/                  results.json and report.html of evaluate.py
    OUT/TABLE/table.md, .html, .json

Beside what a command made lie its words and its output, step.json and log.txt.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nanomed import data
from nanomed.run.flags import UsageError
from nanomed.tables import medart, mmcp
from nanomed.tables.mmcp import DRAWN_TOY
from nanomed.tables.rows import INCEPTION, OTHER, Row, Table, Training, Words

TABLES = {table.name: table for table in (*mmcp.TABLES, *medart.TABLES)}
TRAININGS = {training.name: training for training in (*mmcp.TRAININGS, *medart.TRAININGS)}
PASSING = ("--weights", "--cache")  # flags that say where things are, and not what they are


@dataclass(frozen=True)
class How:
    """What the command line says of all rows."""

    out: Path
    data: str = ""
    real: str = ""  # real images of mmcp-3
    captions: str = ""
    other_captions: str = ""
    tiny: bool = False
    have: Mapping[str, Path] = field(default_factory=dict)  # {training: run}
    seed: int = 2204
    places: Words = ()  # --weights, --cache
    more: Words = ()  # flags of every train.py


@dataclass(frozen=True)
class Step:
    """One command."""

    what: str  # "prompts", "train", "draw" or "measure"
    name: str
    script: str
    words: Words
    folder: Path
    mark: str = ""  # the file that is there when it is done; of a training its run says so

    @property
    def settings(self) -> list[str]:
        """The words that decide what comes out."""
        kept, words = [], [*self.words]
        while words:
            word = words.pop(0)
            if word in PASSING:
                words.pop(0)
            else:
                kept.append(word)
        return kept


def table_of(name: str) -> Table:
    """The table of a name; UsageError for a name of none."""
    if name not in TABLES:
        raise UsageError(f"table {name}: choose {', '.join(TABLES)}")
    return TABLES[name]


def chosen(table: Table, names: str) -> list[Row]:
    """The rows of a comma-separated list, in the table's order; all of them of an empty one."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = [row.name for row in table.rows]
    for name in wanted:
        if name not in known:
            raise UsageError(f"--rows {name}: {table.name} has {', '.join(known)}")
    return [row for row in table.rows if not wanted or row.name in wanted]


def data_of(table: Table, how: How) -> str:
    """The data set of a table: what --data names, of the table's kind where it names a folder alone."""
    if how.tiny:
        return table.tiny
    if how.data.partition(":")[0] in data.KINDS and not Path(how.data).exists():
        return how.data
    return f"{table.kind}:{how.data}"


def _kind(data: str) -> str:
    return data.partition(":")[0]


def _filled(words: Words, how: How) -> Words:
    """Words with files in the places of those that stand for some."""
    found = {OTHER: how.other_captions, INCEPTION: str(how.out / "tiny" / "inception.safetensors")}
    return tuple(found.get(word, word) for word in words)


def training(name: str, table: Table, how: How, base: Path | str = "") -> Step:
    """The first command of a training; `base` is the run that it stands on."""
    asked: Training = TRAININGS[name]
    flags = _filled(asked.tiny if how.tiny else asked.flags, how)
    data = flags[flags.index("--data") + 1] if "--data" in flags else data_of(table, how)
    folder = how.out / "trained" / f"{name}-on-{_kind(data)}"
    words = [*flags, *(() if "--data" in flags else ("--data", data))]
    if how.captions and table.setup == "medart" and "--captions" not in flags:
        words += ["--captions", how.captions]
    words += ["--base", str(base)] if base else []
    words += ["--seed", str(how.seed), "--out", str(folder), *how.places, *how.more]
    return Step("train", name, "train.py", tuple(words), folder)


def upon(name: str, how: How) -> str:
    """The training that one stands on; "" for none."""
    asked = TRAININGS[name]
    return asked.upon if not how.tiny or asked.tiny_upon is None else asked.tiny_upon


def prompts(table: Table, row: Row, how: How) -> Step:
    """Write the set-up's prompts."""
    folder = how.out / "prompts" / _setting(table, row, how)
    words = ("--paper", table.setup, *_against(table, row, how), "--seed", str(how.seed), "--out", str(folder))
    return Step("prompts", folder.name, "evaluate.py", (*words, *_cache(how)), folder, "prompts.csv")


def drawing(table: Table, row: Row, how: How, run: Path | str) -> Step:
    """Draw the prompts from a run, or from what is published."""
    folder = how.out / "drawn" / _setting(table, row, how) / row.training
    draw = (*DRAWN_TOY, *(word for word in row.draw if word == "--minmax")) if how.tiny else row.draw
    words = ("--model", str(run), "--prompts", str(prompts(table, row, how).folder / "prompts.csv"), *draw,
             "--seed", str(how.seed), "--out", str(folder), *_weights(how))  # fmt: skip
    return Step("draw", row.name, "sample.py", words, folder, "manifest.jsonl")


def measuring(table: Table, row: Row, how: How) -> Step:
    """Measure what a row has drawn."""
    folder, fake = how.out / table.name / row.name, drawing(table, row, how, "").folder
    real = ("--real", _official(table, how)) if table.official else ("--paper", table.setup, *_against(table, row, how))
    words = (*real, "--fake", str(fake), *_filled(table.tiny_measure if how.tiny else table.measure, how), *row.measure,
             "--seed", str(how.seed), "--out", str(folder), *how.places)  # fmt: skip
    return Step("measure", row.name, "evaluate.py", words, folder, "results.json")


def shown(table: Table, row: Row, how: How) -> list[Step]:
    """All the commands of a row, with RUN where a run's folder has a name that only its start gives."""
    chain, name = [], row.training
    while name and name not in how.have:
        chain.append(name)
        name = upon(name, how)
    steps, base = [], str(how.have.get(name, ""))
    for name in reversed(chain):
        steps.append(training(name, table, how, base))
        base = f"{steps[-1].folder}/RUN"
    return [prompts(table, row, how), *steps, drawing(table, row, how, base), measuring(table, row, how)]


def _setting(table: Table, row: Row, how: How) -> str:
    """What prompts and real images depend on, as a folder's name."""
    words = f"-{row.training.removeprefix('medart-')}" if row.captions else ""
    return f"{table.setup}-on-{_kind(data_of(table, how))}{words}"


def _against(table: Table, row: Row, how: How) -> Words:
    captions = _filled((row.captions,), how)[0] or (how.captions if table.setup == "medart" else "")
    few = ("--limit", "48") if how.tiny else ()
    return ("--real", data_of(table, how), *(("--captions", captions) if captions else ()), *few)


def _official(table: Table, how: How) -> str:
    if how.tiny:
        return "single=toy:30,multi=toy:40,both=toy:30+toy:40"
    return how.real or data_of(table, how)


def _cache(how: How) -> Words:
    return how.places[how.places.index("--cache") :][:2] if "--cache" in how.places else ()


def _weights(how: How) -> Words:
    return how.places[how.places.index("--weights") :][:2] if "--weights" in how.places else ()
