"""Nothing works in silence for longer than two seconds, and nothing speaks before."""

import io
import sys

import pytest

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


def test_a_file_gets_a_line_after_two_seconds_and_then_every_half_minute(clock, capsys):
    with Progress(2000, "hashing images", "image") as bar:
        for _ in range(800):
            clock[0] += 0.125  # 100 seconds in all
            bar.update()
    said = capsys.readouterr().err
    assert said.splitlines()[0] == "hashing images: 16 of 2,000 images, 4 min left"
    assert [int(line.split()[2]) for line in said.splitlines()] == [16, 256, 496, 736]
    assert "\r" not in said and BETWEEN == 30 and QUIET == 2


def test_what_is_quick_says_nothing(clock, capsys):
    assert list(progress("abc", "counting")) == ["a", "b", "c"]
    with working("reading"):
        pass
    assert capsys.readouterr().err == ""


def test_notes_stand_behind_the_numbers_and_work_done_before_counts_for_no_pace(clock, capsys):
    bar = Progress(100, "unet", "step", done=90)
    clock[0] += 5
    bar.update(5, loss=0.25)
    assert capsys.readouterr().err == "unet: 95 of 100 steps, 5 s left, loss=0.25\n"  # 5 steps in 5 s


def test_a_terminal_gets_a_bar(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(module, "QUIET", 0.0)
    for _ in progress(range(3), "drawing", "image"):
        pass
    assert "drawing" in screen.getvalue() and "3/3" in screen.getvalue()


def test_of_several_processes_the_first_speaks(clock, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    for _ in progress(range(3), "drawing"):
        clock[0] += 60
    with working("reading"):
        pass
    assert capsys.readouterr().err == ""


def test_what_cannot_be_counted_says_that_it_goes_on(capsys, monkeypatch):
    monkeypatch.setattr(module, "QUIET", 0.01)
    told = module.threading.Event()
    say = module.say
    monkeypatch.setattr(module, "say", lambda line: (say(line), told.set()))
    with working("reading a large file"):
        assert told.wait(10)
    assert capsys.readouterr().err.startswith("reading a large file ... 0 s")


@pytest.mark.parametrize("seconds, said", [(3.4, "3 s"), (130, "2 min"), (5400, "1.5 h"), (400_000, "4.6 days")])
def test_durations_are_said_in_a_readers_unit(seconds, said):
    assert duration(seconds) == said
