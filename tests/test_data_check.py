"""The doctor finds every planted fault, names the file, and says nothing about a healthy set."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nanomed.data import toy
from nanomed.data.check import check, recognise
from nanomed.data.table import DataError

ROOT = Path(__file__).parents[1]


def noise(seed: int, size: int = 80) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8)


@pytest.fixture
def sick(tmp_path) -> Path:
    """One of everything that goes wrong."""
    folder = tmp_path / "sick"
    folder.mkdir()
    for i, name in enumerate(["good.png", "turned.jpg", "deep.png", "alpha.png", "small.png", "cut.jpg", "Good.PNG",
                              "orphan.png"]):  # fmt: skip
        Image.fromarray(noise(i)).save(folder / name)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(noise(20)).save(folder / "turned.jpg", exif=exif)
    Image.fromarray(noise(21)[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(noise(22)).convert("RGBA").save(folder / "alpha.png")
    Image.fromarray(noise(23, 8)).save(folder / "small.png")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:900])
    Image.fromarray(noise(0)).save(folder / "copy.png")  # the pixels of good.png
    lines = ["file_name,text", "good.png,a", "good.png,a", "turned.jpg,b", "deep.png,c", "alpha.png,d", "small.png,e",
             "cut.jpg,f", "copy.png,", f"Good.PNG,{'word ' * 70}"]  # fmt: skip
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_every_fault_is_found_and_named(sick):
    _, findings = check(str(sick))
    found = {finding.what: finding.where for finding in findings}
    expected = {
        "cannot be read": "cut.jpg",
        "the same pixels twice": "copy.png",
        "more than 8 bits (scaled here, clipped elsewhere)": "deep.png",
        "turned by its EXIF tag (obeyed here, not everywhere)": "turned.jpg",
        "not plain RGB": "alpha.png",
        "tiny": "small.png",
        "empty caption": "copy.png",
        "caption that may be cut": "Good.PNG",
        "the same prompt twice for an image": "good.png",
        "names that clash on some disks": "Good.PNG",
        "image that no row names": "orphan.png",
    }
    for what, name in expected.items():
        assert name in found[what]


def test_a_healthy_set_is_called_healthy_and_a_leak_is_found(tmp_path):
    toy.write(tmp_path / "a", 4, 96, seed=0)
    toy.write(tmp_path / "b", 4, 96, seed=3)  # scene 3 is in both
    assert check(str(tmp_path / "a"))[1] == []
    leaks = [finding for finding in check(str(tmp_path / "a"), str(tmp_path / "b"))[1]]
    assert [finding.what for finding in leaks] == ["in both splits"]


def test_bare_folders_are_recognised(tmp_path, sick):
    (tmp_path / "clef").mkdir()
    (tmp_path / "clef" / "prompt-gt.csv").write_text("Prompt;Filename\n")
    assert recognise(str(tmp_path / "clef")).startswith("clef:") and recognise(str(sick)).startswith("folder:")
    assert recognise("toy:4") == "toy:4"
    with pytest.raises(DataError, match="no such folder"):
        recognise(str(tmp_path / "nowhere"))


def test_the_command_has_one_table_and_one_exit_code(tmp_path, sick):
    toy.write(tmp_path / "a", 3, 96)
    for path, code, text in (
        (sick, 3, "WRONG"),
        (tmp_path / "a", 0, "nothing is wrong"),
        (tmp_path / "x", 3, "no such"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "nanomed.data", "check", str(path)],
            cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == code and text in done.stdout + done.stderr
