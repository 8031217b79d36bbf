"""Each table of both papers as one command.

    python -m nanomed.tables list [TABLE] [--cost]       tables, rows, their commands, and what they cost here
    python -m nanomed.tables run TABLE --data DIR        train, draw, measure and print it; again: go on
    python -m nanomed.tables run all --tiny              the machinery of all of them, on the toy world

A row that fails is named and does not stop the others. What is finished is not done again. Exit codes: 0; 1, or the
code that all failed rows have in common; 75: asked to stop, and what has begun can go on.
"""

import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from nanomed.run import files, flags
from nanomed.run.flags import UsageError
from nanomed.tables import steps
from nanomed.tables.rows import OTHER, UNKNOWN, Row, Table
from nanomed.tables.steps import TABLES, TRAININGS, How


@dataclass
class Config:
    """Flags of `list` and `run`."""

    verb: Annotated[str, "list | run"] = ""  # what to do
    table: tuple[str, ...] = ()  # their names; run takes "all" with --tiny
    # ---- what is run
    data: str = ""  # the paper's data: a folder, or a data set as train.py takes it
    rows: str = ""  # names of rows, by comma; empty: all of them
    tiny: bool = False  # toy stand-ins for the systems, a few steps each, on the toy world
    have: str = ""  # trained already: NAME=RUN,... with the names of rows or trainings
    captions: str = ""  # of the Med-Art tables, in place of the data's own: as train.py takes them
    other_captions: str = ""  # those of another captioner, for its row: a CSV file
    real: str = ""  # real images of mmcp-3: single=DIR,multi=DIR,both=DIR+DIR; empty: the data
    more: str = ""  # further flags of every train.py, as in --more="--frozen cpu"
    # ---- how and where
    out: Annotated[str, "a folder to write"] = "tables"  # where everything goes; what is there is gone on with
    seed: Annotated[int, "0 ..< 2^32"] = 2204  # of trainings, drawings and measures
    weights: str = ""  # where published files are, besides weights/ and the Hugging Face cache
    cache: Annotated[str, "a folder to write"] = "runs/cache"  # where features and latents are kept
    submit: bool = False  # only write a SLURM job file for each row
    sbatch: str = ""  # further options of the job files, as in --sbatch="--gpus=1"
    cost: bool = False  # list: make train.py's dry run of every training that is listed; minutes, and much memory


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    config = flags.parse(Config, arguments, description=__doc__, words=("verb", "table"))
    if config.verb == "list":
        return listed(config)
    if not config.table:
        raise UsageError(f"run: say which table: {', '.join(TABLES)}, or all")
    if config.table == ("all",) and not config.tiny:
        raise UsageError("run all: with --tiny only; the tables' data are not the same")
    if len(config.table) > 1 and config.rows:
        raise UsageError(f"--rows {_short(config.rows)}: of one table")
    tables = [*TABLES.values()] if config.table == ("all",) else [steps.table_of(name) for name in config.table]
    chosen = {table.name: steps.chosen(table, config.rows) for table in tables}
    how = understood(config, tables)
    if config.submit:
        return submit(config, tables, chosen, how)
    from nanomed.tables import printing, running

    codes = []
    for table in tables:
        runner = running.Runner(table, how, lambda line: print(line, flush=True))
        outcomes = runner.rows(chosen[table.name])
        print(f"\n{printing.publish(table, outcomes, how)}\n{how.out / table.name / 'table.html'}")
        for outcome in outcomes:
            if outcome.error:
                print(f"FAILED {table.name} {outcome.row.name}: {outcome.error}", file=sys.stderr)
        codes.append(running.code_of(outcomes, runner.received))
        if runner.received:
            print(f"{runner.received}: stopped; the same command goes on", file=sys.stderr)
            break
    failed = {code for code in codes if code}
    return 0 if not failed else failed.pop() if len(failed) == 1 else 1


def understood(config: Config, tables: list[Table]) -> How:
    """What holds for all rows. Raises UsageError for what no row could be run with."""
    if not config.tiny and not config.data:
        raise UsageError(f"run {tables[0].name}: say the data, such as --data {tables[0].kind}:DIR, or --tiny")
    if config.tiny and (config.data or config.captions or config.other_captions or config.real):
        raise UsageError("--tiny: it has data, captions and real images of its own")
    for name in ("captions", "other_captions"):
        said = getattr(config, name)
        if said and (name == "other_captions" or said != "empty" and "{category}" not in said) and not _is_file(said):
            raise UsageError(f"--{name} {_short(said)}: no such file")
    out = Path(config.out) / "tiny" if config.tiny else Path(config.out)
    places = (*(("--weights", config.weights) if config.weights else ()),
              *(("--cache", config.cache) if config.cache != Config.cache else ()))  # fmt: skip
    how = How(out, config.data, config.real, config.captions, config.other_captions, config.tiny, seed=config.seed,
              places=places, more=_split("more", config.more))  # fmt: skip
    where = steps.data_of(tables[0], how).partition(":")[2]
    if not config.tiny and not config.data.startswith("toy") and not _exists(where):
        raise UsageError(f"--data {_short(config.data)}: no such folder")
    if config.tiny:
        how = replace(how, other_captions=str(out / "tiny" / "captions.csv"))
    return replace(how, have=owned(config.have, tables, how))


