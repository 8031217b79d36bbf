"""The damage matrix: every damage grows with its strength and leaves its source alone, every judgement is as told, and
the page needs nothing from elsewhere."""

import json

import numpy as np
import pytest
import torch

from nanomed.data import toy
from nanomed.evaluation import __main__ as command
from nanomed.evaluation import damages, toyworld
from nanomed.metrics import frd, scores
from nanomed.run.flags import UsageError

SIDE = 48


@pytest.fixture(scope="module")
def sound():
    return damages.scenes(damages.FAKE, 40, SIDE)


def changed(sound, damage, strength: int) -> float:
    """Mean change of a pixel, or share of the prompts that are others."""
    found = damage(sound, strength)
    assert len(found.images) == len(found.prompts) == len(sound.images)
    assert all(x.dtype == np.uint8 and x.shape == (SIDE, SIDE, 3) for x in found.images)
    pixels = np.abs(np.stack(found.images).astype(int) - np.stack(sound.images)).mean()
    return pixels + np.mean([a != b for a, b in zip(found.prompts, sound.prompts)])


@pytest.mark.parametrize("label", damages.DAMAGES)
def test_every_damage_grows_with_its_strength_and_leaves_its_source_alone(sound, label):
    before = [x.copy() for x in sound.images]
    amounts = [changed(sound, damages.DAMAGES[label], strength) for strength in range(1, 6)]
    assert all(a <= b for a, b in zip(amounts, amounts[1:])) and 0 < amounts[1] < amounts[4]
    assert all(np.array_equal(a, b) for a, b in zip(before, sound.images))
    assert changed(sound, damages.DAMAGES[label], 3) == amounts[2]  # the same every time


def test_damages_are_what_they_are_called(sound):
    do = damages.DAMAGES
    grey = np.stack(do["grey"](sound, 5).images).astype(int)
    assert np.ptp(grey, axis=3).max() == 0
    assert all(np.array_equal(a, b) for a, b in zip(do["copies of training images"](sound, 5).images, sound.train))
    assert len({x.tobytes() for x in do["mode collapse"](sound, 5).images}) == 1
    assert len({x.tobytes() for x in do["mode collapse"](sound, 2).images}) == 10
    assert all(np.array_equal(a[:, ::-1], b) for a, b in zip(sound.images, do["flips"](sound, 5).images))
    kept = do["missing class"](sound, 5).images
    assert sum(toy.read(x)["polyp"] for x in kept) < 0.3 * sum(toy.read(x)["polyp"] for x in sound.images)


@pytest.mark.parametrize("values, said", [
    ([1.0, 1.05, 0.95, 1.0, 1.02, 1.04], "still"),
    ([1.0, 1.3, 1.6, 1.9, 2.5, 4.0], "monotone"),
    ([1.0, 1.3, 1.2, 1.9, 2.5, 4.0], "monotone"),  # a step back of 3 % of the way
    ([1.0, 2.9, 1.2, 1.9, 2.5, 4.0], "right"),
    ([1.0, 0.8, 0.6, 0.5, 0.4, 0.2], "wrong"),
    ([1.0, 2.0, 3.0, 2.0, 1.5, 1.05], "wrong"),  # there and back
])  # fmt: skip
def test_verdicts(values, said):
    assert damages.verdict(values, (0.9, 1.1), 1) == said
    assert damages.verdict([-v for v in values], (-1.1, -0.9), -1) == said


def few(real, train, fake, sound, n: int):
    """Two quick measures of them all."""
    found = damages.entries.colour_drift(*({name: values[:n] for name, values in x.items()} for x in (real, fake)))
    judged = toyworld.faithfulness(sound.images[:n], sound.prompts[:n])["prompt faithfulness"]
    return found | {"prompt faithfulness": damages.entries.share(judged, "")}


def test_the_command_writes_a_page_without_anything_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(damages, "DAMAGES", {k: damages.DAMAGES[k] for k in ("grey", "wrong prompts")})
    monkeypatch.setattr(damages, "measures", few)
    monkeypatch.setattr(frd, "features", lambda image: {"v1": np.zeros(693), "v0": np.zeros(93)})
    assert command.main(["--images", "40", "--side", "32", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "matrix.json").read_text())
    assert found["images"] == 40 and found["counts"] == [25, 40]
    cells = found["measures"]
    assert cells["saturation distance"]["grey"]["verdict"] == "monotone"
    assert cells["saturation distance"]["grey"]["clear_at"] in (25, 40)
    assert cells["prompt faithfulness"]["wrong prompts"]["verdict"] == "monotone"
    for name, cell in cells.items():  # images stayed the same, so nothing but the reader of prompts may move
        if name != "prompt faithfulness":
            assert cell["wrong prompts"]["verdict"] == "still" and cell["wrong prompts"]["clear_at"] is None, name
    page, table = (tmp_path / "matrix.html").read_text(), (tmp_path / "matrix.md").read_text()
    assert page.count("<polyline") == 2 * len(cells) and "<script" not in page and "://" not in page
    assert len(table.splitlines()) == 2 + len(cells)
    with pytest.raises(UsageError, match="--images 10: out of range, which is 40 .. 100000"):
        command.main(["--images", "10"])


def test_each_image_is_looked_at_once_and_measures_are_those_of_their_features(sound):
    eyes = damages.Eyes()
    few = sound.images[:21]
    seen = eyes.look([*few, few[0]])
    assert len(eyes.seen) == 21 and torch.equal(seen["main"][0], seen["main"][21])
    other = eyes.look(damages.scenes(damages.REAL, 21, SIDE).images)
    train, rows = eyes.look(sound.train[:21]), {name: values[:21] for name, values in seen.items()}
    found = damages.measures(other, train, rows, sound, 21)
    assert found["Frechet distance"]["value"] == scores.frechet_distance(other["main"], rows["main"])
    assert {"FRD v1", "FRD v0", "KID", "recall", "F8", "Vendi score", "prompt faithfulness"} <= found.keys()
