"""The commands of rows, run one after the other: each once, and again from where it stopped.

What is finished is told by its own mark: a run by its state, a drawing by its manifest, a measurement by its results.
A training that has begun goes on by --resume. Two commands that want the same folder (the jobs of two rows that stand
on one training) wait for each other.
"""

import contextlib
import itertools
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nanomed import data
from nanomed.run import files, runs
from nanomed.run.flags import UsageError
from nanomed.run.signals import PREEMPTED
from nanomed.tables import steps
from nanomed.tables.rows import INCEPTION, OTHER, Row, Table
from nanomed.tables.steps import How, Step

SCRIPTS = Path(__file__).resolve().parents[2]  # train.py, sample.py and evaluate.py are beside the package


class Failed(Exception):
    """A command that failed: the last line that it wrote, and its exit code."""

    def __init__(self, line: str, code: int):
        super().__init__(line)
        self.code = code


class Stopped(Exception):
    """This process was asked to stop, and has passed it on."""


@dataclass
class Outcome:
    """What became of a row."""

    row: Row
    asked: bool = True
    error: str = ""
    code: int = 0
    finished: bool = False
    seconds: dict[str, float] = field(default_factory=dict)  # {what: seconds}, over all starts
    commands: list[str] = field(default_factory=list)
    parameters: int | None = None  # that train


