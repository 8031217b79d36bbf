"""Training on images of several shapes (`--buckets`): the shapes, what an image loses, the order of samples, what SDXL
is told, and runs whose batches change their shape.
"""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import StopAfter, assert_two_train_as_one, close
from PIL import Image
from safetensors.torch import load_file

import train
from nanomed import systems
from nanomed.data import buckets, images, load
from nanomed.data.images import to_unit
from nanomed.data.table import Row
from nanomed.run import flags, runs, signals
from nanomed.run.flags import UsageError
from nanomed.run.ranks import ALONE, Ranks
from nanomed.run.signals import PREEMPTED
from nanomed.systems import sizes
from nanomed.systems.miniatures import unets as tiny
from nanomed.training import caches, plan
from nanomed.training.batches import Batches, Samples
from nanomed.training.shadow import Cost

ROOT = Path(__file__).parents[1]
SIDES = [(64, 64)] * 7 + [(90, 64)] * 5 + [(64, 110)] * 4 + [(120, 60)] * 2  # width x height of the images below


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Eighteen smooth images of four shapes, each with a sentence, in the layout `folder:DIR`."""
    root = tmp_path_factory.mktemp("several")
    for i, (width, height) in enumerate(SIDES):
        x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
        planes = [np.sin(3 * x + i), np.cos(4 * y - i), np.sin(2 * x + 3 * y + i)]
        Image.fromarray((np.stack(planes, -1) * 120 + 128).astype(np.uint8)).save(root / f"{i:02d}.png")
        (root / f"{i:02d}.txt").write_text(f"a polyp number {i}")
    return root


def rows(folder: Path) -> list[Row]:
    return [Row(path, (path.stem,)) for path in sorted(folder.glob("*.png"))]


# -------------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("size, unit", [(1024, 8), (512, 8), (512, 64), (256, 64), (256, 32), (32, 4)])
def test_shapes_have_the_area_of_the_square_and_at_most_two_to_one(size, unit):
    """Sides are multiples of the unit, no shape has more pixels than the square, so none needs more memory, and each
    but the square stands and lies. What is missing of the area is less than a step of one side, or 2 : 1 is the end."""
    table = buckets.shapes(size, unit)
    assert table[0] == (size, size) and len(set(table)) == len(table) >= 5
    assert {shape[::-1] for shape in table} == {*table}
    step = max(unit, size // 16 // unit * unit)
    for height, width in table:
        assert height % unit == width % unit == 0 and 0.5 <= height / width <= 2 and height * width <= size * size
        assert 2 * min(height, width) == max(height, width) or size * size - height * width < step * min(height, width)


def test_sdxls_own_shapes_are_among_them():
    """Those of appendix I of Podell et al. 2023 at 1,024 pixels whose ratio is at most two."""
    published = {(704, 1408), (768, 1344), (832, 1216), (896, 1152), (960, 1088), (1024, 1024)}
    table = buckets.shapes(1024, 8)
    assert {*table} == published | {shape[::-1] for shape in published}


@pytest.mark.parametrize(
    "table, ratio, most",
    [
        (buckets.shapes(1024, 8), 2, 0.09),
        (buckets.shapes(512, 64), 2, 0.13),
        (buckets.shapes(256, 32), 2, 0.13),
        (buckets.shapes(256, 64), 2, 0.23),  # Kandinsky 3: five shapes are all there are
        (sizes.trained(64), 4, 0.14),
        (sizes.trained(128), 4, 0.14),
        (sizes.standards(1024), 16 / 9, 0.14),
    ],
)
def test_no_image_loses_more_than_a_small_part_of_its_area(table, ratio, most):
    """Whatever its ratio up to that of the table's ends; no shape of the table would have kept more. What is cut off is
    cut off along one side."""
    for width in range(int(1000 / ratio) + 1, int(1000 * ratio), 7):
        place = buckets.nearest(table, width, 1000)
        kept = [1 - buckets.lost(shape, width, 1000) for shape in table]
        assert kept[place] == max(kept) >= 1 - most
        frame = buckets.frame(width, 1000, table[place])
        share = frame.height * frame.width / (frame.rows * frame.columns)
        assert share == pytest.approx(kept[place], abs=0.01)  # sides are whole pixels
        assert frame.rows == frame.height or frame.columns == frame.width  # the other side is whole


def test_an_endoscopes_image_is_nearly_whole():
    """Of 720 x 576 pixels a square of the shorter side loses 20%."""
    for table in (buckets.shapes(1024, 8), buckets.shapes(512, 8), sizes.trained(64)):
        shape = table[buckets.nearest(table, 720, 576)]
        assert buckets.lost(shape, 720, 576) < 0.03 and shape[1] > shape[0]


@pytest.mark.parametrize("augment", [False, True])
def test_a_part_is_that_of_the_scaled_image(augment, folder):
    """Scaling and cutting in one pass gives the bytes of Pillow's resize followed by a crop, within one level."""
    rng = np.random.default_rng(3)
    for width, height, shape in [(90, 64, (32, 32)), (64, 110, (40, 24)), (61, 47, (48, 64)), (300, 300, (20, 40))]:
        image = Image.fromarray(rng.integers(256, size=(height, width, 3), dtype=np.uint8))
        frame = buckets.frame(width, height, shape, rng if augment else None)
        whole = image.resize((frame.columns, frame.rows), Image.Resampling.BILINEAR)
        expected = whole.crop((frame.left, frame.top, frame.left + frame.width, frame.top + frame.height))
        out = np.asarray(buckets.taken(image, frame)).astype(int)
        assert out.shape == (*shape, 3) and np.abs(out - np.asarray(expected).astype(int)).max() <= 1
        # in a mirror it is the mirror's part
        mirrored = frame.flipped(True, False)
        again = np.asarray(buckets.taken(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), mirrored)).astype(int)
        assert np.abs(again[:, ::-1] - out).max() <= 1


