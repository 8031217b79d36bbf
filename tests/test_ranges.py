"""--range: 10, 12 and 14 bits in files of 16 come out as they were meant, by hand arithmetic; what is read without it
is what it was, to the bit; and every key of what is kept knows it."""

import json
import struct
import sys
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import train
from nanomed import data
from nanomed.data import __main__ as doctor
from nanomed.data import images, ranges
from nanomed.data.check import check, examine
from nanomed.data.table import DataError
from nanomed.evaluation import imagesets
from nanomed.run import runs
from nanomed.run.flags import UsageError
from nanomed.training import batches, caches
from nanomed.training.batches import Samples, View


def deep(folder, top, count=6, kind="png", size=32):
    """A folder of greyscale images of uint16 with values from 0 to `top`, the last image alone reaching it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["file_name,text"]
    for i in range(count):
        values = np.linspace(0, top if i == count - 1 else top / 2, size * size).round().astype(np.uint16)
        Image.fromarray(values.reshape(size, size)).save(folder / f"{i}.{kind}")
        lines.append(f"{i}.{kind},image {i}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def by_hand(values, low, high):
    """round half up of 255 (v - low) / (high - low), in whole numbers, between 0 and 255."""
    return np.array([max(0, min(255, (2 * 255 * (int(v) - low) + (high - low)) // (2 * (high - low))))
                     for v in np.ravel(values)]).reshape(np.shape(values))  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["png", "tif"])
def test_values_of_so_many_bits_become_greys_by_hand_arithmetic(tmp_path, bits, kind):
    values = np.array([[0, 1, 2, 100, 511], [512, 1000, 2**bits // 2, 2**bits - 2, 2**bits - 1]], np.uint16)
    values = np.minimum(values, 2**bits - 1)
    path = tmp_path / f"x.{kind}"
    Image.fromarray(values).save(path)
    pixels = np.asarray(images.open_rgb(path, str(bits)))
    assert (pixels == by_hand(values, 0, 2**bits - 1)[..., None]).all() and pixels.max() == 255
    window = np.asarray(images.open_rgb(path, "100:900"))  # beyond it all is black or white
    assert (window == by_hand(values, 100, 900)[..., None]).all()


def test_sixteen_bits_are_what_is_read_without_a_range(tmp_path):
    """All 65,536 values."""
    Image.fromarray(np.arange(65536, dtype=np.uint16).reshape(256, 256)).save(tmp_path / "x.png")
    plain, said = images.open_rgb(tmp_path / "x.png"), images.open_rgb(tmp_path / "x.png", "16")
    assert plain.tobytes() == said.tobytes()


def test_integers_of_32_bits_and_floats_are_read_by_it_too(tmp_path):
    hounsfield = np.array([[-1000, -160, 0, 40, 240, 3000]], np.int32)
    Image.fromarray(hounsfield).save(tmp_path / "ct.tif")
    Image.fromarray(hounsfield.astype(np.float32)).save(tmp_path / "f.tif")
    for name in ("ct.tif", "f.tif"):
        pixels = np.asarray(images.open_rgb(tmp_path / name, "-160:240"))[..., 0]
        assert pixels.tolist() == by_hand(hounsfield, -160, 240).tolist() == [[0, 0, 102, 128, 255, 255]]
        with pytest.raises(DataError, match=rf"{name}: holds -1000, which 12 bits do not hold"):
            images.open_rgb(tmp_path / name, "12")


def test_eight_bits_stay_as_they_are(tmp_path):
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(tmp_path / "x.png")
    assert images.open_rgb(tmp_path / "x.png", "12").tobytes() == images.open_rgb(tmp_path / "x.png").tobytes()


@pytest.mark.parametrize("span", ["7", "33", "12bits", "5:5", "9:5", ":", "1:", "nan:5", "0:inf", "1..2:5", "-3",
                                  "9" * 300, "\u0661\u0662", "1e3:2e3"])  # fmt: skip
def test_a_wrong_range_is_refused_with_one_line(span):
    with pytest.raises(UsageError, match="--range .*: say auto, the bits that are used") as error:
        ranges.judge(span)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_a_value_that_the_bits_cannot_hold_is_refused_by_name(tmp_path):
    folder = deep(tmp_path / "a", 4095)
    with pytest.raises(DataError, match=r"5\.png: holds 4095, which 10 bits do not hold; give --range more bits"):
        images.open_rgb(folder / "5.png", "10")


# ------------------------------------------------------------------------------------------------------------ auto


@pytest.mark.parametrize("top, bits", [(200, "8"), (255, "8"), (256, "9"), (1023, "10"), (1024, "11"), (4095, "12"),
                                       (16383, "14"), (16384, "15"), (65535, "16")])  # fmt: skip
def test_auto_is_the_smallest_power_of_two_that_holds_the_whole_set(tmp_path, top, bits):
    """Also for images that alone would need fewer bits, so that the same tissue has the same grey in all."""
    folder = deep(tmp_path / "a", top, count=3, size=8)
    table = data.load(f"folder:{folder}")
    assert ranges.of_table(table, "auto") == [bits]
    assert {row.range for row in ranges.ranged(table, [bits]).rows} == {bits}


def test_auto_of_floats_negative_values_and_mixtures(tmp_path):
    def save(name, values):
        Image.fromarray(values).save(tmp_path / name)
        return tmp_path / name

    unit = save("unit.tif", np.array([[0, 0.5, np.nan, np.inf]], np.float32))
    wide = save("wide.tif", np.array([[0, 700.5]], np.float32))
    below = save("below.tif", np.array([[-3, 5]], np.int32))
    whole = save("whole.png", np.array([[0, 900]], np.uint16))
    plain = save("plain.png", np.array([[0, 90]], np.uint8))
    nothing = save("nothing.tif", np.full((1, 2), np.nan, np.float32))
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:45])
    assert ranges.decided([unit, plain], "auto") == "0:1" and ranges.decided([unit, wide], "auto") == "10"
    assert ranges.decided([plain], "auto") == "" == ranges.decided([nothing, tmp_path / "cut.png"], "auto")
    assert ranges.decided([whole, tmp_path / "cut.png"], "auto") == "10"
    for files, told in (([below], "below.tif: holds -3"), ([whole, unit], "unit.tif holds floats and .*whole.png")):
        with pytest.raises(DataError, match=f"{told}.*LOW:HIGH"):
            ranges.decided(files, "auto")


def test_dark_images_are_warned_of_and_bright_ones_are_not(tmp_path):
    for top, said in ((1023, True), (16383, True), (30000, False), (65535, False)):
        files = sorted(deep(tmp_path / str(top), top, size=8).glob("*.png"))
        warning = ranges.dark(files)
        assert bool(warning) == said and ("--range auto" in warning) == said
    Image.new("L", (8, 8), 3).save(tmp_path / "night.png")
    assert ranges.dark([tmp_path / "night.png"]) == ""  # 8 bits say what they mean


# ------------------------------------------------------------------------------------------------------------ keys


def test_hashes_know_the_range_and_are_the_old_ones_without_it(tmp_path):
    """Of a data set, of what frozen parts make of it, and of a set to measure."""
    folder = deep(tmp_path / "a", 4095)
    Image.new("L", (8, 8), 3).save(folder / "plain.png")
    (folder / "metadata.csv").write_text((folder / "metadata.csv").read_text() + "plain.png,plain\n")
    table = data.load(f"folder:{folder}")
    ten, twelve = (ranges.ranged(table, [span]) for span in ("10", "12"))
    assert len({table.digest, ten.digest, twelve.digest}) == 3
    assert replace(twelve, rows=tuple(replace(row, range="") for row in twelve.rows)).digest == table.digest
    keys = []

    def noted(cache, key, *rest, **more):
        keys.append(json.dumps(key))

    class System:
        pad = False

        def get_submodule(self, part):
            return torch.nn.Linear(1, 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caches.Cache, "read", noted)
        patch.setattr(caches.weights, "fingerprint", lambda module: "")
        for each in (table, ten, twelve):
            caches._images("", System(), ("vae", None), each, Samples(8, 0), None)
    assert len(set(keys)) == 3 and '"12"' in keys[2] and keys[0].count("[") == keys[2].count("[")

    plain, by = imagesets.find(str(folder)), imagesets.find(str(folder), span="auto")
    deeps = [name.name != "plain.png" for name in by.sources]
    assert [a != b for a, b in zip(plain.hashes, by.hashes)] == deeps
    assert [span for span in by.ranges] == ["12" if is_one else "" for is_one in deeps]
    assert imagesets.find(f"folder:{folder}", span="auto").hashes == by.hashes
    assert plain.hashes[0] == by.hashes[0].removesuffix(" range 12")
    assert max(by.image(row).max() for row in range(6)) == 255 and plain.image(5).max() == 16
    both = imagesets.union("both", [plain, by])
    assert [both.image(row).max() for row in (5, 12)] == [16, 255] and both.keep([12]).image(0).max() == 255
    seen = [imagesets.survey(each, tmp_path / "cache") for each in (plain, by)]
    assert "byte for byte" in imagesets.mismatches(plain, seen[0], by, seen[1])[0]  # the same files, read otherwise


def test_training_sees_the_range(tmp_path):
    table = data.load(f"folder:{deep(tmp_path / 'a', 4095)}")
    row = ranges.ranged(table, ["12"]).rows[-1]
    array = batches.pixels(row, 32, 0, View(0), augment=False)
    with Image.open(row.file) as image:
        assert (array == by_hand(np.asarray(image), 0, 4095)[..., None]).all()


# --------------------------------------------------------------------------------------------------------- commands


def called(main, *words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command.py", *map(str, words)])
        return main()


TINY = ["--model", "msdm-tiny", "--stage", "vae", "--size", "32", "--steps", "1", "--batch", "2", "--score_images", "0"]


def test_a_run_decides_once_writes_it_down_and_goes_on_with_it(tmp_path, capsys):
    folder = deep(tmp_path / "a", 4000)
    words = [*TINY, "--data", f"folder:{folder}", "--out", tmp_path / "runs", "--cache", tmp_path / "cache"]
    assert called(train.main, *words, "--range", "auto") == 0
    assert "--range auto: 5 of 5 images have more than 8 bits; 0 is black and 4095 white" in capsys.readouterr().out
    run = runs.newest(tmp_path / "runs")
    config = json.loads((run / "config.json").read_text())
    assert config["range"] == "auto" and config["ranges"] == ["12"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "decided", lambda *a: pytest.fail("decided again"))
        assert called(train.main, "--resume", run, "--steps", "2") == 0
        assert called(train.main, "--resume", run, "--steps", "3", "--range", "auto") == 0
    with pytest.raises(UsageError, match="range was auto and is 14 now"):
        called(train.main, "--resume", run, "--steps", "4", "--range", "14")
    assert called(train.main, "--resume", run, "--steps", "4", "--range", "14", "--resume_anyway") == 0
    config = json.loads((run / "config.json").read_text())
    assert config["ranges"] == ["14"] and config["changes"][-1]["anyway"] == ["range"]


def test_bits_that_do_not_hold_the_values_are_refused_before_anything_is_written(tmp_path):
    folder = deep(tmp_path / "a", 4000)
    words = [*TINY, "--data", f"folder:{folder}", "--out", tmp_path / "runs", "--cache", tmp_path / "cache"]
    with pytest.raises(DataError, match=r"a/\d\.png: holds \d{4}, which 10 bits do not hold; give --range more bits"):
        called(train.main, *words, "--range", "10")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    with pytest.raises(DataError, match="which 10 bits do not hold"):
        imagesets.find(str(folder), span="10")


def test_a_run_on_dark_images_says_so(tmp_path, capsys):
    folder = deep(tmp_path / "a", 1000)
    words = [*TINY, "--data", f"folder:{folder}", "--out", tmp_path / "runs", "--cache", tmp_path / "cache"]
    assert called(train.main, *words) == 0
    told = "5 of 5 looked at have more than 8 bits and come out in greys from 0 to 4 of 255; --range auto"
    said = capsys.readouterr().out
    assert told in said or told.replace("to 4", "to 2") in said  # the brightest image may be held out
    lines = [json.loads(line) for line in (runs.newest(tmp_path / "runs") / "log.jsonl").read_text().splitlines()]
    assert sum("dark or flat images" in line.get("note", "") for line in lines) == 1


def test_evaluation_reads_both_sets_by_it_and_writes_down_that_it_did(tmp_path, capsys):
    """12-bit images against their own greys in 8 bits: equal with the range, and dark without it, which is said."""
    real, fake = deep(tmp_path / "r", 4095, count=4), tmp_path / "f"
    fake.mkdir()
    for path in real.glob("*.png"):
        images.open_rgb(path, "12").save(fake / path.name)
    notes = []
    for n, more in enumerate((["--range", "auto"], [])):
        out = tmp_path / f"out{n}"
        called(evaluate.main, "--real", real, "--fake", fake, "--out", out, "--cache", tmp_path / "cache",
               "--metrics", "colour", "--intervals", "no", *more)  # fmt: skip
        results = json.loads((out / "results.json").read_text())
        assert all(
            (results[name]["value"] == 0) == (n == 0) for name in ("colour mean distance", "colour std distance")
        )
        notes.append(capsys.readouterr().out)
    assert "scaled to 8 bit by --range 12" in notes[0] and "dark or flat images: 4 of 4" in notes[1]


def test_the_doctor_reads_by_it(tmp_path, capsys):
    folder = deep(tmp_path / "a", 4095)
    found = [finding for finding in check(str(folder))[1] if finding.what.startswith("more than 8 bits")]
    assert len(found) == 6 and all(finding.serious for finding in found) and "nearly black" in found[5].where
    assert called(doctor.main, "check", folder) == 3
    capsys.readouterr()
    called(doctor.main, "check", folder, "--range", "auto")
    said = capsys.readouterr().out
    assert "--range auto: 6 of 6 images have more than 8 bits; 0 is black and 4095 white" in said
    assert "read by --range 12" in said and "nearly black" not in said
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(7))),
        (b"IEND", b""),
    ]
    parts = (struct.pack(">I", len(x)) + kind + x + struct.pack(">I", zlib.crc32(kind + x)) for kind, x in chunks)
    (tmp_path / "colour.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    what = {finding.what for finding in examine(tmp_path / "colour.png", "12")[1]}
    assert "16 bits a colour, of which the upper 8 are read" in what
    bad = [finding for finding in check(str(folder), span="10")[1] if finding.what == "cannot be read"]
    assert len(bad) == 6 and "which 10 bits do not hold" in bad[0].where
