"""sample.py: image i depends on (seed, i) alone, every text is encoded once, and nothing stops it for good."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import nanomed
from nanomed import drawing, systems
from nanomed.data import grammar, prompts
from nanomed.data.prompts import read_rows
from nanomed.data.table import DataError
from nanomed.run import files, flags
from nanomed.run.flags import UsageError
from nanomed.run.randomness import ImageNoise

ROOT = Path(__file__).parents[1]
PROMPTS = grammar.all_prompts()[:7] * 2  # 14 rows, 7 texts


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny system with random weights everywhere, saved as train.py saves one."""
    torch.manual_seed(0)
    system = systems.build("msdm-tiny")
    with torch.no_grad():
        for p in system.parameters():
            p.add_(0.02 * torch.randn_like(p))
    folder = tmp_path_factory.mktemp("model")
    system.save(folder)
    return folder


@pytest.fixture
def draw(model):
    def go(out: Path, prompts=PROMPTS, **settings) -> dict[str, bytes]:
        torch.set_num_threads(1)
        how = drawing.Drawing(out=str(out), **({"batch": 4, "steps": 2} | settings))
        drawing.draw(nanomed.load(model), prompts, how)
        return images(out)

    return go


def images(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.png"))}


def test_one_png_a_row_with_a_manifest_that_says_how(draw, tmp_path):
    drawn = draw(tmp_path / "a")
    assert list(drawn) == [f"{row:05d}.png" for row in range(14)]
    lines = [json.loads(line) for line in (tmp_path / "a" / "manifest.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS
    assert {"seed", "steps", "guidance", "model", "sha256"} <= lines[0].keys()
    assert lines[3]["sha256"] == files.sha256(tmp_path / "a" / "00003.png")
    image = Image.open(tmp_path / "a" / "00000.png")
    assert image.mode == "RGB" and image.size == (32, 32) and not image.info
    assert len(set(drawn.values())) == 14  # the same text in two rows gives two images


def test_stopped_anywhere_and_started_again_it_is_the_same_set(draw, tmp_path):
    whole = draw(tmp_path / "a")
    again = draw(tmp_path / "b")
    assert again == whole
    rng = random.Random(0)
    for name in rng.sample(sorted(whole), 5):
        (tmp_path / "b" / name).unlink()
    torn = tmp_path / "b" / "00013.png"
    torn.write_bytes(whole["00013.png"][:100])
    assert draw(tmp_path / "b") == whole


def test_across_batch_sizes_an_image_moves_by_rounding_at_most(draw, tmp_path):
    pixels = {}
    for batch in (1, 3, 8):
        draw(tmp_path / str(batch), batch=batch)
        pixels[batch] = np.stack([np.asarray(Image.open(p)) for p in sorted((tmp_path / str(batch)).glob("*.png"))])
    for batch in (3, 8):
        assert np.abs(pixels[1].astype(int) - pixels[batch].astype(int)).max() <= 1


def test_an_image_does_not_depend_on_the_rows_around_it(draw, tmp_path):
    """The first five rows alone, the last batch short: the same bytes as in the long file."""
    long, short = draw(tmp_path / "a"), draw(tmp_path / "b", prompts=PROMPTS[:5])
    assert {name: long[name] for name in short if name != "00004.png"} == {
        name: data for name, data in short.items() if name != "00004.png"
    }


def test_every_distinct_text_is_encoded_once(model, tmp_path, monkeypatch):
    """5,000 rows with 260 texts encode 260 texts, and the empty one."""
    texts = grammar.all_prompts()[:260]
    prompts = [texts[i % 260] for i in range(5000)]
    system, seen = nanomed.load(model), []
    encode = system.encode_text
    monkeypatch.setattr(system, "encode_text", lambda batch: seen.extend(batch) or encode(batch))
    monkeypatch.setattr(system, "sample", lambda prompts, noise, *a, **k: (
        system.encode_text(prompts), system.encode_text([""] * len(prompts)), torch.zeros(len(prompts), 3, 8, 8)
    )[2])  # fmt: skip
    monkeypatch.setattr(files, "write_png", lambda path, image: path.write_bytes(b""))
    monkeypatch.setattr(drawing, "whole", lambda path: path.is_file())
    how = drawing.Drawing(out=str(tmp_path), batch=250)
    drawing.draw(system, prompts, how)
    assert len(seen) == 261 and set(seen) == {*texts, ""}


def test_other_settings_are_not_mixed_into_a_folder(draw, tmp_path):
    draw(tmp_path, prompts=PROMPTS[:2])
    with pytest.raises(UsageError, match=r"other settings \(seed\)"):
        draw(tmp_path, prompts=PROMPTS[:2], seed=1)
    (tmp_path / "x").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "x" / "holiday.png")
    with pytest.raises(UsageError, match="did not draw"):
        draw(tmp_path / "x", prompts=PROMPTS[:2])


def test_files_of_others_are_left_alone(draw, tmp_path):
    """A zip, a manifest and a settings.json that sample.py did not write stay as they are."""
    (tmp_path / "a.zip").write_bytes(b"mine")
    with pytest.raises(UsageError, match="a.zip is there already"):
        draw(tmp_path / "a", prompts=PROMPTS[:1], zip=True)
    assert (tmp_path / "a.zip").read_bytes() == b"mine" and not (tmp_path / "a").exists()
    for name in ("manifest.jsonl", "settings.json"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("{}")
        with pytest.raises(UsageError, match="choose another --out"):
            draw(tmp_path / name, prompts=PROMPTS[:1])
        assert (tmp_path / name / name).read_text() == "{}"


def test_the_zip_is_the_same_bytes_every_time(draw, tmp_path):
    for name in ("a", "b"):
        draw(tmp_path / name, prompts=PROMPTS[:3], zip=True)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    assert zipfile.ZipFile(tmp_path / "a.zip").namelist() == ["00000.png", "00001.png", "00002.png"]


def test_guidance_steps_negative_prompts_and_minmax_change_the_image(draw, tmp_path):
    base = draw(tmp_path / "base", prompts=PROMPTS[:1])
    for i, change in enumerate(({"guidance": 2.0}, {"steps": 3}, {"negative": PROMPTS[1]}, {"minmax": True})):
        assert draw(tmp_path / str(i), prompts=PROMPTS[:1], **change) != base
    stretched = np.asarray(Image.open(tmp_path / "3" / "00000.png"))
    assert stretched.min() == 0 and stretched.max() == 255


def test_noise_belongs_to_the_image():
    """A row's first and every later draw are the same in any company."""
    alone, company = ImageNoise(7, [5]), ImageNoise(7, [1, 5, 9])
    for shape in ((4, 8, 8), (3,), (4, 8, 8)):
        assert torch.equal(alone.randn(*shape)[0], company.randn(*shape)[1])
    assert not torch.equal(ImageNoise(8, [5]).randn(4), ImageNoise(7, [5]).randn(4))


def command(model: Path, prompts: Path, out: Path, ranks: int) -> list[str]:
    head = [sys.executable] if ranks == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)
    ]  # fmt: skip
    flags = ["--model", str(model), "--prompts", str(prompts), "--out", str(out), "--batch", "4", "--steps", "2"]
    return [*head, str(ROOT / "sample.py"), *flags]


@pytest.fixture
def prompt_file(tmp_path) -> Path:
    path = tmp_path / "prompts.csv"
    path.write_text("prompt\n" + "".join(f'"{prompt}"\n' for prompt in PROMPTS * 2))
    return path


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def kill_all(out: Path) -> None:
    """kill -9 the launcher and every rank that draws into a folder: torchrun gives each rank a session of its own."""
    while True:
        rows = subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True, check=True).stdout
        found = [int(row.split()[0]) for row in rows.splitlines() if "sample.py" in row and f"{out} " in row + " "]
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def killed_until_done(model: Path, prompts: Path, out: Path, seconds: float, rng: random.Random) -> int:
    """kill -9 the launcher and its ranks at random times of a run that takes `seconds`, start again, until done."""
    hits = 0
    while True:
        process = subprocess.Popen(
            command(model, prompts, out, 2), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            process.wait(timeout=rng.uniform(0.3, 0.9) * seconds)
        except subprocess.TimeoutExpired:
            kill_all(out)
            hits += 1
        error = process.communicate()[1].decode()
        assert process.returncode in (0, -signal.SIGKILL), error[-2000:]
        if process.returncode == 0:
            return hits


def kill_often(model: Path, prompts: Path, tmp_path: Path, kills: int) -> None:
    one, two = command(model, prompts, tmp_path / "one", 1), command(model, prompts, tmp_path / "two", 2)
    subprocess.run(one, env=environment(), check=True, capture_output=True)
    start = time.monotonic()
    subprocess.run(two, env=environment(), check=True, capture_output=True)
    seconds = time.monotonic() - start
    expected, rng, hits, number = images(tmp_path / "one"), random.Random(kills), 0, 0
    assert len(expected) == 28 and images(tmp_path / "two") == expected
    while hits < kills:
        out = tmp_path / f"killed{number}"
        hits, number = hits + killed_until_done(model, prompts, out, seconds, rng), number + 1
        assert images(out) == expected and not list(out.glob(".*.tmp"))
        assert number <= 4 * kills, "the runs end before they can be killed"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_two_ranks_killed_at_random_times_give_the_bytes_of_one(model, prompt_file, tmp_path):
    """Nothing corrupt, nothing missing, nothing twice, whatever was killed. Short form: 2 kills."""
    kill_often(model, prompt_file, tmp_path, 2)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.slow
def test_two_ranks_killed_fifty_times(model, prompt_file, tmp_path):
    kill_often(model, prompt_file, tmp_path, 50)


@pytest.mark.parametrize("flags, code, message", [
    (["--prompts", "nowhere.csv"], 3, "nowhere.csv: no such file"),
    ([], 2, "say which prompts"),
    (["--prompts", "P", "--model", "weights/nothing"], 4, "weights/nothing was not found"),
    (["--prompts", "P", "--steps", "many"], 2, "--steps many"),
    (["--prompts", "P", "--precision", "fp8", "--model", "M"], 2, "choose fp32, bf16, fp16"),
])  # fmt: skip
def test_mistakes_are_one_line_and_an_exit_code(model, prompt_file, tmp_path, flags, code, message):
    words = [{"P": str(prompt_file), "M": str(model)}.get(word, word) for word in flags]
    done = subprocess.run(
        [sys.executable, str(ROOT / "sample.py"), *words, "--out", str(tmp_path / "o")],
        env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == code and message in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not images(tmp_path / "o")


# -------------------------------------------------------------------------------------- rows that decide for themselves


def drawn_from(model: Path, tmp_path: Path, text: str, out: str = "o", **settings) -> dict[str, bytes]:
    (tmp_path / "p.csv").write_text(text)
    how = drawing.Drawing(out=str(tmp_path / out), **({"batch": 2, "steps": 2} | settings))
    drawing.draw(nanomed.load(model), read_rows(tmp_path / "p.csv"), how)
    return images(tmp_path / out)


def test_per_prompt_is_every_row_so_many_times(model, draw, tmp_path):
    texts = PROMPTS[:3]
    twice = draw(tmp_path / "a", prompts=[text for text in texts for _ in range(2)])
    assert draw(tmp_path / "b", prompts=texts, per_prompt=2) == twice and len(set(twice.values())) == 6
    lines = [json.loads(line) for line in (tmp_path / "b" / "manifest.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [text for text in texts for _ in range(2)]
    with pytest.raises(UsageError, match="other settings"):
        draw(tmp_path / "b", prompts=texts, per_prompt=3)


def test_columns_decide_row_by_row(model, tmp_path):
    """Each row gives what the flags would give for it alone; empty cells leave it to the flags."""
    rows = [("", "", "", "", "", ""), ("5", "2.5", "", "3", "", "named"), ("", "", "text", "", "64", ""),
            ("5", "", "", "", "", "again.png"), ("", "2.5", "", "3", "", "")]  # fmt: skip
    text = "prompt,seed,guidance,negative,steps,size,file\n" + "".join(f"{PROMPTS[0]},{','.join(r)}\n" for r in rows)
    found = drawn_from(model, tmp_path, text)
    assert sorted(found) == ["00000.png", "00002.png", "00004.png", "again.png", "named.png"]

    def alone(row: int, **flags) -> bytes:  # the row at its place in a file without columns
        out = f"alone{row}"
        how = drawing.Drawing(out=str(tmp_path / out), **({"batch": 2, "steps": 2} | flags))
        drawing.draw(nanomed.load(model), [PROMPTS[0]] * (row + 1), how)
        return images(tmp_path / out)[f"{row:05d}.png"]

    pixels = {name: np.asarray(Image.open(tmp_path / "o" / name)).astype(int) for name in found}
    expected = {
        "00000.png": alone(0), "named.png": None, "00002.png": alone(2, negative="text", size=64),
        "00004.png": alone(4, guidance=2.5, steps=3),
    }  # fmt: skip
    drawing.draw(nanomed.load(model), [PROMPTS[0]],
                 drawing.Drawing(out=str(tmp_path / "n"), batch=2, steps=3, seed=5, guidance=2.5))  # fmt: skip
    expected["named.png"] = images(tmp_path / "n")["00000.png"]  # a named seed: its first image, wherever the row is
    for name, data in expected.items():
        (tmp_path / "x.png").write_bytes(data)
        assert np.abs(np.asarray(Image.open(tmp_path / "x.png")).astype(int) - pixels[name]).max() <= 1, name
    assert pixels["00002.png"].shape == (64, 64, 3)
    lines = {line["file"]: line for line in
             map(json.loads, (tmp_path / "o" / "manifest.jsonl").read_text().splitlines())}  # fmt: skip
    assert (lines["named.png"]["seed"], lines["named.png"]["guidance"], lines["named.png"]["steps"]) == (5, 2.5, 3)
    assert lines["00002.png"]["size"] == 64 and lines["00002.png"]["negative"] == "text"
    assert lines["00000.png"]["size"] == 32 and lines["00000.png"]["seed"] == 0
    with pytest.raises(UsageError, match="other settings"):
        drawn_from(model, tmp_path, text.replace("2.5", "3.5"))


def test_a_named_seed_gives_the_same_image_wherever_its_row_is(model, tmp_path):
    first = drawn_from(model, tmp_path, f"prompt,seed,file\n{PROMPTS[0]},9,a\n{PROMPTS[1]},,b\n", "1", batch=1)
    second = drawn_from(model, tmp_path, f"prompt,file,seed\n{PROMPTS[1]},b,\n{PROMPTS[0]},a,9\n", "2", batch=1)
    assert first["a.png"] == second["a.png"] and first["b.png"] != second["b.png"]
    four = drawn_from(model, tmp_path, f"prompt,seed,file\n{PROMPTS[0]},9,a\n", "3", batch=1, per_prompt=3)
    assert sorted(four) == ["a-0.png", "a-1.png", "a-2.png"] and len(set(four.values())) == 3
    assert four["a-0.png"] == first["a.png"]


@pytest.mark.parametrize("column, cell", [
    ("seed", "1.5"), ("seed", "x"), ("steps", "0"), ("steps", "-1"), ("size", "0"), ("guidance", "nan"),
    ("guidance", "much"), ("file", "../a"), ("file", "a/b"), ("file", "CON"), ("file", ".hidden"), ("file", "a:b"),
    ("seed", "\u0663"), ("file", "x" * 300), ("seed", "-1"), ("guidance", "1e300"), ("guidance", "-4"),
    ("size", "99999999999999968"), ("file", "com\u00b9.txt"), ("file", "conin$"),
])  # fmt: skip
def test_cells_out_of_range_are_named_with_their_row(model, tmp_path, column, cell):
    with pytest.raises(DataError, match=rf"p\.csv:3: {column} is"):
        drawn_from(model, tmp_path, f"prompt,{column}\na,\nb,{cell}\n")
    assert not (tmp_path / "o").exists()


def test_a_cell_has_the_range_of_its_flag():
    for name, (kind, limits) in prompts.RANGES.items():
        of = drawing.Drawing.__annotations__[name]
        assert (flags.kind_of(of), flags.range_of(of)) == (kind, limits), name


@pytest.mark.parametrize("one, other", [("x", "X.png"), ("\u00e9", "e\u0301")])  # the same to Windows, and to macOS
def test_two_images_of_one_name_are_refused(model, tmp_path, one, other):
    with pytest.raises(UsageError, match="would both be"):
        drawn_from(model, tmp_path, f"prompt,file\na,{one}\nb,{other}\n")
    assert not (tmp_path / "o").exists()
