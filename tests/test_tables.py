"""The tables of both papers: data that says what the papers say, commands that the scripts take, and a runner that does
each of them once, goes on where it stopped, and prints what was measured.

The scripts are replaced by small ones (`scripts`), which leave the marks that the real ones leave; one slow test runs a
row with the real ones.
"""

import dataclasses
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import evaluate
import sample
import train
from nanomed import data, systems
from nanomed.data import toy
from nanomed.data.table import DataError
from nanomed.evaluation import papers
from nanomed.evaluation.table import number
from nanomed.run import flags
from nanomed.run.flags import UsageError
from nanomed.tables import __main__ as command
from nanomed.tables import printing, running, steps
from nanomed.tables.rows import PARAMETERS
from nanomed.tables.steps import TABLES, TRAININGS, How

ROOT = Path(__file__).parents[1]
COMMON = """
import json, os, signal, sys, time
from pathlib import Path
here = Path(__file__).parent
words = sys.argv[1:]
with open(here / "calls.jsonl", "a") as file:
    file.write(json.dumps([Path(__file__).stem, *words]) + "\\n")
def said(flag, default=""):
    return words[words.index(flag) + 1] if flag in words else default
def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
broken = json.loads((here / "broken.json").read_text()) if (here / "broken.json").is_file() else {}
for word, (line, code) in broken.items():
    if any(word in other for other in words):
        print("noise"); print(line, file=sys.stderr); sys.exit(code)
"""
FAKES = {
    "train.py": """
run = Path(said("--resume") or said("--out") + f"/run-{time.time_ns()}")
write(run / "config.json", {"model": said("--model")})
write(run / "state.json", {"status": "running", "stages": []})
print("stage vae: 7 parameters train, steps 0 to 8")
print("stage unet: 1,234 parameters train, steps 0 to 8")
if (here / "slow").exists():
    def stop(number, frame):
        write(run / "state.json", {"status": "preempted", "stages": []}); sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    (here / "waiting").touch()
    time.sleep(30)
write(run / "model" / "system.json", {})
write(run / "state.json", {"status": "done", "stages": ["unet"]})
""",
    "sample.py": """
prompts = Path(said("--prompts")).read_text().splitlines()[1:]
out, png = Path(said("--out")), (here / "one.png").read_bytes()
for row, prompt in enumerate(prompts):
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{row:05d}.png").write_bytes(png)
write(out / "manifest.jsonl", "")
""",
    "evaluate.py": """
out = Path(said("--out"))
if "--fake" not in words:
    write(out / "prompts.csv", "prompt\\nGenerate an image with no polyps.\\nGenerate an image containing text.\\n")
    sys.exit(0)
number = sum(map(ord, out.name)) / 7
entry = {"protocol": "the fake one", "n_real": 1234, "n_fake": 56, "interval": {"low": number - 1, "high": number + 1,
         "level": 0.95, "method": "none"}, "floor": {"value": 3.25, "method": "none", "n": 9}}
write(out / "results.json", {"FID": entry | {"value": number}, "KID": entry | {"value": number / 1000},
                             "precision": entry | {"value": 0.5}})
""",
}


@pytest.fixture
def scripts(tmp_path) -> Path:
    """A folder with train.py, sample.py and evaluate.py that do next to nothing and write down how they were called."""
    from PIL import Image

    folder = tmp_path / "scripts"
    folder.mkdir()
    Image.new("RGB", (4, 4), (200, 90, 90)).save(folder / "one.png")
    for name, body in FAKES.items():
        (folder / name).write_text(COMMON + body)
    return folder


@pytest.fixture
def there(tmp_path, monkeypatch) -> Path:
    """The current folder, with a small data set in it."""
    monkeypatch.chdir(tmp_path)
    toy.write(tmp_path / "data", 3, 16)
    return tmp_path


def how(there: Path, **more) -> How:
    return How(**{"out": there / "out", "data": "clef:data"} | more)


def run(scripts: Path, table: str, rows: str, settings: How) -> tuple[running.Runner, list[running.Outcome], list[str]]:
    """The runner, what became of every row of the table, and what was said."""
    said: list[str] = []
    runner = running.Runner(TABLES[table], settings, said.append, scripts)
    return runner, runner.rows(steps.chosen(TABLES[table], rows)), said


def calls(scripts: Path) -> list[list[str]]:
    """What the scripts were called with since the last time this was asked."""
    log = scripts / "calls.jsonl"
    found = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    log.unlink(missing_ok=True)
    return found


