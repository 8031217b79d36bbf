"""What stops a run besides the end: signals outside the steps, a full disk, a folder that is not there any more."""

import json
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import train
from nanomed import systems
from nanomed.run import files, flags, runs, signals
from nanomed.run.flags import UsageError
from nanomed.run.ranks import ALONE

WORDS = ["--model", "msdm-tiny", "--data", "toy:16", "--batch", "4", "--save_every", "2", "--score_images", "0",
         "--test_prompts", "", "--log_every", "1", "--stage", "vae"]  # fmt: skip


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Call train.py's main: trained("--steps", "4") -> (exit code, the newest run)."""

    def call(*words: str):
        places = ["--out", str(tmp_path / "runs"), "--cache", str(tmp_path / "cache")]
        monkeypatch.setattr(sys, "argv", ["train.py", *(() if "--resume" in words else WORDS), *places, *words])
        torch.set_num_threads(1)
        return train.main(), runs.newest(tmp_path / "runs")

    return call


def test_a_signal_outside_the_steps_ends_the_process_and_the_run_says_so(tmp_path):
    run = runs.Run.create(tmp_path, {"model": "m"}, ALONE)
    stop = signals.StopSignal()
    try:
        stop.leave = lambda: run.preempted(stop.received)
        with pytest.raises(SystemExit) as ended:
            signal.raise_signal(signal.SIGINT)
        assert ended.value.code == signals.PREEMPTED
        assert json.loads((run.folder / "state.json").read_text())["status"] == "preempted"
        stop.later, stop.received = True, ""
        signal.raise_signal(signal.SIGINT)  # between steps it is remembered, and the next one stops at once
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_ctrl_c_in_a_script_is_one_line(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        flags.main(interrupted)
    assert ended.value.code == 130 and len(capsys.readouterr().err.splitlines()) == 1


def test_runs_of_one_second_have_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.time, "strftime", lambda form: "now")
    names = [runs.Run.create(tmp_path, {"model": "m"}, ALONE).folder.name for _ in range(3)]
    assert names == ["now-m", "now-m-2", "now-m-3"]


def test_a_full_disk_is_an_error_of_the_machine_with_its_file(tmp_path, monkeypatch):
    def full(*_):
        raise files.SafetensorError("Error while serializing: IoError(Os { code: 28 }) No space left (os error 28)")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space left") as error:
        files.write_tensors(tmp_path / "x.safetensors", {})
    assert flags.understood(error.value) == (flags.MACHINE, f"{tmp_path / 'x.safetensors'}: No space left on device")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [
    lambda path: files.write_text(path, "x" * 2_000_000), lambda path: files.write_json(path, ["x"] * 500_000),
    lambda path: files.write_png(path, torch.randint(256, (800, 800, 3), dtype=torch.uint8)),
    lambda path: files.write_tensors(path, {"x": torch.ones(500_000)}),
])  # fmt: skip
def test_whatever_is_written_to_a_full_disk_is_named(write, tmp_path):
    """The system names no file where a write fails; a limit on the size of files fails as a full disk does."""
    resource = pytest.importorskip("resource")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(OSError) as error:
            write(tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert flags.understood(error.value) == (flags.MACHINE, f"{tmp_path / 'file'}: File too large")
    assert not list(tmp_path.iterdir())


def test_a_line_that_a_full_disk_does_not_take_is_the_machines():
    """Of the log, which is added to."""
    assert flags.understood(OSError(28, "No space left on device")) == (flags.MACHINE, "No space left on device")


def test_an_output_that_nobody_reads_any_more_is_one_line(tmp_path):
    """As of `| head -1`."""
    script = "from nanomed.run import flags; flags.main(lambda: print('line\\n' * 100_000))"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read().decode().splitlines()
    assert process.returncode == flags.MACHINE and len(said) == 1 and "nobody reads" in said[0]


def test_a_run_keeps_the_recipe_that_it_began_with(trained, monkeypatch):
    """A preset that has changed since does not change a run that goes on; config.json says what trains."""
    code, run = trained("--steps", "2")
    recipe = systems.recipe("msdm-tiny", "vae")
    config = json.loads((run / "config.json").read_text())
    assert code == 0 and config["recipes"]["vae"] == recipe and recipe["lr"] != config["lr"]
    monkeypatch.setattr(systems, "recipe", lambda preset, stage="": recipe | {"lr": 1.0} if stage else {})
    assert trained("--resume", str(run), "--steps", "4")[0] == 0
    rates = [line["lr"] for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "lr" in line]
    assert len(rates) == 4 and max(rates) <= recipe["lr"]


def test_a_best_checkpoint_that_is_gone_is_said_and_chosen_anew(trained, capsys):
    _, run = trained("--steps", "6")
    best = next(line["best"]["step"] for line in map(json.loads, (run / "log.jsonl").read_text().splitlines())
                if "best" in line)  # fmt: skip
    state = run / "checkpoints" / "vae-step-000006" / "state.json"
    kept = json.loads(state.read_text())
    if best == 6:  # let it be an older one
        kept["best"]["step"] = best = 2
        state.write_text(json.dumps(kept))
    shutil.rmtree(run / "checkpoints" / f"vae-step-{best:06d}", ignore_errors=True)
    assert trained("--resume", str(run), "--steps", "8")[0] == 0
    assert f"the best checkpoint, step {best}, is gone" in capsys.readouterr().out


def test_what_somebody_has_changed_in_a_run_is_one_line(trained, tmp_path):
    """Files that one may open and write in, or remove."""
    _, run = trained("--steps", "2")
    last = "checkpoints/vae-step-000002"
    for number, (file, change, told) in enumerate([
        ("config.json", {"steps": "many"}, "steps is \"many\" in the run's config.json: not a whole number"),
        ("config.json", {"batch": -1}, "batch is -1 in the run's config.json: out of range, which is 1 .. 65536"),
        ("config.json", {"augment": 1}, "augment is 1 in the run's config.json: not true or false"),
        ("config.json", {"recipes": 7}, "is damaged: recipes is 7"),
        ("state.json", {"stages": 3}, "is damaged: stages is 3"),
        ("state.json", {"stages": ["moon"]}, "its stage moon is none of msdm-tiny"),
        (f"{last}/state.json", {"sha256": None}, "is damaged: remove the folder"),
        (f"{last}/optimizer.safetensors", None, "is damaged: remove the folder"),
    ]):  # fmt: skip
        path = shutil.copytree(run, tmp_path / str(number)) / file
        if change is None:
            path.unlink()
        else:
            path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(UsageError, match=re.escape(told)):
            trained("--resume", str(tmp_path / str(number)), "--steps", "4")