def test_sides_come_from_the_header_as_the_image_is_turned(tmp_path):
    image, turned = Image.new("RGB", (30, 20)), Image.Exif()
    turned[0x0112] = 6
    image.save(tmp_path / "plain.jpg")
    image.save(tmp_path / "turned.jpg", exif=turned)
    for name, size in (("plain.jpg", (30, 20)), ("turned.jpg", (20, 30))):
        assert images.size_of(tmp_path / name) == images.open_rgb(tmp_path / name).size == size
    (tmp_path / "damaged.png").write_bytes(b"no image")
    with pytest.raises(images.DataError, match="damaged.png: not a"):
        images.size_of(tmp_path / "damaged.png")


# --------------------------------------------------------------------------------------------------------------- order


def test_every_sample_comes_once_a_pass_and_no_shape_is_dropped():
    """Buckets of 37, 8, 3 and 0 samples, eight a step: over many epochs each gives its share of the steps to within
    one, the one that cannot fill a step too; and all its samples come equally often, to within one."""
    counts, together = (37, 8, 3, 0), 8
    numbers = iter(range(sum(counts)))
    parts = [[next(numbers) for _ in range(count)] for count in counts]
    turns = buckets.Turns(parts, together, seed=1)
    epochs = 40
    steps = sum(epochs * count // together for count in counts)
    seen = []
    for step in range(steps):
        group = [turns[step * together + i] for i in range(together)]
        (which,) = {next(k for k, part in enumerate(parts) if number in part) for number in group}
        assert len(set(group)) == min(together, len(parts[which])) or counts[which] % together  # a pass may end in it
        seen.append((which, group))
    had = Counter(which for which, _ in seen)
    assert [had[which] for which in range(4)] == [epochs * count // together for count in counts]
    times = Counter(number for _, group in seen for number in group)
    for part in filter(None, parts):
        assert max(times[i] for i in part) - min(times[i] for i in part) <= 1
    assert min(times.values()) >= epochs - 3 and max(times.values()) <= epochs
    assert [which for which, _ in seen] != sorted(which for which, _ in seen)  # mixed
    other = buckets.Turns(parts, together, seed=2)
    assert [other[i] for i in range(64)] != [turns[i] for i in range(64)]


def test_fewer_images_than_a_step_has_samples_are_trained_on():
    turns = buckets.Turns([[0, 1, 2], [3]], 32, seed=0)
    assert Counter(turns[i] for i in range(32 * 4)) == {0: 32, 1: 32, 2: 32, 3: 32}


@pytest.mark.parametrize("world, batch, accumulate", [(2, 4, 1), (2, 2, 2), (4, 2, 1), (1, 2, 4), (8, 1, 1)])
def test_any_number_of_ranks_trains_on_the_same_samples(world, batch, accumulate, folder):
    """Pixels, sizes and prompts of each step, put together, are those of one process with one pass of eight; and a
    process that begins at a later step goes on with them."""
    how = Samples(32, 5, dropout=0.3, shapes=buckets.shapes(32, 4))
    one = Batches(rows(folder), how, 8)
    each = [Batches(rows(folder), how, batch, Ranks(rank, world), accumulate=accumulate) for rank in range(world)]
    for step in (0, 1, 2, 9):
        expected = one[step]
        found = [part[step * accumulate + micro] for micro in range(accumulate) for part in each]
        assert [prompt for part in found for prompt in part["prompt"]] == expected["prompt"]
        for name in ("image", "sizes"):
            assert torch.equal(torch.cat([part[name] for part in found]), expected[name])
    for each_one in (one, *each):
        each_one.close()


def test_a_batch_has_one_shape_and_says_what_its_images_were(folder):
    """The original's height and width, where the part begins in the scaled image, the part's own; flipped with a
    dropped prompt. Every pixel is the image's: no border."""
    how = Samples(32, 5, dropout=0.5, jitter=False, shapes=buckets.shapes(32, 4))
    batches, shapes = Batches(rows(folder), how, 2), set()
    files = {path.stem: Image.open(path).convert("RGB") for path in folder.glob("*.png")}
    for step in range(12):
        batch = batches[step]
        shapes.add(tuple(batch["image"].shape[2:]))
        for image, given, prompt in zip(batch["image"], batch["sizes"].tolist(), batch["prompt"]):
            high, wide, top, left, height, width = given
            assert image.shape[1:] == (height, width) and (wide, high) in SIDES
            if prompt:
                original = files[prompt]
                assert original.size == (wide, high)
                scale = max(height / high, width / wide)
                whole = original.resize((round(wide * scale), round(high * scale)), Image.Resampling.BILINEAR)
                part = np.asarray(whole.crop((left, top, left + width, top + height)))
                close(image, to_unit(part), 1.01 / 127.5)  # one level
    assert shapes == {(32, 32), (28, 36), (24, 40), (40, 24), (20, 40)} - {(24, 40)}
    batches.close()


# ------------------------------------------------------------------------------------------------- what systems make


def test_what_is_cached_is_what_is_seen_live(folder, tmp_path):
    """Moments and sizes of the middle of each image, by row; entries of other shapes are other entries."""
    torch.manual_seed(0)
    system = systems.build("sd-tiny").eval()
    config = systems.recipe("sd-tiny", "unet") | dict(
        cache=str(tmp_path), views=1, seed=3, augment=False, batch=3, dropout=0.0, accumulate=1, strategy="add",
        paraphrases="", buckets=True, places=0.0, places_first=0,
    )  # fmt: skip
    config = type("Config", (), config)
    table = load(f"folder:{folder}")
    kept = caches.batches(config, system, "unet", table, Ranks())
    made = {path.name for path in tmp_path.glob("*")}
    config.views = 0
    live = caches.batches(config, system, "unet", table, Ranks())
    shapes = set()
    for step in range(8):
        one, other = kept[step], live[step]
        assert one["prompt"] == other["prompt"] and torch.equal(one["sizes"], other["sizes"])
        with torch.inference_mode():
            close(one["moments"], system.image_moments(other["image"])["moments"], 1e-5)
        shapes.add(tuple(one["moments"].shape[2:]))
    kept.close(), live.close()
    assert len(shapes) > 2 and len(made) == 4  # one entry a shape
    config.views, config.buckets = 1, False
    squares = caches.batches(config, system, "unet", table, Ranks())
    assert squares[0]["moments"].shape[2:] == (8, 8) and "sizes" not in squares[0]
    squares.close()
    assert len({path.name for path in tmp_path.glob("*")} - made) == 1


def test_published_tables_are_used_where_there_are_any(monkeypatch):
    """PixArt's own bins at its own size, of ratios up to four; at another size shapes like everyone's."""
    system = systems.build("medart-tiny")
    assert system.bucket_shapes() == buckets.shapes(32, 4)
    for side, size in ((64, 512), (128, 1024)):
        monkeypatch.setattr(system.transformer, "config", replace(system.transformer.config, sample_size=side))
        monkeypatch.setattr(system, "size", size)
        monkeypatch.setattr(system.vae, "factor", 8, raising=False)
        table = system.bucket_shapes()
        assert len(table) == 33 and (size, size) in table and (size // 2, 2 * size) in table
        for height, width in table:  # each is drawn as it is
            assert sizes.binned(height, width, side) == (height, width)
    for height, width in sizes.standards(1024):
        assert sizes.standard(height, width) == (height, width)


def test_a_dry_run_counts_the_largest_shape(monkeypatch, capsys):
    system = systems.build("sd-tiny", random=True)
    monkeypatch.setattr(system, "bucket_shapes", lambda: ((32, 32), (28, 40), (24, 40)))
    monkeypatch.setattr(plan, "cost_of", lambda config, system, stage, card: Cost(0, 0))
    config = type("Config", (), dict(rank=0, frozen="device", precision="fp32", batch=1, accumulate=1, clip=1.0, keep=1,
                                     ema=0.0, eps=1e-8, weight_decay=0.0, steps=1, epochs=0.0, buckets=True)
                  )  # fmt: skip
    plan.dry_run(config, system, "unet", torch.device("cpu"))
    assert "--buckets: 3 shapes, counted at the largest, 28 x 40 pixels" in capsys.readouterr().out
    assert system.example("unet", 1, torch.device("cpu"))["moments"].shape == (1, 8, 7, 10)


# ---------------------------------------------------------------------------------------------------------------- runs


QUICK = ["--batch", "2", "--steps", "4", "--save_every", "4", "--score_images", "0", "--test_prompts", "",
         "--log_every", "1", "--valid", "0.2", "--buckets"]  # fmt: skip


@pytest.fixture
def run_train(monkeypatch, tmp_path_factory):
    """Run train.py in this process: run_train(folder, *words, stop_after=step) -> (exit code, run folder)."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    for name in ("sd-tiny", "kandinsky3-tiny"):
        monkeypatch.setitem(tiny.PRESETS, name, tiny.PRESETS[name] | dict(steps=2))

    def go(out: Path, *words: str, stop_after: int = 10**9) -> tuple[int, Path]:
        monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(out), "--cache", str(cache), *words])
        monkeypatch.setattr(signals, "StopSignal", StopAfter(stop_after))
        return train.main(), runs.newest(out)

    return go


def trained(run: Path) -> dict[str, torch.Tensor]:
    paths = sorted(run.glob("model/*/*.safetensors")) + sorted(run.glob("checkpoints/*-000004/*.safetensors"))
    assert len(paths) >= 5
    return {f"{path.relative_to(run)}: {name}": t for path in paths for name, t in load_file(path).items()}


def test_a_run_of_changing_shapes_resumes_to_the_last_bit(run_train, tmp_path, folder, monkeypatch):
    """The shapes of the batches change within four steps; stopped in the middle, what is learned and the optimizer's
    moments are those of a run that was not. And `--resume` without it, or with it where there was none, is refused."""
    seen = []
    forward = tiny.SDTiny.forward
    monkeypatch.setattr(tiny.SDTiny, "forward", lambda self, batch, stage, step: (
        seen.append(tuple(batch.get("moments", batch.get("image")).shape[2:])) if stage == "unet" else None,
        forward(self, batch, stage, step))[1])  # fmt: skip
    words = ["--model", "sd-tiny", "--data", f"folder:{folder}", *QUICK]
    code, straight = run_train(tmp_path / "a", *words)
    assert code == 0 and len({*seen}) >= 3, seen
    code, stopped = run_train(tmp_path / "b", *words, stop_after=4 + 2)
    assert code == PREEMPTED
    with pytest.raises(UsageError, match="buckets was True and is False now"):
        run_train(tmp_path / "b", "--resume", str(stopped), "--buckets", "false")
    code, resumed = run_train(tmp_path / "b", "--resume", "latest")
    assert code == 0 and resumed == stopped
    one, other = trained(straight), trained(resumed)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    config = json.loads((stopped / "config.json").read_text())
    del config["buckets"]  # as an older version left it
    (stopped / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="buckets was False and is True now"):
        run_train(tmp_path / "b", "--resume", str(stopped), "--buckets")


def test_no_border_is_added_where_images_keep_their_shapes(folder, tmp_path):
    """Kandinsky's black border around what is not square is for squares alone."""
    system = systems.build("kandinsky3-tiny", random=True)
    system.pad = True  # as in the published ones
    for words, padded in (["--buckets"], False), ([], True):
        words = ["--model", "kandinsky3-tiny", "--data", f"folder:{folder}", "--cache", str(tmp_path), *words]
        config = flags.parse(train.Config, words, models=flags.Models(systems.recipe, systems.options))
        tables = train.read_data(config, {}, system, ALONE)
        assert [row.pad for table in tables for row in table.rows] == [padded] * len(SIDES)


@pytest.mark.parametrize("preset", ["dit-tiny"])
def test_a_system_of_one_shape_refuses_by_name(preset, run_train, tmp_path):
    with pytest.raises(UsageError, match="--buckets: dit-tiny draws images of one shape, 32 x 32"):
        run_train(tmp_path, "--model", preset, "--data", "toy:8", "--buckets")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["sd-tiny", "medart-tiny", "msdm-tiny", "hunyuan-tiny", "kandinsky2-tiny"])
def test_two_processes_train_to_the_weights_of_one_on_several_shapes(preset, tmp_path, folder):
    """As in test_processes.py."""
    words = [*QUICK, "--data", f"folder:{folder}", "--cache", str(tmp_path / "c")]
    assert_two_train_as_one(preset, words, tmp_path)