def state_of(outcomes: list[running.Outcome]) -> dict[str, bool]:
    return {outcome.row.name: outcome.finished for outcome in outcomes if outcome.asked}


# ------------------------------------------------------------------------------------------------- what the tables say


def test_the_papers_numbers_are_those_that_are_known():
    """327,680 and 205,824 parameters a rank, the misprint of rank 48, 326 M and the FID of 35 at 100,000 steps: of the
    papers' numbers these are known by row, each with where it stands, and no other is made up."""
    found = {(table.name, row.name, heading): printed for table in TABLES.values() for row in table.rows
             for heading, printed in row.paper.items()}  # fmt: skip
    assert {key: printed.value for key, printed in found.items()} == {
        ("mmcp-1", "prior-4", PARAMETERS): 4 * 327_680,
        ("mmcp-1", "prior-48", PARAMETERS): 48 * 327_680 + 9,
        ("mmcp-1", "prior-128", PARAMETERS): 128 * 327_680,
        ("mmcp-2", "decoder-4", PARAMETERS): 4 * 205_824,
        ("mmcp-2", "decoder-128", PARAMETERS): 68_288_512 - 128 * 327_680,
        ("mmcp-2", "msdm", PARAMETERS): 326_000_000,
        ("mmcp-2", "msdm", "FID"): 35,
    }
    assert all("2024" in printed.source for printed in found.values())
    assert "misprint" in found["mmcp-1", "prior-48", PARAMETERS].source


def test_rows_name_trainings_that_there_are_and_every_training_has_a_use():
    used = set()
    for tiny in (False, True):
        for table in TABLES.values():
            assert len({row.name for row in table.rows}) == len(table.rows)
            for row in table.rows:
                chain = steps.shown(table, row, How(Path("out"), "DIR", tiny=tiny))
                used |= {step.name for step in chain if step.what == "train"}
                assert [step.what for step in chain if step.what != "train"] == ["prompts", "draw", "measure"]
    assert used == set(TRAININGS)


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_every_command_is_one_that_the_script_takes(name, tiny):
    """Each flag is one of the script's (of this model), each value in its range; read by the scripts' own parsers."""
    modules = {"train.py": train, "sample.py": sample, "evaluate.py": evaluate}
    settings = How(Path("out"), "DIR", tiny=tiny, other_captions="captions.csv", places=("--cache", "cache"))
    told = set()
    for row in TABLES[name].rows:
        for step in steps.shown(TABLES[name], row, settings):
            own = {"models": flags.Models(systems.recipe, systems.options)} if step.script == "train.py" else {}
            config = flags.parse(modules[step.script].Config, list(step.words), **own)
            if step.script == "evaluate.py":
                evaluate.chosen(config)
            told.add((step.what, step.folder))
            if tiny and step.what == "train":
                assert config.model.endswith("-tiny") and config.steps == 8
    assert len({folder for _, folder in told}) == len(told)  # no two steps share a folder


def test_the_ablations_differ_from_med_art_in_one_thing():
    plain = set(TRAININGS["medart"].flags)
    for row in TABLES["medart-3"].rows[1:]:
        changed = [word for word in TRAININGS[row.training].flags if word not in plain]
        assert len(changed) == 2 and changed[0] in ("--hldf_every", "--text_adapter", "--captions"), row.name


# --------------------------------------------------------------------------------------------------------- the runner


def test_it_does_everything_once_and_goes_on_where_it_stopped(there, scripts):
    _, outcomes, said = run(scripts, "mmcp-2", "decoder-4,msdm", how(there))
    first = calls(scripts)
    assert state_of(outcomes) == {"decoder-4": True, "msdm": True}
    assert [name for name, *_ in first] == ["evaluate", *["train"] * 3, "sample", "evaluate", "train", "sample",
                                            "evaluate"]  # fmt: skip
    trained = [words for name, *words in first if name == "train"]
    bases = [Path(words[words.index("--base") + 1]).parent.name for words in trained if "--base" in words]
    assert bases == ["kandinsky2-first-on-clef", "kandinsky2-prior-128-on-clef"] and "--base" not in trained[0]
    assert len(said) == len(first) and said[1].startswith(f"python {scripts}/train.py --model kandinsky2 ")

    _, outcomes, said = run(scripts, "mmcp-2", "decoder-4,msdm", how(there))
    assert all(state_of(outcomes).values()) and not calls(scripts) and not said  # all is done

    (there / "out" / "mmcp-2" / "msdm" / "results.json").unlink()
    run(scripts, "mmcp-2", "decoder-4,msdm", how(there))
    assert [name for name, *_ in calls(scripts)] == ["evaluate"]

    begun = next((there / "out" / "trained" / "msdm-on-clef").glob("run-*"))
    (begun / "state.json").write_text('{"status": "running", "stages": []}')
    (there / "out" / "drawn" / "mmcp-on-clef" / "msdm" / "manifest.jsonl").unlink()
    run(scripts, "mmcp-2", "msdm", how(there))
    again = calls(scripts)
    assert again[0] == ["train", "--resume", str(begun)] and [name for name, *_ in again] == ["train", "sample"]


