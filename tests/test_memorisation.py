"""Memorisation: planted copies are found, nothing is found where nothing was copied, and p-values are what they say."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy import stats
from torch import Tensor

from nanomed import weights
from nanomed.data import toy
from nanomed.metrics.features import toy_features
from nanomed.metrics.memorisation import benjamini_hochberg, examine, nearest, pixels, tail_p
from nanomed.metrics.networks import classifier

POOL = 700  # toy scenes of the default tests; the slow one draws from four thousand


def rendered(numbers: range) -> np.ndarray:
    return np.stack([toy.render(toy.scene(number), 64) for number in numbers])


@pytest.fixture(scope="module")
def world() -> np.ndarray:
    return rendered(range(POOL))


@pytest.fixture(scope="module")
def network() -> classifier.ToyClassifier:
    return classifier.load(weights.find("msdm-tiny") / "classifier.safetensors")


def seen(images: np.ndarray, network: classifier.ToyClassifier | None = None) -> dict[str, Tensor]:
    """Both spaces of a set, or its pixels alone."""
    spaces = {"pixels": pixels(images)}
    return spaces if network is None else spaces | {"toy": toy_features(network, images)}


def split(images: np.ndarray, seed: int, *sizes: int) -> list[np.ndarray]:
    order = np.random.default_rng(seed).permutation(len(images))
    return [images[part] for part in np.split(order, np.cumsum(sizes))[: len(sizes)]]


def blurred(image: np.ndarray, radius: float = 1.0) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def plant(fakes: np.ndarray, train: np.ndarray, each: int, seed: int = 0) -> tuple[np.ndarray, dict[int, int]]:
    """Fakes among which are `each` exact, blurred and flipped copies; where they are, and of which training image."""
    rng = np.random.default_rng(seed)
    places, sources = (np.sort(rng.choice(n, 3 * each, replace=False)) for n in (len(fakes), len(train)))
    fakes = fakes.copy()
    for i, (place, source) in enumerate(zip(places, sources)):
        copy = train[source]
        if each <= i < 2 * each:
            copy = blurred(copy)
        elif i >= 2 * each:
            copy = copy[:, ::-1] if i % 2 else copy[::-1]
        fakes[place] = copy
    return fakes, dict(zip(places.tolist(), sources.tolist()))


# ------------------------------------------------------------------------------------------------------------ the bar


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("without_held_out", [False, True])
def test_planted_copies_are_found_and_nothing_else_is(world, network, both, without_held_out):
    """9 copies among 150 samples, from pixels alone and with features; each with the image it was copied from."""
    net = network if both else None
    train, held_out, fakes = split(world, 0, 400, 150, 150)
    fakes, planted = plant(fakes, train, each=3)
    found = examine(seen(train, net), seen(fakes, net), None if without_held_out else seen(held_out, net))
    assert found.flagged == sorted(planted) and found.alarm
    space = found.spaces["pixels"]
    assert {place: int(space.nearest[place]) for place in planted} == planted
    assert {(pair.sample, pair.train) for pair in found.closest[:9] if pair.space == "pixels"} <= set(planted.items())
    assert all(pair.flagged == (pair.sample in planted) for pair in found.closest)
    assert found.verdict.startswith("9 of 150 samples are copies of training images (level 0.01, 150 samples, ")


@pytest.mark.parametrize("without_held_out", [False, True])
def test_held_out_images_raise_no_alarm(world, network, without_held_out):
    """Other renders of the world as samples, at the level of 0.01, from pixels alone and with features."""
    every = seen(world, network)
    for draw in range(8):
        rows = np.split(np.random.default_rng(draw).permutation(POOL), [400, 550])
        for names in (["pixels"], ["pixels", "toy"]):
            train, held_out, fakes = ({name: every[name][part] for name in names} for part in rows)
            found = examine(train, fakes, None if without_held_out else held_out)
            assert not found.alarm and found.verdict.startswith("no sign of memorisation"), (draw, found.verdict)


@pytest.mark.slow
def test_the_bar_30_copies_among_1000_and_no_alarm_in_20_draws(network):
    """10 exact, 10 blurred, 10 flipped; then 20 draws of 1,000 training, 300 held-out and 300 other images."""
    images = rendered(range(4000))
    for net in (None, network):
        for draw in range(3):
            train, held_out, fakes = split(images, draw, 1000, 300, 1000)
            fakes, planted = plant(fakes, train, each=10, seed=draw)
            found = examine(seen(train, net), seen(fakes, net), seen(held_out, net))
            assert found.flagged == sorted(planted)
        alarms = 0
        for draw in range(20):
            train, held_out, fakes = split(images, 100 + draw, 1000, 300, 300)
            for reference in (seen(held_out, net), None):
                alarms += examine(seen(train, net), seen(fakes, net), reference).alarm
        assert alarms == 0


@pytest.mark.parametrize("radius", [0.5, 1.0, 2.0])
def test_a_single_blurred_copy_is_found(world, radius):
    """One among 150, up to a Gaussian blur of a 32nd of the width."""
    train, held_out, fakes = split(world, 1, 400, 150, 150)
    fakes = fakes.copy()
    fakes[77] = blurred(train[5], radius)
    found = examine(seen(train), seen(fakes), seen(held_out))
    assert found.flagged == [77] and found.spaces["pixels"].nearest[77] == 5


def test_a_copy_is_found_in_features_alone(network, world):
    train, held_out, fakes = split(world, 2, 400, 150, 150)
    fakes = fakes.copy()
    fakes[10] = train[3]
    spaces = [{"toy": seen(images, network)["toy"]} for images in (train, fakes, held_out)]
    found = examine(*spaces)
    assert found.flagged == [10] and found.closest[0].space == "toy" and found.closest[0].train == 3


def test_images_that_are_half_a_training_image_are_near_together(world):
    """Five eighths of each sample's rows come from a training image: the whole set is nearer than chance."""
    train, held_out, fakes = split(world, 3, 300, 200, 200)
    fakes = fakes.copy()
    fakes[:, :40] = train[:200, :40]
    found = examine(seen(train), seen(fakes), seen(held_out))
    space = found.spaces["pixels"]
    assert found.alarm and found.nearer == ["pixels"] and space.p_set < 1e-6 and space.nearer > 0.65


