"""A command line that cannot be misread: every flag of every command, with values that no one means.

No traceback, one line, an exit code that `flags.main` names, and nothing left behind by a command that is refused.
Where a value is accepted the work behind it is replaced by next to nothing, so that thousands of them can be tried.
"""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import types
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import nanomed.adapters.__main__
import nanomed.captions.__main__
import nanomed.captions.paraphrase
import nanomed.data.__main__
import nanomed.evaluation.__main__
import nanomed.tables.__main__
import nanomed.weights.__main__
import sample
import train
from nanomed import data, systems, weights
from nanomed.adapters import formats, lora
from nanomed.data import grammar, toy
from nanomed.drawing import Drawing, draw
from nanomed.evaluation import measuring, toyworld
from nanomed.metrics.features import PROTOCOLS
from nanomed.run import files, flags, progress, signals
from nanomed.run.flags import UsageError, within
from nanomed.text.lengths import too_long

ROOT = Path(__file__).parents[1]
VALUES = [
    "", "  ", "0", "-3", "1" + 30 * "0", "nan", "-inf", "word", "\u0663", "nowhere/at/all.csv", "7",
    "a b\nc", 300 * "n", "prompts.txt/below",
]  # fmt: skip  # blank, small, huge, no number, a digit of another script, a path, a number for a path, a name too long
CODES = {0, 2, 3, 4, 5}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a data set, prompts, images, and caches that are full."""
    place = tmp_path_factory.mktemp("place")
    toy.write(place / "data", 4, 64)
    (place / "prompts.txt").write_text("an image of a polyp\n")
    for kind in ("real", "fake"):
        (place / kind).mkdir()
        for i in range(3):
            Image.fromarray(np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(
                place / kind / f"{i}.png"
            )
    net = torch.nn.Sequential(torch.nn.Linear(4, 4))
    lora.inject(net, 2, targets=["0"])
    formats.save_peft(place / "adapter", net)
    return place


@pytest.fixture
def there(place, monkeypatch):
    """The commands run in that folder, and what costs time in them is done once or not at all."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_CACHE", str(place / "hub"))
    built, loaded = cache(systems.build), cache(systems.load)
    monkeypatch.setattr(systems, "build", lambda *a, **k: built(*a, **k))
    monkeypatch.setattr(systems, "load", lambda *a, **k: loaded(*a, **k))
    monkeypatch.setattr(files, "_sync", lambda path: None)
    monkeypatch.setattr(weights, "fingerprint", lambda system: "")
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *a, **k: module)
    monkeypatch.setattr(signals, "StopSignal", types.SimpleNamespace)
    monkeypatch.setattr(train, "train_stage", lambda *a: True)
    monkeypatch.setattr(train, "draw_and_evaluate", lambda *a: {})
    monkeypatch.setattr("nanomed.training.plan.dry_run", lambda *a: None)
    monkeypatch.setattr("nanomed.tables.running.Runner.rows", lambda runner, rows: [])
    two = grammar.all_prompts()[:2]
    monkeypatch.setattr(grammar, "all_prompts", lambda: list(two))
    monkeypatch.setattr(toyworld, "train_stand_in", lambda path: 1.0)
    monkeypatch.setattr("nanomed.evaluation.damages.matrix", lambda *a: {})
    for text in ("as_json", "markdown", "page"):
        monkeypatch.setattr(f"nanomed.evaluation.damages.{text}", lambda *a: "")
    for system in ("msdm.MSDM", "medart.MedArt", "miniatures.kandinsky2.Kandinsky2Tiny"):
        monkeypatch.setattr(f"nanomed.systems.{system}.sample", lambda s, p, *a, **k: torch.zeros(len(p), 3, 8, 8))
    return place


def called(main, words, capsys, monkeypatch) -> tuple[int, str]:
    """(exit code, standard error) of a command, in this process; without what a slow machine says of its progress."""
    monkeypatch.setattr(progress, "QUIET", 1e6)
    monkeypatch.setattr(sys, "argv", ["command.py", *words])
    with pytest.raises(SystemExit) as ended:
        flags.main(main)
    return ended.value.code, capsys.readouterr().err


def listing(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "cache" not in path.parts}


