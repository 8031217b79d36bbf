"""Nothing works in silence for longer than two seconds, and nothing speaks before."""

import hashlib
import io
import sys

import pytest

from nanomed.run import files
from nanomed.run import progress as module
from nanomed.run.progress import BETWEEN, QUIET, Progress, duration, progress, working


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless it is set."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def telling(clock, monkeypatch):
    """`telling(seconds, meanwhile)`: what tells runs for so long by the clock; every second calls `meanwhile`."""
    threads = []

    class Event:
        """Waiting moves the clock."""

        def wait(self, seconds):
            for _ in range(round(seconds)):
                clock[0] += 1
                self.meanwhile()
                if clock[0] > self.end:
                    return True
            return False

        def set(self):
            self.end = 0

    class Thread:
        def __init__(self, target, args, daemon):
            threads.append((target, args))

        def start(self):
            pass

    monkeypatch.setattr(module.threading, "Event", Event)
    monkeypatch.setattr(module.threading, "Thread", Thread)

    def run(seconds, meanwhile=lambda: None):
        for target, args in threads:
            args[1].end, args[1].meanwhile = clock[0] + seconds, meanwhile
            target(*args)

    return run


def test_a_file_gets_a_line_after_two_seconds_and_then_every_half_minute(telling, capsys):
    with Progress(2000, "hashing images", "image") as bar:
        telling(100, lambda: bar.update(8))
    said = capsys.readouterr().err
    assert said.splitlines()[0] == "hashing images: 16 of 2,000 images, 4 min left"
    assert [int(line.split()[2]) for line in said.splitlines()] == [16, 256, 496, 736]
    assert "\r" not in said and BETWEEN == 30 and QUIET == 2


def test_one_long_unit_is_not_silent(telling, capsys):
    """A batch of texts through T5-XXL on a CPU, say: nothing is updated, and yet a line comes."""
    with Progress(5, "t5 of prompts", "batch"), working("reading model.safetensors"):
        telling(40)
    said = capsys.readouterr().err.splitlines()
    waited = [f"reading model.safetensors ... {time}" for time in ("43 s", "1 min")]  # the clock has gone on
    assert said == ["t5 of prompts: 0 of 5 batches"] * 2 + waited


def test_what_was_left_open_falls_silent(capsys, monkeypatch):
    monkeypatch.setattr(module, "QUIET", 0.01)
    monkeypatch.setattr(module, "BETWEEN", 0.01)
    bar = Progress(5, "counting")
    ended = bar.ended
    del bar
    assert ended.wait(10)


def test_what_is_quick_says_nothing(clock, capsys):
    assert list(progress("abc", "counting")) == ["a", "b", "c"]
    with working("reading"):
        pass
    assert capsys.readouterr().err == ""


def test_notes_stand_behind_the_numbers_and_work_done_before_counts_for_no_pace(clock, capsys):
    bar = Progress(100, "unet", "step", done=90)
    clock[0] += 5
    bar.update(5, loss=0.25)
    bar.tell()
    assert capsys.readouterr().err == "unet: 95 of 100 steps, 5 s left, loss=0.25\n"  # 5 steps in 5 s


def test_a_terminal_gets_a_bar(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    bar = Progress(3, "drawing", "image")
    bar.update()
    assert screen.getvalue() == ""  # not yet
    bar.tell()
    bar.update(2)
    bar.close()
    assert "drawing" in screen.getvalue() and "3/3" in screen.getvalue() and screen.getvalue().endswith("\n")
    with working("reading a large file") as wait:
        wait.tell()
    assert "reading a large file ... 00:0" in screen.getvalue()


def test_of_several_processes_the_first_speaks(telling, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with Progress(3, "drawing"), working("reading"):
        telling(60)
    assert capsys.readouterr().err == ""


def test_what_cannot_be_counted_says_that_it_goes_on(capsys, monkeypatch):
    monkeypatch.setattr(module, "QUIET", 0.01)
    told = module.threading.Event()
    say = module.say
    monkeypatch.setattr(module, "say", lambda line: (say(line), told.set()))
    with working("reading a large file"):
        assert told.wait(10)
    assert capsys.readouterr().err.startswith("reading a large file ... 0 s")


def test_hashing_a_large_file_says_how_far_it_is_and_hashes_the_same(tmp_path, monkeypatch):
    (tmp_path / "large").write_bytes(bytes(range(256)) * 80_000)  # 20 MB: two blocks
    plain = files.sha256(tmp_path / "large")
    counted = []
    monkeypatch.setattr(files, "LARGE", 1)
    monkeypatch.setattr(Progress, "update", lambda self, count: counted.append((self.total, count)))
    assert files.sha256(tmp_path / "large") == plain == hashlib.sha256((tmp_path / "large").read_bytes()).hexdigest()
    assert counted == [(19, 16), (19, 3)]


@pytest.mark.parametrize("seconds, said", [(3.4, "3 s"), (130, "2 min"), (5400, "1.5 h"), (400_000, "4.6 days")])
def test_durations_are_said_in_a_readers_unit(seconds, said):
    assert duration(seconds) == said
