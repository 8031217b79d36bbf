"""The page of a run: one file, drawn from the run's own, that never costs the run anything."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

import train
from nanomed.run import files, runs
from nanomed.run.flags import UsageError
from nanomed.run.ranks import ALONE
from nanomed.training import page

EVIL = '<script>alert("x")</script>&\u202e'


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder by hand: 30 grids, a step made twice, a line cut short, hostile texts."""
    folder = tmp_path / "run"
    config = {"model": "m", "data": EVIL, "given": ["model", "data", "lr"], "lr": 0.25, "environment": {"torch": "9.9"}}
    files.write_json(folder / "config.json", config)
    plan = {"unet": {"steps": 1000, "images": 8}}
    files.write_json(folder / "state.json", {"status": "running", "stages": [], "plan": plan})
    lines = [{"stage": "unet", "step": s, "loss": 1000.0 / s, "grad_norm": 2.0, "lr": 1e-4, "skipped": int(s == 500),
              "images_per_second": 4.0, "memory_gb": 1.5} for s in (10, 500, 700, 500)]  # fmt: skip
    lines[2]["loss"] = None
    lines += [{"stage": "unet", "step": 500, "valid_loss": 3.0}, {"stage": "unet", "step": 500, "note": EVIL}]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"stage": "un')
    for step in range(30):
        files.write_png(folder / "samples" / f"unet-step-{step:06d}.png", torch.zeros(8, 8, 3, dtype=torch.uint8))
    return folder


def test_it_is_one_file_and_every_text_is_escaped(run):
    text = page.write(run).read_text(encoding="utf-8")
    assert "<script" not in text and text.count("&lt;script&gt;") >= 3  # the lead, the settings, the note
    assert set(re.findall(r"\b(?:src|href)=(.{24})", text)) == {'"data:image/jpeg;base64,'} and "url(" not in text
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_it_shows_curves_grids_pace_settings_and_notes(run):
    text = page.write(run).read_text(encoding="utf-8")
    assert text.count("<img") == 12 and "step 0<" in text and "step 29<" in text  # of 30, evenly, both ends
    assert {"loss", "grad_norm", "lr"} == set(re.findall(r'img" aria-label="(\w+)"><', text))
    assert text.count('class="raw"') == text.count('class="smooth"') == 3 and text.count('class="seen"') == 1
    assert "17 min left" in text  # 500 steps of 8 images at 4 a second: 1,000 s
    assert "the loss was not finite" in text and "1 broken steps skipped" in text
    assert "0.25" in text and "torch 9.9" in text and "Results of the test" not in text
    files.write_json(run / "test" / "results.json", {"fid": {"value": 12.5, "n_fake": 7, "protocol": EVIL}})
    text = page.write(run).read_text(encoding="utf-8")
    assert "12.5 (N = 7, &lt;script" in text and "<script" not in text


def test_a_step_made_twice_counts_once_and_a_long_curve_keeps_its_peaks():
    lines = [{"stage": "s", "step": step, "loss": value} for step, value in ((1, 5.0), (2, 6.0), (1, 7.0))]
    assert page.curves(lines) == {"loss": [(1, 7.0), (2, 6.0)]}
    points = [(step, 99.0 if step == 5003 else -3.0 if step == 777 else 1.0) for step in range(10_000)]
    thin = page.extremes(points)
    assert len(thin) <= page.POINTS + 2 and {(5003, 99.0), (777, -3.0)} <= set(thin) and thin == sorted(thin)
    assert page.smoothed([2.0] * 100) == pytest.approx([2.0] * 100)  # no bias towards zero at the start


@pytest.mark.parametrize("values", [[0.0], [-1.0, 2.0], [3.0], [3.0] * 9, [1e-300, 1e300], [0.0, 0.0]])
def test_any_finite_values_can_be_drawn(run, values):
    lines = [{"stage": "unet", "step": step, "loss": value} for step, value in enumerate(values)]
    (run / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    text = page.write(run).read_text(encoding="utf-8")
    assert "<svg" in text and not re.search(r'"[^"]*\b(nan|inf)\b[^"]*"', text)


def test_a_run_that_has_done_nothing_yet_has_a_page(run):
    (run / "log.jsonl").unlink()
    assert "step 0 of 1,000" in page.write(run).read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_is_said_once_and_stops_nothing(run, capsys):
    (run / "state.json").write_text('{"status": "running", "stages": []}')
    opened = runs.Run(run, ALONE)
    (run / "log.jsonl").write_text('{"stage": "unet", "step": 1, "changed": 5}')  # not what a run writes
    page.keep(opened)
    page.keep(opened)
    assert (capsys.readouterr().out.count("cannot be written")) == 1


def test_neither_report_writes_over_the_other(run):
    """evaluate.py --out RUN is refused by name, and a file of somebody else's stays as it is."""
    page.write(run)
    page.write(run)  # over its own it may
    with pytest.raises(UsageError, match=r"report\.html is there already"):
        files.expect_own(run / page.NAME)
    (run / page.NAME).write_text("mine")
    with pytest.raises(FileExistsError):
        page.write(run)
    assert (run / page.NAME).read_text() == "mine"


def test_a_training_names_its_page_and_renews_it_to_the_end(tmp_path, monkeypatch, capsys):
    statuses, write = [], page.write

    def watched(folder):
        statuses.append(json.loads((folder / "state.json").read_text())["status"])
        return write(folder)

    monkeypatch.setattr(page, "write", watched)
    words = ["--model", "msdm-tiny", "--data", "toy:24", "--batch", "4", "--steps", "4", "--save_every", "2",
             "--score_images", "0", "--test_prompts", "", "--log_every", "1"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train.py", *words, "--out", str(tmp_path), "--cache", str(tmp_path / "cache")])
    torch.set_num_threads(1)
    assert train.main() == 0
    (found,) = tmp_path.glob(f"*/{page.NAME}")
    said = capsys.readouterr().out
    assert f"its page: {found}" in said and "cannot be written" not in said
    assert statuses == ["running"] * 7 + ["done"]  # the start; of two stages the start and two checkpoints
    text = found.read_text(encoding="utf-8")
    assert text.count("<img") == 4 and text.count("finished") == 2 and "done, as of" in text and "step 4 of 4" in text
    assert not list(found.parent.glob(".*.tmp"))