@pytest.mark.parametrize("without_held_out", [False, True])
def test_a_set_that_is_too_near_raises_the_alarm_though_no_sample_is_a_copy(without_held_out):
    """Points of a Gaussian in ten dimensions; the samples have its law too, but each was drawn about a training point,
    not much nearer to it than neighbours are by chance."""
    train, held_out, noise = torch.randn(3, 600, 10, generator=torch.Generator().manual_seed(0))
    fakes = (train + 0.8 * noise) / (1 + 0.8**2) ** 0.5
    found = examine({"a": train}, {"a": fakes}, None if without_held_out else {"a": held_out})
    assert found.alarm and found.flagged == [] and found.nearer == ["a"]
    reference = "other training images" if without_held_out else "held-out images"
    assert found.verdict.startswith(f"no sample is a copy by itself, but together they are nearer to the training "
                                    f"images than {reference} are: in ")  # fmt: skip


def test_copies_of_an_image_that_the_training_set_holds_many_times_are_found(world):
    """What is seen often is learnt by heart first; a ratio to the second neighbour would not see it."""
    train, held_out, fakes = split(world, 4, 400, 150, 150)
    train = train.copy()
    train[:12] = train[0]
    fakes = fakes.copy()
    fakes[20] = blurred(train[0])
    assert examine(seen(train), seen(fakes), seen(held_out)).flagged == [20]


# ------------------------------------------------------------------------------------------------------- the p-values


