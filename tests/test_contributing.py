"""CONTRIBUTING.md: its three examples are run as they stand there. What a new system costs is its paper."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import close
from PIL import Image

import train
from nanomed import systems
from nanomed.adapters import lora
from nanomed.run.randomness import ImageNoise, seed_all

GUIDE = Path(__file__).parents[1] / "CONTRIBUTING.md"


def example(heading: str) -> dict:
    """The names that the code under a heading defines."""
    code = re.search(rf"^## {heading}\n.*?```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.M | re.S)[1]
    names: dict = {}
    exec(compile(code, f"CONTRIBUTING.md, {heading}", "exec"), names)
    return names | {"lines": len(code.splitlines())}


def test_a_data_set(tmp_path):
    for name in ("polyp_001.png", "instrument_002.png"):
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    load = example("A data set")["load"]
    table = load(tmp_path)
    assert [row.prompts for row in table.rows] == [("An image of a instrument.",), ("An image of a polyp.",)]
    train, valid = table.split(0.5, seed=0)
    assert len(train.rows) == len(valid.rows) == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        load(tmp_path / "empty")


def test_a_metric():
    torch.manual_seed(0)
    features = torch.randn(100, 8)
    found = example("A metric")["entry"](features)
    assert found["interval"]["low"] < found["value"] < found["interval"]["high"] and found["n_fake"] == 100


SHAPES = dict(
    text_encoder=dict(vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                      max_position_embeddings=16),
    transformer=dict(num_attention_heads=2, attention_head_dim=12, num_layers=2, sample_size=8, patch_size=2,
                     caption_channels=16, interpolation_scale=1.0),
    vae=dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4),
)  # fmt: skip


def test_a_system_in_less_than_sixty_lines_trains_is_saved_read_and_draws(tmp_path):
    """Two steps of everything and of an adapter; then what is read back draws the same images to 1e-6."""
    names = example("A system")
    assert names["lines"] < 60 + 12 + 5  # the imports are the other dozen, and what train.py asks
    torch.manual_seed(0)
    shapes = {part: dict(shape) for part, shape in SHAPES.items()}
    shapes["text_encoder"]["vocab_size"] = 600
    system = names["Small"].build(**shapes)
    params = system.trainable("all")
    optimizer = torch.optim.AdamW(params.values(), lr=1e-3)
    batch = {"image": torch.rand(2, 3, 16, 16) * 2 - 1, "prompt": ["an image of a polyp", ""]}
    before = {name: param.detach().clone() for name, param in params.items()}
    for step in range(2):
        seed_all("step", step)
        loss = system(batch, "all", step)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.isfinite(loss) and any(not torch.equal(before[name], param) for name, param in params.items())

    system.eval()
    system.save(tmp_path)
    again = names["Small"].saved(tmp_path)
    assert again.config() == system.config()
    with torch.no_grad():
        images, theirs = (s.sample(["an image of a polyp"], ImageNoise(0, [0])) for s in (system, again))
    assert images.shape == (1, 3, 16, 16) and images.min() >= 0 and images.max() <= 1
    close(theirs, images, 1e-6)

    names["Small"].adapters = {"transformer": lora.ATTENTION, "text_encoder": ("q_proj", "v_proj")}
    system.adapt("all", rank=2)
    assert sum(p.numel() for p in system.trainable("all").values()) < sum(p.numel() for p in system.parameters()) / 2
    system.save(tmp_path / "adapted")
    assert (tmp_path / "adapted" / "transformer_lora" / "adapter_config.json").is_file()


def test_a_new_system_is_a_model_of_train_py(tmp_path, monkeypatch):
    """The file and its line in `FILES`, and no more: flags, stages, caches and checkpoints are those of all."""
    names = example("A system")
    names["PRESETS"]["small"] |= SHAPES | {"text_encoder": SHAPES["text_encoder"] | dict(vocab_size=600)}
    module = types.ModuleType("nanomed.systems.small")
    module.__dict__.update(names)
    monkeypatch.setitem(sys.modules, "nanomed.systems.small", module)
    monkeypatch.setitem(systems.FILES, "small", "small.Small")
    words = ["--model", "small", "--data", "toy:12", "--steps", "2", "--save_every", "2", "--score_images", "0"]
    places = ["--out", str(tmp_path / "runs"), "--cache", str(tmp_path / "cache")]
    monkeypatch.setattr(sys, "argv", ["train.py", *words, *places])
    assert train.main() == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "model" / "transformer").is_dir() and (run / "report.html").is_file()


def test_every_preset_can_be_built_from_its_table_alone():
    """Of published parts the shapes; nothing is read, and no memory is taken until something is written."""
    for preset in systems.FILES:
        system = systems.build(preset, random=True, dtype=torch.bfloat16)
        assert [name for name, _ in system.named_children()] == list(type(system).parts)
        assert set(system.config()) >= {"system", "base", *type(system).settings()}
