"""The doctor finds every planted fault, names the file, and says nothing about a healthy set."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nanomed.data import __main__, grammar, toy
from nanomed.data.check import check, counter, estimate, examine, recognise
from nanomed.data.table import DataError
from nanomed.run import flags

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
             "cut.jpg,f", "copy.png,", f"Good.PNG,{'word ' * 90}"]  # fmt: skip
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


def command(*words) -> int:
    """The command's exit code."""
    with pytest.raises(SystemExit) as ended:
        flags.main(lambda: __main__.main([str(word) for word in words]))
    return ended.value.code


def test_the_command_has_one_table_and_one_exit_code(tmp_path, sick, capsys):
    done = subprocess.run(
        [sys.executable, "-m", "nanomed.data", "check", str(sick)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 3 and "WRONG" in done.stdout and done.stderr == ""
    toy.write(tmp_path / "a", 3, 96)
    for path, code, text in ((tmp_path / "a", 0, "nothing is wrong"), (tmp_path / "x", 3, "no such")):
        assert command("check", path) == code
        assert text in "".join(capsys.readouterr())


def kinds(path, *arguments, **options) -> list[str]:
    return [finding.what for finding in check(str(path), *map(str, arguments), **options)[1]]


def test_every_line_that_cannot_be_used_is_named_not_only_the_first(tmp_path):
    toy.write(tmp_path, 4, 96)
    table = tmp_path / "prompt-gt.csv"
    whole = table.read_text().rstrip().count("\n") + 1
    with table.open("a", newline="") as file:
        file.write("a;gone-1.jpg\r\nb;gone-2.jpg\r\nc;d;e\r\nf;../out.jpg\r\n")
    read, findings = check(str(tmp_path))
    assert len(read.rows) == 4 and {finding.what for finding in findings} == {"cannot be used"}
    lines = sorted(int(finding.where.split(":")[1]) for finding in findings)
    assert lines == [whole + 1, whole + 2, whole + 3, whole + 4]


def test_a_table_that_cannot_be_read_at_all_is_a_finding(tmp_path):
    toy.write(tmp_path, 2, 96)
    (tmp_path / "prompt-gt.csv").write_text('Prompt;Filename\n"a;b\n')
    found = kinds(tmp_path)
    assert found[0] == "cannot be used" and found.count("image that no row names") == 2


def test_all_leaks_are_found_whatever_the_files_are_called(tmp_path):
    for side, seeds in (("train", range(40)), ("valid", range(25, 50))):
        folder = tmp_path / side / "polyps"
        folder.mkdir(parents=True)
        for seed in seeds:
            Image.fromarray(noise(seed)).save(folder / f"{side}{seed * 7}.{'png' if side == 'train' else 'bmp'}")
    findings = check(str(tmp_path / "train"), str(tmp_path / "valid"))[1]
    pairs = {tuple(finding.where.split(" and ")) for finding in findings}
    assert {finding.what for finding in findings} == {"in both splits"}
    assert pairs == {(f"polyps/train{seed * 7}.png", f"polyps/valid{seed * 7}.bmp") for seed in range(25, 40)}


def test_the_validation_set_is_examined_too(tmp_path):
    toy.write(tmp_path / "a", 3, 96, seed=0)
    toy.write(tmp_path / "b", 3, 96, seed=10)
    victim = next((tmp_path / "b" / "images").glob("*.jpg"))
    victim.write_bytes(victim.read_bytes()[:500])
    (finding,) = check(str(tmp_path / "a"), str(tmp_path / "b"))[1]
    assert finding.what == "cannot be read" and victim.name in finding.where


def test_classes_out_of_balance_and_torn(tmp_path):
    for label, count in (("polyps", 22), ("normal-cecum", 2)):
        (tmp_path / label).mkdir()
        for i in range(count):
            Image.fromarray(noise(i if label == "polyps" else 100 + i)).save(tmp_path / label / f"{i}.png")
    assert kinds(tmp_path) == ["classes out of balance"]
    Image.fromarray(noise(5)).save(tmp_path / "normal-cecum" / "2.png")
    assert kinds(tmp_path) == ["the same pixels in two classes"]


@pytest.mark.parametrize("name, make, what, detail", [
    ("dark.png", lambda p: Image.fromarray(noise(1)[..., 0].astype(np.uint16) * 16).save(p), "more than 8", "black"),
    ("full.png", lambda p: Image.fromarray(noise(1)[..., 0].astype(np.uint16) * 257).save(p), "more than 8", "65278"),
    ("float.tif", lambda p: Image.fromarray(noise(1)[..., 0] / np.float32(255)).save(p), "more than 8 bits", "F, 0 to"),
    ("cmyk.jpg", lambda p: Image.fromarray(noise(1)).convert("CMYK").save(p), "not plain RGB", "CMYK"),
    ("clear.png", lambda p: Image.fromarray(np.dstack([noise(1), noise(2)[..., 0]])).save(p), "not plain", "down to 0"),
    ("big.png", lambda p: Image.fromarray(np.tile(noise(1), (1, 52, 1))).save(p), "huge", "4160 x 80"),
    ("black.png", lambda p: Image.new("RGB", (80, 80)).save(p), "one color", "(0, 0, 0)"),
    ("moves.png", lambda p: Image.fromarray(noise(1)).save(p, save_all=True, append_images=[Image.fromarray(noise(2))]),
     "an animation", "2 frames"),
])  # fmt: skip
def test_what_is_odd_about_one_file(tmp_path, name, make, what, detail):
    make(tmp_path / name)
    digest, (finding,) = examine(tmp_path / name)
    assert digest and finding.what.startswith(what) and name in finding.where and detail in finding.where


def test_one_wrong_bit_in_a_png_is_found(tmp_path):
    """Stored without compression, so that every changed bit still decodes: only the checksum tells."""
    Image.fromarray(noise(0)).save(tmp_path / "a.png", compress_level=0)
    content = bytearray((tmp_path / "a.png").read_bytes())
    for place in np.random.default_rng(0).integers(100, len(content) - 20, 20):
        changed = content.copy()
        changed[place] ^= 4
        (tmp_path / "a.png").write_bytes(changed)
        digest, (finding,) = examine(tmp_path / "a.png")
        assert finding.what == "cannot be read" and not digest


def test_files_that_training_would_pass_over_in_silence(tmp_path):
    toy.write(tmp_path, 3, 96)
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "scan.gif")
    (tmp_path / "images" / "scan.dcm").write_bytes(b"DICM")
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "extra.png")
    (tmp_path / "images" / "._extra.png").write_bytes(b"finder")
    assert sorted(kinds(tmp_path)) == ["a format that is not read"] + ["image that no row names"] * 2


