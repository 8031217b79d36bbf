"""Three lines in a notebook: `system(prompts)` gives sample.py's pixels, `nanomed.evaluate` what results.json holds;
and the README's own examples run."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import nanomed
from nanomed.data.table import DataError
from nanomed.run import progress
from nanomed.run.flags import UsageError

ROOT = Path(__file__).parents[1]
NONE, ONE = "Generate an image with no polyps.", "Generate an image with 1 polyp."
PROMPTS = [NONE, ONE, "", NONE]


@pytest.mark.parametrize("flags, options", [
    ([], {}),
    (["--seed", "7", "--guidance", "2.5", "--negative", "text", "--size", "64"],
     dict(seed=7, guidance=2.5, negative="text", size=64)),
])  # fmt: skip
def test_a_call_draws_the_pixels_of_sample_py(untrained, tmp_path, monkeypatch, capsys, flags, options):
    import sample

    (tmp_path / "p.csv").write_text("prompt\n" + "".join(f'"{prompt}"\n' for prompt in PROMPTS))
    words = ["sample.py", "--model", str(untrained), "--prompts", str(tmp_path / "p.csv"), "--out", str(tmp_path / "o"),
             "--steps", "2", "--batch", "3", *flags]  # fmt: skip
    monkeypatch.setattr(sys, "argv", words)
    sample.main()
    system = nanomed.load(untrained)
    monkeypatch.setitem(sys.modules, "ipykernel", sys)  # by which a notebook is known
    monkeypatch.setattr(progress, "QUIET", 0.0)
    capsys.readouterr()
    images = system(PROMPTS, steps=2, batch=3, **options)
    assert "4/4" in capsys.readouterr().err  # a bar, in a notebook
    assert all(isinstance(image, Image.Image) and image.mode == "RGB" for image in images) and len(images) == 4
    for row, image in enumerate(images):
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(tmp_path / "o" / f"{row:05d}.png"))), row
    (one,) = system(PROMPTS[0], steps=2, batch=3, **options)  # a prompt alone
    assert np.array_equal(np.asarray(one), np.asarray(images[0]))
    assert "encode_text" not in vars(system)  # nothing is remembered of texts once weights may change


def test_the_same_call_trains_as_before(untrained):
    """A batch is a dict: gradients flow, under DistributedDataParallel's way of calling, too."""
    system = nanomed.load(untrained)
    system.trainable("unet")
    loss = system(system.example("unet", 2, torch.device("cpu")), "unet", 0)["loss"]
    loss.backward()
    assert any(p.grad is not None for p in system.unet.parameters())
    with pytest.raises(TypeError):
        system(PROMPTS, "unet", 0, 1, 2, 3, 4, 5)


@pytest.fixture(scope="module")
def pictures() -> dict[str, list[Image.Image]]:
    rng = np.random.default_rng(0)

    def make(shift: int) -> list[Image.Image]:
        return [Image.fromarray(rng.integers(0, 200, (20, 20, 3), dtype=np.uint8) + np.uint8(shift)) for _ in range(24)]

    return {"real": make(0), "fake": make(40)}


def test_evaluate_gives_what_results_json_holds(pictures, tmp_path, monkeypatch):
    """Of folders and of lists alike, to the last digit of what evaluate.py writes."""
    import evaluate

    monkeypatch.chdir(tmp_path)
    for name, images in pictures.items():
        (tmp_path / name).mkdir()
        for i, image in enumerate(images):
            image.save(tmp_path / name / f"{i:02d}.png")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--real", "real", "--fake", "fake", "--metrics", "colour"])
    evaluate.main()
    written = json.loads((tmp_path / "results" / "results.json").read_text())
    of_folders = nanomed.evaluate("real", tmp_path / "fake", metrics="colour")
    of_lists = nanomed.evaluate(pictures["real"], pictures["fake"], metrics="colour")
    assert of_folders == written and of_lists == written and len(written) > 3
    assert json.loads(json.dumps(of_lists)) == written
    exchanged = nanomed.evaluate("fake", "real", metrics="colour", intervals=False)  # their names say the contrary
    assert "fake does not sound real: are --real and --fake exchanged?" in exchanged.notes
    assert not [note for note in (*of_folders.notes, *of_lists.notes) if "exchanged" in note]


def test_results_are_a_table_in_print_and_in_jupyter(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = nanomed.evaluate(pictures["real"], pictures["fake"], metrics="colour", intervals=False)
    said, page = str(results), results._repr_html_()
    assert repr(results) == said and said.splitlines()[0].split()[:2] == ["metric", "value"]
    for name in results:
        assert name.split(" [")[0].split()[0] in said and name.split()[0] in page
    assert page.count("<tr>") == len(results) + 1 and "<script" not in page
    assert results.notes and results.notes[0] in said


@pytest.mark.parametrize("real, fake, metrics, kind, message", [
    ("nowhere", None, "", DataError, "nowhere: no such folder"),
    ([], None, "", UsageError, "without images"),
    ([1, 2], None, "", UsageError, "one is a int"),
    (None, None, "fidd", UsageError, "metrics fidd"),
    (None, None, "classify", UsageError, "classify"),
])  # fmt: skip
def test_mistakes_are_said(pictures, tmp_path, monkeypatch, real, fake, metrics, kind, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=message):
        nanomed.evaluate(pictures["real"] if real is None else real, pictures["fake"], metrics=metrics)


def test_the_readmes_examples_run(tmp_path, monkeypatch, capsys):
    """Every line of the section, as it stands; the folders and files that a reader has are put there."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## In a notebook\n")[1].split("\n## ")[0]
    assert len(section.strip().splitlines()) + 1 <= 15
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    (tmp_path / "real").mkdir()
    for i in range(12):
        Image.effect_noise((64, 64), 40 + i).convert("RGB").save(tmp_path / "real" / f"{i}.png")
    from nanomed.adapters import formats, lora

    unet = nanomed.load("weights/msdm-tiny").unet
    lora.inject(unet, 2, targets=[*lora.adaptable(unet)][:2])
    formats.save_diffusers("style.safetensors", {"unet": unet})
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert all(isinstance(image, Image.Image) and image.size == (64, 64) for image in scope["images"])
    assert "metric" in capsys.readouterr().out