def test_rows_of_several_tables_share_models_and_drawings(there, scripts):
    run(scripts, "mmcp-2", "msdm", how(there))
    calls(scripts)
    _, outcomes, _ = run(scripts, "mmcp-3", "msdm", how(there, real="single=a,multi=b"))
    made = calls(scripts)
    assert [name for name, *_ in made] == ["evaluate"] and "single=a,multi=b" in made[0]
    assert state_of(outcomes) == {"msdm": True}


def test_other_settings_of_a_measure_are_measured_anew_and_of_a_model_refused(there, scripts):
    run(scripts, "mmcp-3", "msdm", how(there))
    calls(scripts)
    run(scripts, "mmcp-3", "msdm", how(there, real="single=a"))
    assert [name for name, *_ in calls(scripts)] == ["evaluate"]
    _, outcomes, _ = run(scripts, "mmcp-3", "msdm", how(there, seed=5))
    failed = next(outcome for outcome in outcomes if outcome.asked)
    assert failed.code == 2 and "2204" in failed.error and "another --out" in failed.error and not calls(scripts)


def test_a_failed_row_is_named_and_stops_no_other(there, scripts):
    """With its last line and exit code; what several rows stand on is tried once."""
    (scripts / "broken.json").write_text(json.dumps({"kandinsky2-first": ["train.py: no weights of it", 4]}))
    _, outcomes, said = run(scripts, "mmcp-2", "decoder-4,decoder-8,msdm", how(there))
    assert state_of(outcomes) == {"decoder-4": False, "decoder-8": False, "msdm": True}
    assert [outcome.error for outcome in outcomes if outcome.error] == ["train: train.py: no weights of it"] * 2
    assert sum("kandinsky2-first" in " ".join(words) for words in calls(scripts)) == 1
    assert "decoder-4 FAILED: train: train.py: no weights of it" in said
    assert running.code_of(outcomes, "") == 4
    table = printing.publish(TABLES["mmcp-2"], outcomes, how(there))
    assert "decoder-8 failed: train: train.py: no weights of it" in table and "rank 8 (failed)" in table
    (scripts / "broken.json").write_text(json.dumps({"decoder-4-on": ["x", 3], "decoder-8-on": ["y", 5]}))
    _, outcomes, _ = run(scripts, "mmcp-2", "decoder-4,decoder-8", how(there))
    assert running.code_of(outcomes, "") == 1  # not of one kind
    (scripts / "broken.json").unlink()
    assert all(state_of(run(scripts, "mmcp-2", "decoder-4,decoder-8", how(there))[1]).values())


def test_a_stop_is_passed_on_once_and_the_next_start_resumes(there, scripts):
    (scripts / "slow").touch()

    def stop() -> None:
        while not (scripts / "waiting").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    before = signal.getsignal(signal.SIGTERM)
    runner, outcomes, _ = run(scripts, "mmcp-2", "msdm,decoder-4", how(there))
    thread.join()
    assert runner.received == "SIGTERM" and running.code_of(outcomes, runner.received) == 75
    assert signal.getsignal(signal.SIGTERM) is before and not any(outcome.error for outcome in outcomes)
    made = calls(scripts)
    assert [name for name, *_ in made] == ["evaluate", "train"]  # nothing began after it
    state = next((there / "out" / "trained").glob("*/run-*/state.json"))
    assert json.loads(state.read_text())["status"] == "preempted"
    (scripts / "slow").unlink()
    _, outcomes, _ = run(scripts, "mmcp-2", "msdm,decoder-4", how(there))
    assert calls(scripts)[0] == ["train", "--resume", str(state.parent)] and all(state_of(outcomes).values())