def test_names_that_differ_in_unicode_form_or_suffix(tmp_path):
    names = ["caf\u00e9.png", "cafe\u0301.png", "one.png", "one.jpg"]
    for i, name in enumerate(names):
        Image.fromarray(noise(i)).save(tmp_path / name)
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + "".join(f"{name},x\n" for name in names))
    assert kinds(tmp_path) == ["names that clash on some disks", "the same name with two suffixes"]


# ---------------------------------------------------------------------------------------------------------- captions


def test_tokens_are_counted_as_the_tokenizer_counts_them():
    from nanomed.text.tokenizers import ClipTokenizer

    folder = ROOT / "weights" / "msdm-tiny" / "tokenizer"
    prompts = ["", "a", *grammar.all_prompts()[:100], "  two  spaces ", "it's 12mm!", "Ärzte", "x" * 300]
    assert counter(folder)(prompts) == ClipTokenizer.from_folder(folder).lengths(prompts)


def test_the_estimate_is_within_four_of_clip_on_the_real_prompts(real_data):
    prompts = grammar.all_prompts()
    assert max(abs(a - b) for a, b in zip(estimate(prompts), counter(real_data / "clip")(prompts))) <= 4


def test_long_captions_by_estimate_and_by_count(tmp_path):
    toy.write(tmp_path, 6, 96)
    assert kinds(tmp_path, tokens=64) == []
    lengths = {finding.where.split(": ")[1] for finding in check(str(tmp_path), tokens=20)[1]}
    assert lengths and all(length.startswith("about ") for length in lengths)
    exact = kinds(tmp_path, tokens=20, count=lambda prompts: [21 if "polyp" in prompt else 20 for prompt in prompts])
    assert exact and set(exact) == {"caption that will be cut"}


# ------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("layout, kind", [
    ({"prompt-gt.csv": "Prompt;Filename"}, "clef"),
    ({"metadata.csv": "file_name,text\na,b"}, "folder"),
    ({"metadata.csv": "image_id,dx\na,b"}, "ham10000"),
    ({"metadata.csv": "Prompt;Filename\na;b", "images/a.jpg": ""}, "clef"),
    ({"metadata.jsonl": "{}"}, "folder"),
    ({"HAM10000_metadata": "image_id,dx"}, "ham10000"),
    ({"a.jpg": "", "a.txt": "x"}, "folder"),
    ({"polyps/a.jpg": "", "README.txt": "x"}, "kvasir"),
])  # fmt: skip
def test_every_layout_is_recognised(tmp_path, layout, kind):
    for name, text in layout.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert recognise(str(tmp_path)) == f"{kind}:{tmp_path}"


def test_what_the_command_prints(tmp_path, capsys):
    toy.write(tmp_path, 2, 96)
    name = "evil\x1b[2J.png"
    Image.fromarray(noise(0, 80)).save(tmp_path / "images" / name)
    assert __main__.main(["check", str(tmp_path)]) == 0  # worth a look, not serious
    out = capsys.readouterr().out
    assert "look at" in out and "\x1b" not in out and r"evil\x1b[2J.png" in out
    assert __main__.main(["check", str(tmp_path), "--tokens", "12", "--all"]) == 3
    assert capsys.readouterr().out.count("tokens, 12 fit") > 5
    assert command("check", tmp_path, "--vocab", tmp_path) == 3
    assert "tokenizer.json" in capsys.readouterr().err
    assert command("check", tmp_path, "--nonsense") == 2
    assert command("check", tmp_path / "evil\x1b[2J") == 3
    said = capsys.readouterr().err
    assert "\x1b" not in said and r"evil\x1b[2J" in said