@pytest.mark.parametrize("law", ["power", "conformal"])
def test_p_values_are_uniform_or_larger_where_nothing_is_copied(law):
    """P(p <= a) <= a down to 1e-3, far below 1 / (m + 1), over 40,000 samples: exactly under the power law of
    neighbour distances, and conformally (a >= 0.11) under any other."""
    rng = np.random.default_rng(0)
    p = []
    for _ in range(400):
        draw = (lambda n: rng.random(n) ** (1 / 7)) if law == "power" else (lambda n: rng.lognormal(size=n))
        p.append(tail_p(draw(100), draw(100))[0])
    p = np.concatenate(p)
    for level in (0.2, 0.11) if law == "conformal" else (0.2, 0.05, 0.01, 0.002, 0.001):
        spread = 5 * (level / 400) ** 0.5  # samples of a draw share its held-out images
        assert (p <= level).mean() < level + spread * 0.5 + 1e-4, level
        assert law == "conformal" or (p <= level).mean() > level / 2, level


def test_the_tail_continues_the_conformal_p_values_and_ends_at_zero():
    """Never rising, no jump at the threshold, 0 for an exact copy; D is that of the law."""
    rng = np.random.default_rng(1)
    reference = rng.random(2000) ** (1 / 12)
    values = np.linspace(0, 1.1, 500)
    p, dimension = tail_p(values, reference)
    assert p[0] == 0 and (np.diff(p) >= 0).all() and p[-1] == 1
    threshold = np.sort(reference)[100]
    near, at = tail_p(np.array([threshold * (1 - 1e-9), threshold]), reference)[0]
    assert near == pytest.approx(101 / 2001, rel=1e-6) and at == pytest.approx(102 / 2001, rel=1e-6)
    assert dimension == pytest.approx(12, rel=0.35)  # 100 excesses: a tenth is one deviation
    assert tail_p(np.array([0.5, 1.0]), np.ones(30))[0].tolist() == [0, 1]  # equally near, all of them


def test_benjamini_hochberg_equals_scipy():
    rng = np.random.default_rng(0)
    for _ in range(20):
        p = np.concatenate([rng.random(50), rng.random(5) * 1e-3])
        for level in (0.01, 0.1):
            expected = np.flatnonzero(stats.false_discovery_control(p) <= level).tolist()
            assert benjamini_hochberg(p, level) == expected
    assert benjamini_hochberg(np.array([0.5, 0.9]), 0.01) == []


# --------------------------------------------------------------------------------------------------------- neighbours


def test_neighbours_equal_brute_force_in_blocks_of_any_size(monkeypatch):
    """Features, and images under the four flips; the distance is a root mean square over pixels."""
    from nanomed.metrics import memorisation

    draw = torch.Generator().manual_seed(0)
    images, train = (255 * torch.rand(n, 3, 6, 6, generator=draw) for n in (17, 31))
    views = torch.stack([images.flip(axes) for axes in ([], [2], [3], [2, 3])])  # (4, 17, 3, 6, 6)
    full = (views[:, :, None] - train).square().flatten(3).mean(3).sqrt().amin(0).double()  # (17, 31)
    rows = (images.flatten(1)[:, None] - train.flatten(1)).square().sum(2).sqrt().double()
    for entries in (1 << 25, 100, 1):
        monkeypatch.setattr(memorisation, "_ENTRIES", entries)
        for expected, found in ((full, nearest(images, train)), (rows, nearest(images.flatten(1), train.flatten(1)))):
            index, distance, relative = found
            assert np.array_equal(index, expected.argmin(1).numpy())
            assert distance == pytest.approx(expected.amin(1).numpy(), rel=1e-5)
            yardstick = expected.sort(dim=1).values[:, 1].numpy()  # 5 % of 31 images: the second
            assert relative == pytest.approx(distance / yardstick, rel=1e-5)
        itself = (train.flatten(1)[:, None] - train.flatten(1)).square().sum(2).fill_diagonal_(torch.inf)
        index, distance, _ = nearest(train.flatten(1), train.flatten(1), itself=True)
        assert np.array_equal(index, itself.argmin(1).numpy())
        assert distance == pytest.approx(itself.amin(1).sqrt().double().numpy(), rel=1e-5)