def test_two_that_want_one_folder_wait_for_each_other(there, scripts):
    folder = there / "out" / "trained" / "msdm-on-clef"
    folder.mkdir(parents=True)
    held = open(folder / ".lock", "ab")
    fcntl.flock(held, fcntl.LOCK_EX)
    threading.Timer(0.3, held.close).start()
    _, outcomes, said = run(scripts, "mmcp-2", "msdm", how(there))
    assert any("another process is at it" in line for line in said) and state_of(outcomes) == {"msdm": True}


def test_a_script_that_says_nothing_wrong_and_leaves_no_mark_has_failed(there, scripts):
    (scripts / "sample.py").write_text(COMMON)
    _, outcomes, _ = run(scripts, "mmcp-2", "msdm", how(there))
    failed = next(outcome for outcome in outcomes if outcome.asked)
    assert failed.code == 1 and "manifest.jsonl is not there" in failed.error


def test_what_is_had_is_not_trained(there, scripts):
    """By the name of a row or of a training, in the middle of a chain too."""
    mine = there / "mine"
    (mine / "model").mkdir(parents=True)
    for name, text in (("config.json", '{"model": "kandinsky2"}'), ("state.json", '{"status": "done", "stages": []}'),
                       ("model/system.json", "{}")):  # fmt: skip
        (mine / name).write_text(text)
    table = TABLES["mmcp-2"]
    for name, trained in (("decoder-4", 0), ("kandinsky2-prior-128", 1)):
        have = command.owned(f"{name}=mine", [table], how(there))
        _, outcomes, _ = run(scripts, "mmcp-2", "decoder-4", how(there, have=have, out=there / name))
        made = calls(scripts)
        assert sum(each == "train" for each, *_ in made) == trained and all(state_of(outcomes).values())
        assert any("mine" in words for words in made)
    for wrong, told in (("moon=mine", "with a name of"), ("msdm", "say NAME=RUN"), ("msdm=moon", "no run of train.py")):
        with pytest.raises(UsageError, match=told):
            command.owned(wrong, [table], how(there))


# --------------------------------------------------------------------------------------------------------- the printing