TRAIN = ["--data", "clef:data", "--out", "out", "--cache", "cache", "--test_prompts", "prompts.txt"]
EVALUATE = ["--real", "real", "--fake", "fake", "--out", "out", "--cache", "cache", "--metrics", "colour",
            "--intervals", "no"]  # fmt: skip
COMMANDS = {  # main, its flags, what is said besides, and the words that stand without a flag
    "train.py": (train.main, train.Config, ["--model", "msdm-tiny", *TRAIN], ()),
    "train.py, MSDM's own": (train.main, systems.options("msdm-tiny"), ["--model", "msdm-tiny", *TRAIN], ()),
    "train.py, Med-Art's own": (train.main, systems.options("medart-tiny"), ["--model", "medart-tiny", *TRAIN], ()),
    "train.py, Kandinsky's own": (train.main, systems.options("kandinsky2-tiny"),
                                  ["--model", "kandinsky2-tiny", *TRAIN], ()),
    "sample.py": (sample.main, sample.Config, ["--prompts", "prompts.txt", "--out", "out", "--batch", "1", "--model",
                                               str(ROOT / "weights/msdm-tiny")], ()),
    "evaluate.py": (evaluate.main, evaluate.Config, EVALUATE, ()),
    "nanomed.data": (nanomed.data.__main__.main, nanomed.data.__main__.Config, ["check", "data"], ("verb", "path")),
    "nanomed.weights": (nanomed.weights.__main__.main, nanomed.weights.__main__.Config, ["check"], ("verb", "names")),
    "nanomed.captions.paraphrase": (nanomed.captions.paraphrase.main, nanomed.captions.paraphrase.Config, ["out.csv"],
                                    ("file",)),
    "nanomed.adapters": (nanomed.adapters.__main__.main, nanomed.adapters.__main__.Config,
                         ["adapter", "--to", "kohya", "--out", "out"], ("path",)),
    "nanomed.evaluation": (nanomed.evaluation.__main__.main, nanomed.evaluation.__main__.Config, ["--out", "out"], ()),
    "nanomed.tables": (nanomed.tables.__main__.main, nanomed.tables.__main__.Config,
                       ["run", "mmcp-2", "--tiny", "--out", "out"], ("verb", "table")),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_no_value_of_any_flag_is_misread(name, there, capsys, monkeypatch):
    main, configs, besides, words = COMMANDS[name]
    fields = [field for config in (configs if isinstance(configs, tuple) else (configs,))
              for field in dataclasses.fields(config)]  # fmt: skip
    before, tried, codes = listing(there), 0, {}
    for field in fields:
        for value in VALUES:
            if field.name in words:
                line = [*besides[: words.index(field.name)], value, *besides[words.index(field.name) + 1 :]]
            else:
                line = [*besides, f"--{field.name}", value]
            code, said = called(main, line, capsys, monkeypatch)
            where = (name, field.name, value, code, said)
            assert code in CODES, where
            if code:
                found = name in ("nanomed.data", "nanomed.weights") and not said  # a finding, on standard output
                assert (found or len(said.strip().splitlines()) == 1) and listing(there) == before, where
                assert "Traceback" not in said, where
            else:
                for path in listing(there) - before:
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            if not issubclass(flags.kind_of(field.type), str | tuple):
                number = value.strip() in ("0", "7", "-3", "1" + 30 * "0")
                assert number or code == 2 or flags.kind_of(field.type) is bool, where
            tried += 1
            codes[code] = codes.get(code, 0) + 1
    assert tried == len(fields) * len(VALUES) and codes[2]
    print(f"{name}: {tried} values, exit codes {codes}")


def test_what_a_refusal_says(there, capsys, monkeypatch):
    """The flag, the value and the range; a value that would fill the screen is cut."""
    for words, told in {
        "--batch 0": "--batch 0: out of range, which is 1 .. 65536",
        "--lr -inf": "--lr -inf: not a number in the range > 0",
        "--steps \u0663": "--steps \u0663: not a whole number in the range 1 .. 10^9",
        "--seed -1": "--seed -1: out of range, which is 0 ..< 2^63",
        "--schedule never": "--schedule never: choose constant, cosine, linear",
        "--size 100": "--size 100: a multiple of 16 for msdm",
        "--out prompts.txt": "--out prompts.txt: that is no folder",
        "--out prompts.txt/a": "--out prompts.txt/a: prompts.txt is no folder",
        "--stage unet": "--stage unet builds on stage vae: say --resume with a run that has it",
        "--stage moon": "--stage moon: choose vae, unet",
        "--frozen moon": "--frozen moon: say device, cpu, share, or PART=PLACE of text_encoder, vae, unet",
        "--rank 2": "--rank 2: the vae of stage vae has no layers named for adapters",
        "--base moon --stage unet": "moon: not a run folder",
        "--bach 3": "unrecognized arguments: --bach 3 (--help lists all flags)",
        "--batch": "argument --batch: expected one argument (--help lists all flags)",
        "--batch " + 300 * "9": "--batch " + 77 * "9" + "...: out of range, which is 1 .. 65536",
    }.items():
        words = ["--model", "msdm-tiny", *TRAIN, *words.split()]
        assert called(train.main, words, capsys, monkeypatch) == (2, f"command.py: {told}\n")


WRITING = {  # commands that write where --out says, with what else they need
    "train.py": (train.main, ["--model", "msdm-tiny"]), "sample.py": (sample.main, ["--prompts", "prompts.txt"]),
    "evaluate.py": (evaluate.main, EVALUATE[:4]), "tables": (nanomed.tables.__main__.main, ["run", "mmcp-2", "--tiny"]),
    "evaluation": (nanomed.evaluation.__main__.main, []),
    "adapters": (nanomed.adapters.__main__.main, ["adapter", "--to", "kohya"]),
    "paraphrase": (nanomed.captions.paraphrase.main, ["prompts.txt"]),
    "vsg": (nanomed.captions.__main__.main, ["vsg", "clef:data"]),
    "simplify": (nanomed.captions.__main__.main, ["simplify", "prompts.txt"]),
    "captions paraphrase": (nanomed.captions.__main__.main, ["paraphrase", "prompts.txt"]),
    "captions train": (nanomed.captions.__main__.main, ["train"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITING)
def test_a_place_that_takes_no_files_is_named_before_any_work(name, there, capsys, monkeypatch, tmp_path):
    """As /proc, or a disk that is read-only, where rights tell nothing to one who may do everything."""
    main, words = WRITING[name]
    made, shut = tempfile.TemporaryFile, tmp_path / "shut"
    shut.mkdir()

    def refusing(*args, dir=None, **kwargs):
        if dir is not None and Path(dir).resolve() == shut:
            raise FileNotFoundError(2, "No such file or directory", str(dir))
        return made(*args, dir=dir, **kwargs)

    monkeypatch.setattr(tempfile, "TemporaryFile", refusing)
    code, said = called(main, [*words, "--out", str(shut / "nope")], capsys, monkeypatch)
    assert code == 2 and said.count("\n") == 1 and said.startswith("command.py: --out ")
    assert said.endswith(f": {shut} cannot be written to\n")


@pytest.mark.parametrize("name", ["evaluate.py", "evaluation", "captions train"])  # which write after long work
def test_a_default_that_takes_no_files_is_named_before_any_work(name, there, capsys, monkeypatch):
    main, words = WRITING[name]
    monkeypatch.setattr(flags, "_takes_files", lambda folder: False)
    code, said = called(main, words, capsys, monkeypatch)
    assert code == 2 and "--out " in said and said.endswith("cannot be written to\n")


def test_a_file_to_write_is_a_plain_one(there, capsys, monkeypatch):
    """/dev/null would be replaced, by one who may."""
    code, said = called(nanomed.captions.paraphrase.main, ["prompts.txt", "--out", os.devnull], capsys, monkeypatch)
    assert (code, said) == (2, f"command.py: --out {os.devnull}: that is no plain file\n")


@pytest.mark.parametrize("held_out", [False, True])
def test_a_damaged_image_is_found_before_the_training(held_out, there, tmp_path, capsys, monkeypatch):
    """Whether it is to be trained on or held out; and nothing has been written."""
    shutil.copytree("data", tmp_path / "data")
    rows = data.load(f"clef:{tmp_path / 'data'}").split(0.5, 2204, by_label=None)[held_out].rows
    rows[0].file.write_bytes(rows[0].file.read_bytes()[:600])
    before = listing(there)
    words = ["--model", "msdm-tiny", *TRAIN, "--data", f"clef:{tmp_path / 'data'}", "--valid", "0.5"]
    code, said = called(train.main, words, capsys, monkeypatch)
    assert code == 3 and said.startswith(f"command.py: {rows[0].file}: damaged image") and listing(there) == before


def test_a_training_that_ends_in_infinity_says_so(place, tmp_path, capsys, monkeypatch):
    """In its first look at what is held out, before three steps in a row could."""
    words = ["--model", "msdm-tiny", "--stage", "vae", "--data", f"clef:{place / 'data'}", "--test_prompts", ""]
    words += ["--steps", "1", "--batch", "1", "--lr", "1e30", "--out", str(tmp_path / "out"), "--cache", str(tmp_path)]
    code, said = called(train.main, words, capsys, monkeypatch)
    assert code == 1 and said.splitlines()[-1].startswith("command.py: vae: what is held out has no finite loss")
    assert not [*tmp_path.rglob("checkpoints/*")]


def test_a_prompt_of_a_megabyte_is_no_burden():
    """What is cut of it is found without a copy of it for each of its words."""
    found = too_long(["polyp " * 170_000], 77, lambda texts: [len(text.split()) + 2 for text in texts])
    assert [(length, len(rest.split())) for length, rest in found.values()] == [(170_002, 169_925)]


@pytest.mark.parametrize("limits, inside, outside", [
    ("", (-1e300, 0, 5), ()),
    (">= 1", (1, 10**40), (0, -1)),
    ("> 0", (1e-300,), (0, -0.0, -1)),
    ("0 .. 1", (0, 0.5, 1), (-1e-9, 1.0000001)),
    ("0 ..< 1", (0, 0.999), (1, -1)),
    ("0 ..< 2^63", (0, 2**63 - 1), (2**63, -1)),
])  # fmt: skip
def test_ranges_are_read_as_they_are_written(limits, inside, outside):
    assert all(within(value, limits) for value in inside) and not any(within(value, limits) for value in outside)


def test_help_shows_the_range_of_every_number(capsys):
    """And every number of every command has one."""
    for _, configs, _, words in COMMANDS.values():
        if isinstance(configs, tuple):
            continue
        with pytest.raises(SystemExit):
            flags.parse(configs, ["--help"], words=words)
        said = " ".join(capsys.readouterr().out.split())
        for field in dataclasses.fields(configs):
            if flags.kind_of(field.type) in (int, float):
                assert flags.range_of(field.type) and flags.range_of(field.type) in said, field.name


def test_the_protocols_are_those_that_there_are():
    assert set(evaluate.PROTOCOLS.split(" | ")) == {*PROTOCOLS, measuring.ORGANISERS, "torchmetrics>=1.8"}


# --------------------------------------------------------------------------------------- what only the system knows


@pytest.fixture(scope="module")
def small():
    return {name: systems.build(name) for name in ("msdm-tiny", "medart-tiny", "kandinsky2-tiny")}


@pytest.mark.parametrize("preset", ["msdm-tiny", "medart-tiny", "kandinsky2-tiny"])
def test_a_system_is_asked_for_size_and_steps_before_anything_is_written(small, tmp_path, preset):
    """On DPM-Solver's grid of 1,000 steps two fall together, which it cannot divide by: 999 are the most."""
    system = small[preset]
    most, unit = system.sampled()[0].most_steps(), system.unit
    assert most == 999 or preset == "kandinsky2-tiny" and most >= 500
    system.check(steps=most, size=2 * unit)
    for how, told in (
        ({"steps": most + 1}, f"--steps {most + 1}: .* draws in 1 to {most} steps"),
        ({"size": unit + 1}, f"--size {unit + 1}: .* draws {system.size} or a multiple of {unit}"),
    ):
        with pytest.raises(UsageError, match=told):
            draw(system, ["a polyp"], Drawing(str(tmp_path / "a" / "b"), **how))
        assert not list(tmp_path.iterdir())


def test_published_sizes_take_any_shape():
    """PixArt draws the nearest trained shape, and scales and crops it."""
    system = systems.build("pixart", random=True)
    assert system.unit == 1


def test_a_drawing_that_fails_has_claimed_nothing(small, tmp_path, monkeypatch):
    """Neither by its settings nor by folders; a folder that was there stays; images that were drawn stay."""
    system, calls = small["msdm-tiny"], []

    def broken(prompts, noise, *a, **k):
        calls.append(prompts)
        if len(calls) in (1, 3):
            raise RuntimeError("no more")
        return torch.zeros(len(prompts), 3, 8, 8)

    monkeypatch.setattr(system, "sample", broken)
    (tmp_path / "old").mkdir()
    how = Drawing(str(tmp_path / "old" / "new"), batch=1)
    with pytest.raises(RuntimeError):
        draw(system, ["a", "b"], how)
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]
    with pytest.raises(RuntimeError):  # the second image
        draw(system, ["a", "b"], how)
    assert {path.name for path in (tmp_path / "old" / "new").iterdir()} == {"settings.json", "00000.png"}
    with pytest.raises(UsageError, match=r"other settings \(seed\)"):
        draw(system, ["a", "b"], dataclasses.replace(how, seed=1))
    (tmp_path / "old" / "new" / "00000.png").unlink()  # a mark alone, as of a drawing that was killed, claims nothing
    draw(system, ["a", "b"], dataclasses.replace(how, seed=1))


# -------------------------------------------------------------------------------------------------- whole processes


def launched(*words: str, ranks: int = 0, **more) -> subprocess.CompletedProcess:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    return subprocess.run(
        [sys.executable, *launch, *words], capture_output=True, text=True, timeout=120, **more,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_CACHE": "none"},
    )  # fmt: skip


@pytest.mark.parametrize("words, code, told", [
    (["-m", "nanomed.data", "check", "nowhere"], 3, "python -m nanomed.data: nowhere: no such folder"),
    (["-m", "nanomed.weights", "no"], 2, "python -m nanomed.weights: verb no: choose list, check, verify"),
    ([str(ROOT / "sample.py"), "--prompts", "f", "--size", "100", "--model", str(ROOT / "weights/msdm-tiny")], 2,
     "sample.py: --size 100: msdm draws 64 or a multiple of 16"),
])  # fmt: skip
def test_a_refusal_is_one_line(tmp_path, words, code, told):
    (tmp_path / "f").write_text("a polyp\n")
    done = launched(*words, cwd=tmp_path)
    said = re.sub(r"^.* \.\.\. \d+ s\n", "", done.stderr, flags=re.M)  # on a slow machine, that a model was read
    assert (done.returncode, said) == (code, f"{told}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_under_torchrun_one_rank_speaks_and_the_launchers_report_ends_with_it(tmp_path):
    """The first command that many will type, on a fresh machine: what is missing, and the command that gets it."""
    done = launched(str(ROOT / "train.py"), "--model", "msdm", ranks=2, cwd=tmp_path)
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip("=- ")]
    told = [line for line in lines if line.startswith("train.py: ")]
    assert done.returncode == 1 and len(told) == 1 and not list(tmp_path.iterdir())
    assert told[0].startswith("train.py: openai/clip-vit-large-patch14 was not found at ")
    assert told[0].endswith("--local-dir weights/openai/clip-vit-large-patch14")
    assert lines[-1] == f"traceback : {told[0]}"
    assert "<NO_OTHER_FAILURES>" in lines  # the others are no failures, whatever their number
    assert "closing signal" not in done.stderr  # and have left by themselves


def test_a_full_disk_and_too_little_memory_are_the_machines(capsys):
    for error, told in ((OSError(28, "No space left on device", "runs/a"), "runs/a: No space left on device"),
                        (torch.OutOfMemoryError("CUDA out of memory."), "not enough memory: lower --batch or --size"),
                        (MemoryError(), "not enough memory: lower --batch or --size")):  # fmt: skip
        assert flags.understood(error) == (5, told)
    for bug in (ValueError("x"), RuntimeError("x"), OSError("x")):
        assert flags.understood(bug)[0] is None


def test_a_rank_that_refuses_alone_still_ends(monkeypatch, capsys, tmp_path):
    """It is silent, waits for the launcher, which may end it, and then leaves the reason in the error file."""
    import json

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    ended, handlers = [], {}
    monkeypatch.setattr(flags.signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(flags.os, "_exit", ended.append)
    flags.refuse("no")
    handlers[flags.signal.SIGTERM](flags.signal.SIGTERM, None)
    assert ended == [0]
    assert capsys.readouterr().err == ""
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"].endswith(": no")