def test_an_exact_copy_is_at_zero_even_where_features_are_large():
    """|x|^2 + |y|^2 - 2 x.y would leave rounding behind."""
    train = 1e3 + torch.randn(60, 40, generator=torch.Generator().manual_seed(0))
    index, distance, relative = nearest(train[:5].clone(), train)
    assert index.tolist() == [0, 1, 2, 3, 4] and (distance == 0).all() and (relative == 0).all()


def test_small_pixels_of_a_flipped_image_are_the_flipped_small_pixels():
    """To a grey level of rounding, at sizes that 16 does not divide; Pillow's BOX filter is not symmetric there."""
    images = np.random.default_rng(0).integers(0, 256, (3, 50, 70, 3), dtype=np.uint8)
    small = pixels(images)
    assert small.shape == (3, 3, 16, 16)
    assert (pixels(images[:, :, ::-1]) - small.flip(3)).abs().max() <= 1
    assert (pixels(images[:, ::-1]) - small.flip(2)).abs().max() <= 1
    assert pixels([]).shape == (0, 3, 16, 16) and pixels(iter(images), side=8).shape == (3, 3, 8, 8)


# --------------------------------------------------------------------------------------------------------- the report


def test_held_out_images_that_are_training_images_are_set_aside_and_named(world):
    """They would make copies look like chance."""
    train, held_out, fakes = split(world, 5, 400, 150, 150)
    held_out, fakes = held_out.copy(), fakes.copy()
    held_out[:4], fakes[0] = train[:4], train[9]
    found = examine(seen(train), seen(fakes), seen(held_out))
    assert found.spaces["pixels"].leaked == 4 and len(found.spaces["pixels"].reference_relative) == 146
    assert found.flagged == [0] and found.verdict.endswith("; 4 held-out images are training images")
    train = train.copy()
    train[1] = train[0]
    found = examine(seen(train), seen(fakes))
    assert found.left_one_out and found.verdict.endswith("; 2 training images have a double")


def test_statistics_are_plain_numbers(world):
    import json

    train, held_out, fakes = split(world, 6, 400, 150, 150)
    found = examine(seen(train), seen(fakes), seen(held_out))
    table = json.loads(json.dumps(found.statistics(), allow_nan=False))
    assert table["samples"] == 150 and table["flagged"] == [] and table["verdict"] == found.verdict
    assert table["spaces"]["pixels"].keys() == {
        "median_distance", "median_reference_distance", "nearer", "p_set", "dimension", "reference", "leaked",
    }  # fmt: skip
    space = found.spaces["pixels"]
    test = stats.mannwhitneyu(space.relative, space.reference_relative, alternative="less")
    assert table["spaces"]["pixels"]["p_set"] == test.pvalue
    pairs = (space.relative[:, None] < space.reference_relative).mean()
    assert table["spaces"]["pixels"]["nearer"] == pytest.approx(pairs, abs=1e-9)
    assert [pair.p for pair in found.closest] == sorted(pair.p for pair in found.closest) and len(found.closest) == 24


def test_sets_that_do_not_match_are_refused_in_one_line():
    x = {"a": torch.randn(40, 5), "b": torch.randn(40, 3)}
    for train, fake, held_out, said in (
        (x, {"a": x["a"]}, None, "the same spaces"),
        (x, x, {"a": x["a"]}, "the same spaces"),
        ({"a": x["a"], "b": x["b"][:30]}, x, None, "different numbers"),
        ({"a": x["a"]}, {"a": x["b"]}, None, r"samples are \(40, 3\) beside \(40, 5\)"),
        ({"a": x["a"]}, {"a": x["a"] * torch.nan}, None, "not finite"),
        ({"a": x["a"][:10]}, {"a": x["a"]}, None, "10 training images"),
        ({"a": x["a"]}, {"a": x["a"][:0]}, None, "0 samples"),
        ({"a": x["a"]}, {"a": x["a"]}, {"a": x["a"]}, "0 held-out images that are no training images"),
    ):
        with pytest.raises(ValueError, match=said):
            examine(train, fake, held_out)
