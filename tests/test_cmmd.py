"""CMMD against its formula written out, and its CLIP against transformers, from pixels to embeddings."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from conftest import close
from safetensors.torch import load_file

from nanomed.evaluation import extractors
from nanomed.metrics import entries, scores, uncertainty
from nanomed.text.clip_vision import MEAN, STD

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28,
             patch_size=14)  # fmt: skip


def embeddings(n: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, 48, generator=torch.Generator().manual_seed(seed)) + shift


def by_hand(a: np.ndarray, b: np.ndarray) -> float:
    """1000 (E k(x, x') + E k(y, y') - 2 E k(x, y)) over all pairs, k = exp(-|x - y|^2 / 200), of directions."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))

    def mean(x: np.ndarray, y: np.ndarray) -> float:
        return np.exp(-((x[:, None] - y[None]) ** 2).sum(-1) / (2 * 10**2)).mean()

    return 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))


@pytest.mark.parametrize("n, m", [(60, 40), (1, 7), (130, 300)])
def test_cmmd_is_its_formula(n, m, monkeypatch):
    a, b = embeddings(n, 0), 3 * embeddings(m, 1, 0.4)
    expected = by_hand(a.double().numpy(), b.double().numpy())
    assert abs(scores.cmmd(a, b) - expected) < 1e-6 * max(1, expected)
    assert abs(scores.cmmd(a.double(), b.double()) - expected) < 1e-9 * max(1, expected)


def test_cmmd_of_a_set_with_itself_is_0_and_lengths_are_nothing():
    a, b = embeddings(50, 2), embeddings(50, 3, 1.0)
    assert abs(scores.cmmd(a, a)) < 1e-6
    assert scores.cmmd(a * 7, b / 3) == pytest.approx(scores.cmmd(a, b), abs=1e-6)
    with pytest.raises(ValueError, match="image 0 are all 0"):
        scores.cmmd(torch.zeros(2, 4), torch.ones(2, 4))


def test_tiles_of_any_size_give_one_number(monkeypatch):
    a, b = embeddings(2100, 4), embeddings(1500, 5, 0.2)
    expected = by_hand_in_float64(a, b)
    assert abs(scores.cmmd(a, b) - expected) < 1e-6 * max(1, expected)


def by_hand_in_float64(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = (x.double() / x.double().norm(dim=1, keepdim=True) for x in (a, b))
    mean = [torch.exp(-torch.cdist(x, y).square() / 200).mean() for x, y in ((a, a), (b, b), (a, b))]
    return (1000 * (mean[0] + mean[1] - 2 * mean[2])).item()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of the memory from Linux")
def test_memory_does_not_grow_with_pairs():
    """20,000 x 20,000 pairs would be 3.2 GB in float64; the tiles stay within 100 MB."""
    code = """
import resource, torch
from nanomed.metrics import scores
torch.set_num_threads(1)
a, b = torch.randn(20_000, 4), torch.randn(20_000, 4)
scores.cmmd(a[:2000], b[:2000])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
scores.cmmd(a, b)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert int(grown) < 100_000


def test_its_interval_holds_the_value_and_is_the_plain_jackknife():
    """From sums by pairs of groups the same ends as from leaving every group out."""
    a, b = embeddings(80, 6), embeddings(70, 7, 0.3)
    found = entries.Measured(a, b, "CLIP", "hash").cmmd()["CMMD"]
    low, high = found["interval"]["low"], found["interval"]["high"]
    assert low <= found["value"] <= high and found["floor"]["n"] == 40
    plain = uncertainty.interval(scores.cmmd, a, b, groups=entries.KID_GROUPS)
    assert (low, high) == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_its_embeddings_are_those_of_transformers_on_the_public_resize(tmp_path, kind):
    """A whole CLIP as it is published, from uint8 images of two sizes."""
    torch.manual_seed(0)
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    config = transformers.CLIPConfig(text_config=text, vision_config=SMALL, projection_dim=24)
    reference = transformers.CLIPModel(config).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    reference.save_pretrained(tmp_path)
    if kind == "pickle":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / "openai").mkdir()
    (tmp_path / extractors.CLIP).symlink_to(tmp_path)
    ours = extractors.cmmd(str(tmp_path), 2, "cpu")
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((40, 30), (28, 28), (40, 30))]
    with torch.no_grad():
        found = ours.columns(images)["features"]
        for image, row in zip(images, found):
            x = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
            x = torch.nn.functional.interpolate(x, size=(28, 28), mode="bicubic")
            x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
            expected = reference.visual_projection(reference.vision_model(x).pooler_output)
            close(row[None], expected, 1e-5)