class Runner:
    """Runs the rows of one table. `say` takes a line for the terminal; `scripts` is where the scripts are."""

    def __init__(self, table: Table, how: How, say: Callable[[str], None], scripts: Path = SCRIPTS):
        self.table, self.how, self.say, self.scripts = table, how, say, scripts
        self.child: subprocess.Popen | None = None
        self.received = ""
        self.failed: dict[Path, Failed] = {}  # what is not tried again for another row
        for script in ("train.py", "sample.py", "evaluate.py"):
            if not (scripts / script).is_file():
                raise UsageError(f"{scripts / script} is not there: run this from a checkout, where the scripts are")

    def rows(self, rows: list[Row]) -> list[Outcome]:
        """Run these, whatever becomes of each; the rest is left where this process is asked to stop. Returns what is
        there of every row of the table."""
        outcomes = [Outcome(row, asked=row in rows) for row in self.table.rows]
        before = {number: signal.signal(number, self._pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for outcome in outcomes:
                if outcome.asked:
                    self._row(outcome)
        except Stopped:
            pass
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        for outcome in outcomes:
            if not outcome.asked:
                self._seen(outcome)
        return outcomes

    def _seen(self, outcome: Outcome) -> None:
        """What an earlier start, or another process, has left of a row."""
        chain = steps.shown(self.table, outcome.row, self.how)
        for step in chain:
            known = _read(step.folder / "step.json")
            outcome.commands.append(command(self.scripts / step.script, step.words))
            if known:
                outcome.seconds[step.what] = outcome.seconds.get(step.what, 0.0) + known["seconds"]
            outcome.parameters = parameters(step.folder / "log.txt") if step.what == "train" else outcome.parameters
        outcome.finished = self._words(chain[-1], known) is None

    def _row(self, outcome: Outcome) -> None:
        row = outcome.row
        try:
            if row.captions == OTHER and not self.how.other_captions:
                raise Failed("say which captions: --other_captions FILE", 2)
            if self.how.tiny:
                toys(self.table, row, self.how)
            self._do(steps.prompts(self.table, row, self.how), outcome)
            run = self._train(row.training, outcome)
            self._do(steps.drawing(self.table, row, self.how, run), outcome)
            self._do(steps.measuring(self.table, row, self.how), outcome)
            outcome.finished = True
        except Failed as error:
            outcome.error, outcome.code = str(error), error.code
            self.say(f"{row.name} FAILED: {error}")

    def _train(self, name: str, outcome: Outcome) -> Path:
        """The run of a training, made where it is not there."""
        if name in self.how.have:
            return self.how.have[name]
        below = steps.upon(name, self.how)
        step = steps.training(name, self.table, self.how, self._train(below, outcome) if below else "")
        self._do(step, outcome)
        outcome.parameters = parameters(step.folder / "log.txt")
        return runs.newest(step.folder, status="done")

    def _do(self, step: Step, outcome: Outcome) -> None:
        """Run a step unless it is done."""
        if step.folder in self.failed:
            raise self.failed[step.folder]
        with self._alone(step.folder) as lock:
            known = _read(step.folder / "step.json")
            if known and known["words"] != step.settings and step.what != "measure":
                old, new = (_different(a, b) for a, b in ((known["words"], step.settings),
                                                          (step.settings, known["words"])))  # fmt: skip
                raise self._failure(step, Failed(f"{step.folder} was made with {old}, not {new}: choose another --out, "
                                                 f"or remove it", 2))  # fmt: skip
            seconds = known.get("seconds", 0.0) if known.get("words") == step.settings else 0.0
            note = {"words": step.settings, "seconds": seconds}
            words = self._words(step, known)
            outcome.commands.append(command(self.scripts / step.script, step.words))
            if words is not None:
                if step.mark:  # of other words, or of nobody
                    (step.folder / step.mark).unlink(missing_ok=True)
                files.write_json(step.folder / "step.json", note)
                self.say(command(self.scripts / step.script, words))
                start = time.monotonic()
                code, line = self._start(step, words, lock)
                note["seconds"] = seconds + time.monotonic() - start
                files.write_json(step.folder / "step.json", note)
                if self.received:
                    raise Stopped
                if code == 0 and self._words(step, note) is not None:
                    code, line = 1, f"{step.script} ended well, but {step.mark or 'a finished run'} is not there"
                if code:
                    raise self._failure(step, Failed(f"{step.what}: {line}", code))
            outcome.seconds[step.what] = outcome.seconds.get(step.what, 0.0) + note["seconds"]

    def _words(self, step: Step, known: dict) -> tuple[str, ...] | None:
        """The words to run a step with; None where it is done."""
        if step.what != "train":
            done = (step.folder / step.mark).is_file() and known.get("words") == step.settings
            return None if done else step.words
        if runs.newest(step.folder, status="done"):
            return None
        begun = runs.newest(step.folder)
        return ("--resume", str(begun)) if begun else step.words

    @contextlib.contextmanager
    def _alone(self, folder: Path) -> Iterator[int]:
        """Hold a folder's lock, which ends with the last process that has it open."""
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "ab") as lock:
            for attempt in itertools.count():
                if files.lock(lock, wait=False):
                    break
                if not attempt:
                    self.say(f"{folder}: another process is at it; waiting")
                time.sleep(1)
                if self.received:
                    raise Stopped
            yield lock.fileno()

    def _failure(self, step: Step, failed: Failed) -> Failed:
        self.failed[step.folder] = failed
        return failed

    def _start(self, step: Step, words: tuple[str, ...], lock: int) -> tuple[int, str]:
        """(exit code, last line) of a script. The child has a session of its own, so that Ctrl-C comes to it once, by
        `_pass_on`; and holds the lock, so that it is not joined by another where this process is killed."""
        if self.received:
            raise Stopped
        log = step.folder / "log.txt"
        with open(log, "ab") as out:
            start = out.tell()
            self.child = subprocess.Popen(
                [sys.executable, str(self.scripts / step.script), *words], stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT, start_new_session=True, pass_fds=() if files.WINDOWS else (lock,),
            )  # fmt: skip
            if self.received:  # between the two
                self.child.terminate()
            code = self.child.wait()
            self.child = None
        if code == PREEMPTED:
            self.received = self.received or "SIGTERM"
        with open(log, "rb") as written:
            written.seek(start)
            said = re.split(r"[\r\n]+", written.read().decode("utf-8", "replace"))
        last = next((line.strip() for line in reversed(said) if line.strip()), f"no word; see {log}")
        return code if code >= 0 else 1, f"{last} ({signal.Signals(-code).name})" if code < 0 else last

    def _pass_on(self, number: int, frame: object) -> None:
        """To be asked once lets the child save its state; twice ends it."""
        if self.child is not None:
            self.child.kill() if self.received else self.child.terminate()
        self.received = signal.Signals(number).name


def command(script: Path, words: tuple[str, ...]) -> str:
    """A line to type."""
    here = Path(script.name)
    return f"python {shlex.join([str(here if here.exists() and here.samefile(script) else script), *words])}"


def code_of(outcomes: list[Outcome], received: str) -> int:
    """75 where it was stopped, 0 where all is well, the failures' common code, else 1."""
    if received:
        return PREEMPTED
    codes = {outcome.code for outcome in outcomes if outcome.code}
    return 0 if not codes else codes.pop() if len(codes) == 1 else 1


def parameters(log: Path) -> int | None:
    """How many parameters train, as the last stage in train.py's output has it."""
    found = re.findall(r"^stage \w+: ([\d,]+) parameters train", _text(log), re.MULTILINE)
    return int(found[-1].replace(",", "")) if found else None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _read(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found["words"], list) and found["seconds"] >= 0 else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _different(words: list[str], others: list[str]) -> str:
    """The words that the others lack."""
    return shlex.join([word for word in words if word not in others]) or "fewer flags"


def toys(table: Table, row: Row, how: How) -> None:
    """What the stand-ins of a row need beside the toy world: other captions, an Inception of random weights."""
    if row.captions == OTHER and not Path(how.other_captions).is_file():
        cache = how.places[how.places.index("--cache") + 1] if "--cache" in how.places else "runs/cache"
        lines = [f'{row.file.name},"{row.prompts[-1]}"' for row in data.load(table.tiny, cache, 32).rows]
        files.write_text(how.other_captions, "\n".join(["file_name,text", *lines]) + "\n")
    if INCEPTION in table.tiny_measure:
        file = how.out / "tiny" / "inception.safetensors"
        if not file.is_file():
            import torch

            from nanomed.metrics.networks.inception import Inception

            torch.manual_seed(0)
            files.write_tensors(file, dict(Inception().state_dict()))