def test_the_printed_numbers_are_those_of_results_json(there, scripts):
    """With N, protocol, interval and floor; beside them the paper's, or a word that it is not known. Rows that were not
    asked for show what is there of them."""
    table, settings = TABLES["mmcp-2"], how(there)
    run(scripts, "mmcp-2", "decoder-4", settings)
    _, outcomes, _ = run(scripts, "mmcp-2", "msdm", settings)
    said, folder = printing.publish(table, outcomes, settings), there / "out" / "mmcp-2"
    found = json.loads((folder / "table.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == [row.name for row in table.rows]
    for name in ("decoder-4", "msdm"):
        results = json.loads((folder / name / "results.json").read_text())
        mine = rows[name]["measured"]
        assert rows[name]["state"] == "done" and mine["recall"] is None
        for heading in ("FID", "precision"):
            for key in ("value", "interval", "floor", "n_real", "n_fake", "protocol"):
                assert mine[heading][key] == results[heading][key]
        value, low, high = (number("FID", results["FID"]["value"] + more) for more in (0, -1, 1))
        assert f"| {value} ({low} to {high}) |" in said
        assert mine[PARAMETERS]["value"] == 1234
    assert rows["decoder-8"]["state"] == "not run to its end" and rows["decoder-8"]["measured"]["FID"] is None
    line = next(line for line in said.splitlines() if line.startswith("| MSDM"))
    assert "| 1,234 | 326,000,000 |" in line and "| 35 |" in line
    assert "| FID | FID | 1,234 | 56 | the fake one | 3.2500 | all |" in said
    assert "not known here" in said and (folder / "table.md").read_text() == said
    assert "oy stand-ins" not in said
    page = (folder / "table.html").read_text()
    assert page.count("data:image/jpeg") >= 4 and "http" not in page.split("</style>")[1].split("<h2>Commands")[0]
    assert "train.py --model msdm" in page


def test_the_official_table_reads_the_names_of_three_sets_and_of_one(there, scripts):
    """evaluate.py names each number's set where there are several; IS is the same of all."""
    table, results = TABLES["mmcp-3"], {"FID": 0.5, "IS": 2.5}
    of_three = {"FID [single]": 0.1, "FID [multi]": 0.2, "FID [both]": 0.3} | {f"IS [{name}]": 2.5 for name in
                ("single", "multi", "both")}  # fmt: skip
    run(scripts, "mmcp-3", "msdm", how(there))
    place = there / "out" / "mmcp-3" / "msdm" / "results.json"
    for found, wanted in ((results, [None, None, 0.5, 2.5]), (of_three, [0.1, 0.2, 0.3, 2.5])):
        about = {"protocol": "imageclef2024", "n_real": 9, "n_fake": 9}
        place.write_text(json.dumps({name: about | {"value": value} for name, value in found.items()}))
        _, outcomes, _ = run(scripts, "mmcp-3", "msdm", how(there))
        row = printing.gathered(table, outcomes, how(there))["rows"][1]
        assert [entry and entry["value"] for entry in row["measured"].values()] == wanted


def test_a_table_of_stand_ins_says_so(there, scripts, monkeypatch):
    settings = how(there, tiny=True, data="", places=("--cache", str(there / "cache")))
    _, outcomes, _ = run(scripts, "mmcp-2", "msdm", settings)
    said = printing.publish(TABLES["mmcp-2"], outcomes, settings)
    assert "Toy stand-ins: shows the machinery, not the paper's result." in said
    assert "Toy stand-ins" in (there / "out" / "mmcp-2" / "table.html").read_text()
    assert all("-tiny" in " ".join(words) for name, *words in calls(scripts) if name == "train")


# ------------------------------------------------------------------------------------------------- the command line


def test_list_names_every_table_row_and_command(capsys):
    assert command.main(["list"]) == 0
    said = capsys.readouterr().out
    for table in TABLES.values():
        assert f"{table.name}: {table.title}" in said and all(row.label in said for row in table.rows)
    assert command.main(["list", "medart-3", "--rows", "t5-dora", "--data", "kvasir:X"]) == 0
    said = capsys.readouterr().out
    assert "$ python train.py --model medart --valid 0.2 --text_adapter dora --data kvasir:X" in said
    assert said.count("    $ python ") == 4 and "not known here: the paper's" in said


@pytest.mark.parametrize("words, told", [
    ("run", "say which table"),
    ("run moon", "table moon: choose mmcp-1"),
    ("run mmcp-2", "--data clef:DIR, or --tiny"),
    ("run all --data data", "with --tiny only"),
    ("run mmcp-2 --data moon", "--data moon: no such folder"),
    ("run mmcp-2 --tiny --data data", "has data, captions and real images of its own"),
    ("run mmcp-2 --tiny --rows moon", "--rows moon: mmcp-2 has decoder-4"),
    ("run medart-3 --data data --captions moon", "--captions moon: no such file"),
    ("run mmcp-2 --tiny --seed -1", "--seed -1: out of range"),
    ("run mmcp-2 --tiny --more=\"'", "no closing quotation"),
])  # fmt: skip
def test_what_cannot_be_run_is_refused_before_anything_begins(words, told, there):
    before = set(there.rglob("*"))
    with pytest.raises(UsageError, match=told):
        command.main(words.split())
    assert set(there.rglob("*")) == before


def test_jobs_are_written_only_when_asked_and_over_none_but_ones_own(there, capsys):
    words = ["run", "mmcp-2", "--data", "clef:data", "--rows", "msdm,decoder-4", "--submit", "--sbatch=--gpus=1"]
    assert command.main(words) == 0
    files = sorted((there / "tables" / "jobs").glob("*.sh"))
    assert [file.name for file in files] == ["mmcp-2-decoder-4.sh", "mmcp-2-msdm.sh"]
    assert capsys.readouterr().out.splitlines() == [f"sbatch {file}" for file in files]
    text = files[1].read_text()
    for line in ("#SBATCH --requeue", "#SBATCH --signal=TERM@120", "#SBATCH --gpus=1", f"#SBATCH --chdir={there}"):
        assert line in text.splitlines()
    assert "python -m nanomed.tables run mmcp-2 --rows msdm --data=clef:data --seed 2204" in text
    assert command.main(words) == 0  # one's own, unchanged
    files[1].write_text("somebody's")
    with pytest.raises(UsageError, match="not as nanomed made it"):
        command.main(words)
    assert files[1].read_text() == "somebody's"


def test_a_job_that_was_stopped_queues_itself_again(there, capsys):
    """The file as it stands, by bash, with stand-ins for srun and scontrol: after 75 and after nothing else."""
    command.main(["run", "mmcp-2", "--data", "clef:data", "--rows", "msdm", "--submit"])
    job = there / "tables" / "jobs" / "mmcp-2-msdm.sh"
    tools = there / "bin"
    tools.mkdir()
    (tools / "srun").write_text('#!/bin/bash\necho "$@" > ran\nexit $CODE\n')
    (tools / "scontrol").write_text('#!/bin/bash\necho "$@" > queued\n')
    for tool in tools.iterdir():
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    for code, again in ((0, False), (4, False), (75, True)):
        (there / "queued").unlink(missing_ok=True)
        more = {"PATH": f"{tools}:{os.environ['PATH']}", "CODE": str(code), "SLURM_JOB_ID": "17"}
        assert subprocess.run(["bash", str(job)], env=os.environ | more, cwd=there).returncode == code
        assert (there / "queued").is_file() == again
    assert (there / "queued").read_text() == "requeue 17\n"
    assert (there / "ran").read_text().startswith("--ntasks=1 python -m nanomed.tables run mmcp-2 --rows msdm")


# ------------------------------------------------------------------------------------- what the scripts had to learn


def test_the_toy_world_with_classes_is_the_toy_world(tmp_path):
    plain, classed = (data.load(f"{kind}:20", tmp_path, 32) for kind in ("toy", "toyclasses"))
    assert [dataclasses.replace(row, label="") for row in classed.rows] == [*plain.rows]
    shown = {name: bool(toy.scene(number).polyps) for number, name in enumerate(row.file for row in plain.rows)}
    assert [row.label for row in classed.rows] == ["polyps" if shown[row.file] else "no polyps" for row in classed.rows]
    folder = plain.rows[0].file.parents[1]
    assert data.load(f"clefclasses:{folder}", tmp_path).rows == classed.rows
    (folder / "prompt-gt.csv").write_text(f"Prompt;Filename\nA polyp.;{plain.rows[0].file.name}\n")
    with pytest.raises(DataError, match="no prompt says how many polyps"):
        data.load(f"clefclasses:{folder}", tmp_path)


def test_a_papers_setup_takes_other_captions_and_images_of_classes(tmp_path):
    """The split and the rows stay; an image may be drawn from the class of its caption, as DiT draws, and from no other
    words."""
    spec, cache = "toyclasses:30", str(tmp_path)
    own, simple = papers.find("medart", spec, cache, 1), papers.find("medart", spec, cache, 1, "An image of {category}")
    assert own.labels == simple.labels and own.real.hashes == simple.real.hashes
    assert simple.prompts == tuple(f"An image of {label}" for label in own.labels)
    assert set(papers.find("medart", spec, cache, 1, "empty").prompts) == {""}
    fake = own.real.keep(range(len(own.prompts)))
    for words, fine in ((own.prompts, True), (own.labels, True), (("moon",) * len(own.prompts), False)):
        drawn = dataclasses.replace(fake, prompts=tuple((word,) for word in words))
        if fine:
            assert own.drawn(drawn, "x").labels == own.labels
        else:
            with pytest.raises(DataError, match="was drawn from 'moon'"):
                own.drawn(drawn, "x")
    few = own.first(4)
    assert (few.prompts, few.labels, len(few.real), few.train) == (own.prompts[:4], own.labels[:4], 4, own.train)
    with pytest.raises(UsageError, match="--captions empty: they are of the set-up of a --paper"):
        evaluate.find_sets(evaluate.Config(real="a", fake="b", captions="empty"))


def test_the_solver_steps_of_the_colour_loss_are_a_flag():
    words = ["--model", "medart-tiny", "--hldf_steps", "3"]
    config = flags.parse(train.Config, words, models=flags.Models(systems.recipe, systems.options))
    chosen = systems.chosen("medart-tiny", {name: getattr(config, name) for name in config.given})
    assert chosen == {"hldf_steps": 3}
    assert systems.build("medart-tiny", **chosen).hldf_steps == 3


@pytest.mark.slow
def test_a_real_row_from_nothing_and_again(tmp_path):
    """MSDM's stand-in by the real scripts: about a minute on one thread; the second time only the table is printed."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "nanomed.tables", "run", "mmcp-2", "--tiny", "--rows", "msdm"]
    for lines in (4, 0):
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert sum(line.startswith("python ") for line in done.stdout.splitlines()) == lines
    folder = tmp_path / "tables" / "tiny" / "mmcp-2"
    results = json.loads((folder / "msdm" / "results.json").read_text())
    row = next(row for row in json.loads((folder / "table.json").read_text())["rows"] if row["name"] == "msdm")
    assert row["measured"]["FID"]["value"] == results["toy-classifier Frechet distance"]["value"]
    assert row["measured"][PARAMETERS]["value"] > 1_000_000