def owned(have: str, tables: list[Table], how: How) -> dict[str, Path]:
    """{training: run} of --have."""
    from nanomed.run import runs

    found: dict[str, Path] = {}
    names = {row.name: row.training for table in tables for row in table.rows}
    trainings = {step.name for table in tables for row in table.rows for step in steps.shown(table, row, how)
                 if step.what == "train"}  # fmt: skip
    for item in filter(None, (item.strip() for item in have.split(","))):
        name, equals, run = item.partition("=")
        if name not in names and name not in trainings or not equals:
            known = ", ".join(dict.fromkeys([*names, *sorted(trainings)]))
            raise UsageError(f"--have {_short(item)}: say NAME=RUN with a name of {known}")
        if not _exists(run) or not runs.is_run(run) and not (Path(run) / "system.json").is_file():
            raise UsageError(f"--have {_short(item)}: {_short(run) or 'nothing'} is no run of train.py")
        if runs.is_run(run):
            runs.model_folder(run)
        found[names.get(name, name)] = Path(run)
    return found


# ------------------------------------------------------------------------------------------------------- list, submit


def listed(config: Config) -> int:
    """Tables and rows; of one table, or with --cost of all, the commands, too."""
    tables = [steps.table_of(name) for name in config.table] or [*TABLES.values()]
    how = How(Path(config.out), config.data or "DIR", config.real, config.captions, config.other_captions or "FILE",
              config.tiny, seed=config.seed)  # fmt: skip
    for table in tables:
        rows = steps.chosen(table, config.rows) if config.table else [*table.rows]
        print(f"{table.name}: {table.title}")
        print(f"  columns: {', '.join(column.heading for column in table.columns)}")
        for row in rows:
            print("\n".join(_told(table, row, how, whole=bool(config.table))))
        print(f"  {table.note}\n" if config.table else "")
    if config.cost:
        trainings = dict.fromkeys(
            step.name
            for table in tables
            for row in (steps.chosen(table, config.rows) if config.table else table.rows)
            for step in steps.shown(table, row, how)
            if step.what == "train"
        )
        return costs([*trainings], config)
    return 0


def _told(table: Table, row: Row, how: How, whole: bool) -> Iterator[str]:
    """The lines of one row."""
    chain = steps.shown(table, row, how)
    trained = " > ".join(step.name for step in chain if step.what == "train")
    yield f"  {row.name:16} {row.label:40} {trained}"
    if not whole:
        return
    for column in table.columns:
        if number := row.paper.get(column.heading):
            yield f"      {column.heading} in the paper: {number.value:,} ({number.source})"
    lacking = [column.heading for column in table.columns if column.heading not in row.paper]
    yield f"      {UNKNOWN}: the paper's {', '.join(lacking)}" if lacking else ""
    yield f"      follows: {row.follows}" if row.follows else ""
    for step in chain:
        yield f"    $ python {shlex.join([step.script, *step.words])}"


def costs(names: list[str], config: Config) -> int:
    """train.py's dry run of every training: parameters, memory, time and disk on this machine. Drawing and measuring
    are not in it."""
    from nanomed.tables.running import SCRIPTS

    worst = 0
    for name in names:
        flagged = [*(TRAININGS[name].tiny if config.tiny else TRAININGS[name].flags)]
        if OTHER in flagged:
            flagged[flagged.index(OTHER)] = "empty"
        words = [*flagged, *(["--weights", config.weights] if config.weights else []), "--dry_run"]
        print(f"{name}: python {shlex.join(['train.py', *words])}", flush=True)
        done = subprocess.run([sys.executable, str(SCRIPTS / "train.py"), *words], capture_output=True, text=True)
        said = done.stdout if not done.returncode else f"  FAILED: {(done.stderr.strip().splitlines() or [''])[-1]}"
        print("\n".join(f"  {line}" for line in said.rstrip().splitlines()), flush=True)
        worst = max(worst, done.returncode)
    return worst


def submit(config: Config, tables: list[Table], chosen: dict[str, list[Row]], how: How) -> int:
    """A job file for each row, and the commands that hand them in."""
    from nanomed.tables import jobs

    options = _split("sbatch", config.sbatch)
    if wrong := [word for word in options if not word.startswith("-")]:
        raise UsageError(f"--sbatch {_short(wrong[0])}: options begin with -, as in --gpus=1")
    passed = ("data", "have", "captions", "other_captions", "real", "more", "out", "weights", "cache")
    words = [f"--{name}={value}" for name in passed if (value := getattr(config, name)) != getattr(Config, name)]
    words = [*words, "--seed", str(config.seed), *(["--tiny"] if config.tiny else [])]
    folder = how.out.resolve() / "jobs"
    paths = {folder / f"{table.name}-{row.name}.sh": (table, row) for table in tables for row in chosen[table.name]}
    files.expect_own(*paths)
    for path, (table, row) in paths.items():
        files.write_text(path, jobs.text(table, row, words, [*options], str(folder), str(Path.cwd())))
    files.mark_own(*paths)
    for path in paths:
        print(f"sbatch {shlex.quote(str(path))}")
    return 0


def _split(name: str, text: str) -> tuple[str, ...]:
    """The words of a flag that holds flags."""
    if not all(c.isprintable() for c in text):
        raise UsageError(f"--{name} {_short(text)}: one line of plain characters")
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise UsageError(f"--{name} {_short(text)}: {str(error).lower()}") from None


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def _exists(path: str) -> bool:
    try:
        return bool(path) and Path(path).expanduser().exists()
    except OSError:  # a name that no file can have
        return False


def _is_file(path: str) -> bool:
    return _exists(path) and Path(path).is_file()


if __name__ == "__main__":
    flags.main(main)
