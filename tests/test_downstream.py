"""The downstream test: scores against scikit-learn on the same predictions; a classifier that learns and repeats."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from sklearn import metrics as sk

from nanomed.data import toy
from nanomed.metrics import downstream
from nanomed.metrics.downstream import Labelled, Recipe, auc, scores
from nanomed.metrics.networks import vit

CLOSE = 1e-6


def drawn(seed: int, n: int, classes: int, present: list[int] | None = None, digits: int | None = None):
    """Random labels and probabilities; `present` limits the labels, `digits` rounds, so that ties abound."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(present or list(range(classes)), n)
    logits = rng.normal(size=(n, classes)) + 1.5 * np.eye(classes)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return labels, probabilities if digits is None else probabilities.round(digits)


def reference(labels: np.ndarray, probabilities: np.ndarray, guess: np.ndarray) -> dict:
    """scikit-learn's numbers; AUC as the mean over the classes for which it has one."""
    classes = probabilities.shape[1]
    found = {"accuracy": sk.accuracy_score(labels, guess)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes that are guessed but absent
        found["balanced_accuracy"] = sk.balanced_accuracy_score(labels, guess)
    for average in ("macro", "weighted"):
        values = sk.precision_recall_fscore_support(labels, guess, average=average, zero_division=0)
        found |= {f"{name}_{average}": value for name, value in zip(("precision", "recall", "f1"), values)}
    there = [c for c in range(classes) if 0 < (labels == c).sum() < len(labels)]
    each = [sk.roc_auc_score(labels == c, probabilities[:, c]) for c in there]
    found["auc_macro"] = np.mean(each)
    found["auc_weighted"] = np.average(each, weights=[(labels == c).sum() for c in there])
    return found


# --------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("digits", [None, 1])
@pytest.mark.parametrize("n, classes, present", [(200, 8, None), (50, 2, None), (37, 7, [0, 2, 5]), (12, 5, [1, 3])])
def test_scores_equal_scikit_learn(n, classes, present, digits):
    """Random predictions, with ties, and with classes that no label or no prediction has."""
    for seed in range(5):
        labels, probabilities = drawn(seed, n, classes, present, digits)
        guess = probabilities.argmax(1)
        ours = scores(labels, probabilities)
        for name, value in reference(labels, probabilities, guess).items():
            assert ours[name] == pytest.approx(value, abs=CLOSE), name
        assert ours["confusion"] == sk.confusion_matrix(labels, guess, labels=range(classes)).tolist()


@pytest.mark.parametrize("average", ["macro", "weighted"])
def test_auc_equals_scikit_learn_one_against_the_rest(average):
    labels, probabilities = drawn(3, 120, 6)
    expected = sk.roc_auc_score(labels, probabilities, multi_class="ovr", average=average)
    assert scores(labels, probabilities)[f"auc_{average}"] == pytest.approx(expected, abs=CLOSE)
    labels, probabilities = drawn(4, 80, 2)
    expected = sk.roc_auc_score(labels, probabilities[:, 1])
    assert scores(labels, probabilities)[f"auc_{average}"] == pytest.approx(expected, abs=CLOSE)


def test_auc_with_ties_equals_scikit_learn():
    rng = np.random.default_rng(0)
    for levels in (1, 2, 5, 50):
        positive, values = rng.random(60) < 0.3, rng.integers(0, levels, 60) / 7
        assert auc(positive, values) == pytest.approx(sk.roc_auc_score(positive, values), abs=CLOSE)
    assert auc(np.array([True, False]), np.array([0.5, 0.5])) == 0.5


def test_each_class_equals_scikit_learn():
    labels, probabilities = drawn(1, 90, 4)
    guess = probabilities.argmax(1)
    per_class = scores(labels, probabilities)["per_class"]
    expected = sk.precision_recall_fscore_support(labels, guess, labels=range(4), zero_division=0)
    for name, values in zip(("precision", "recall", "f1", "support"), expected):
        assert [row[name] for row in per_class] == pytest.approx(list(values), abs=CLOSE)


def test_labels_of_one_class_leave_auc_undefined():
    """None, said out loud, and not a NaN or a crash; the other scores are as scikit-learn has them."""
    labels, probabilities = np.full(20, 2), drawn(0, 20, 4)[1]
    ours = scores(labels, probabilities)
    assert ours["auc_macro"] is None and ours["auc_weighted"] is None
    assert all(row["auc"] is None for row in ours["per_class"])
    guess = probabilities.argmax(1)
    assert ours["accuracy"] == ours["balanced_accuracy"] == ours["recall_weighted"] == (guess == 2).mean()
    values = sk.precision_recall_fscore_support(labels, guess, average="macro", zero_division=0)
    assert [ours["precision_macro"], ours["recall_macro"], ours["f1_macro"]] == pytest.approx(values[:3], abs=CLOSE)


def test_zero_division_is_zero_as_in_scikit_learn():
    """A class that is never guessed, and one guessed but never true."""
    labels, guess = np.array([0, 0, 1, 1]), np.array([0, 0, 2, 0])
    ours = scores(labels, np.eye(3)[guess])
    values = sk.precision_recall_fscore_support(labels, guess, average="macro", zero_division=0)
    assert [ours["precision_macro"], ours["recall_macro"], ours["f1_macro"]] == pytest.approx(values[:3], abs=CLOSE)
    assert ours["per_class"][1] | {"auc": 0} == dict(precision=0.0, recall=0.0, f1=0.0, auc=0, support=2)


def test_predictions_may_be_given():
    """A threshold of one's own, say; AUC still reads the probabilities."""
    labels, probabilities = drawn(5, 40, 3)
    guess = np.zeros(40, int)
    ours = scores(labels, probabilities, guess)
    assert ours["accuracy"] == sk.accuracy_score(labels, guess)
    assert ours["auc_macro"] == scores(labels, probabilities)["auc_macro"]


@pytest.mark.parametrize(
    "labels, probabilities, said",
    [
        ([0, 1], np.array([[0.5, 0.5], [np.nan, 0.5]]), "image 1 are not finite"),
        ([0], np.full((2, 2), 0.5), "1 labels for 2 images"),
        ([0, 2], np.full((2, 2), 0.5), "from 0 to 2, but there are 2 classes"),
        ([0, -1], np.full((2, 2), 0.5), "from -1 to 0"),
        ([0.0, 1.0], np.full((2, 2), 0.5), "whole numbers"),
        ([], np.empty((0, 2)), "N >= 1"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_one_line(labels, probabilities, said):
    with pytest.raises(ValueError, match=said):
        scores(labels, probabilities)


# ------------------------------------------------------------------------------------------------------------- training


def with_and_without_box(numbers: range) -> tuple[list[np.ndarray], list[int]]:
    """Toy endoscopies and whether each has a scope guide."""
    scenes = [toy.scene(number) for number in numbers]
    return [toy.render(scene, 64) for scene in scenes], [int(bool(scene.box)) for scene in scenes]


def test_the_tiny_classifier_learns_separable_classes_from_scratch():
    """In five epochs of 160 images, and right about images it has not seen."""
    images, labels = with_and_without_box(range(160))
    tests, truth = with_and_without_box(range(9000, 9060))
    result = downstream.run("tiny", Labelled(images, labels), Labelled(tests, truth), classes=2)
    assert result.scores["f1_macro"] > 0.95 and result.scores["auc_macro"] > 0.98
    assert result.recipe.epochs == 5 and result.predictions.shape == (60,)
    assert result.scores == scores(truth, result.probabilities)


def test_labels_that_mean_nothing_teach_nothing():
    """The control: the same recipe on labels drawn at random stays near chance."""
    images, _ = with_and_without_box(range(64))
    tests, truth = with_and_without_box(range(9000, 9060))
    labels = np.random.default_rng(0).integers(0, 2, len(images))
    result = downstream.run("tiny", Labelled(images, labels), Labelled(tests, truth), classes=2)
    assert 0.25 < result.scores["balanced_accuracy"] < 0.75


def test_a_run_repeats_to_the_bit_and_another_seed_is_another_run():
    images, labels = with_and_without_box(range(24))
    few = replace(downstream.TINY_RECIPE, epochs=2, batch=8)
    first = downstream.run("tiny", Labelled(images, labels), Labelled(images, labels), 2, few)
    torch.manual_seed(77)  # nobody else's generator matters
    again = downstream.run("tiny", Labelled(iter(images), labels), Labelled(iter(images), labels), 2, few)
    other = downstream.run("tiny", Labelled(images, labels), Labelled(images, labels), 2, replace(few, seed=1))
    assert np.array_equal(first.probabilities, again.probabilities)
    assert not np.array_equal(first.probabilities, other.probabilities)


def saved(folder, labels: int | None):
    torch.manual_seed(0)
    c = transformers.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
                               image_size=32, patch_size=8, num_labels=labels or 2)  # fmt: skip
    make = transformers.ViTForImageClassification if labels else transformers.ViTModel
    make(c).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("labels", [None, 8])
def test_a_pretrained_folder_gives_the_backbone_and_gets_a_fresh_head(tmp_path, labels):
    """From a backbone with a pooler, and from a classifier of other classes."""
    source = vit.load(saved(tmp_path, labels))
    backbone = source.vit if labels else source
    network = downstream.classifier(tmp_path, classes=3)
    assert network.classifier.weight.shape == (3, 32)
    for name, tensor in network.vit.state_dict().items():
        assert torch.equal(tensor, backbone.state_dict()[name]), name


def test_all_of_a_pretrained_network_is_trained_by_the_recipe_of_the_paper(tmp_path):
    """AdamW, constant rate: the steps equal torch's own optimizer on the same batches, and the file stays as it was."""
    recipe = Recipe(epochs=2, batch=4)
    assert (Recipe().lr, Recipe().epochs, Recipe().batch) == (2e-5, 5, 16)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (10, 40, 30, 3), dtype=np.uint8), rng.integers(0, 3, 10)
    saved(tmp_path, None)
    ours, reference = (downstream.classifier(tmp_path, classes=3) for _ in range(2))
    losses = downstream.fit(ours, images, labels, recipe)
    assert len(losses) == 2 and not any(p.requires_grad for p in ours.parameters())

    reference.requires_grad_(True)
    optimizer = torch.optim.AdamW(reference.parameters(), 2e-5, weight_decay=0.01, foreach=False)
    order = torch.Generator().manual_seed(0)
    x, y = torch.stack([vit.preprocess(image, 32) for image in images]), torch.from_numpy(labels)
    for _ in range(2):
        for rows in torch.randperm(10, generator=order).split(4):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(reference(x[rows]), y[rows]).backward()
            optimizer.step()
    start = downstream.classifier(tmp_path, classes=3).state_dict()
    for (name, a), b in zip(ours.state_dict().items(), reference.state_dict().values()):
        assert (a - b).abs().max() <= 1e-6 and not torch.equal(a, start[name]), name


def test_probabilities_sum_to_one_and_stream():
    network = downstream.classifier("tiny", classes=4)
    network.requires_grad_(False)
    images = np.random.default_rng(0).integers(0, 256, (5, 50, 70, 3), dtype=np.uint8)
    probabilities = downstream.predict(network, iter(images), batch=2)
    assert probabilities.shape == (5, 4) and np.allclose(probabilities.sum(1), 1, atol=1e-12)


def test_images_and_labels_that_do_not_match_are_refused():
    images = np.zeros((2, 64, 64, 3), np.uint8)
    for labels, said in (([0], "1 labels for 2 images"), ([0, 2], "but there are 2 classes")):
        with pytest.raises(ValueError, match=said):
            downstream.fit(downstream.classifier("tiny", 2), images, labels, Recipe())
    with pytest.raises(ValueError, match="no image"):
        downstream.fit(downstream.classifier("tiny", 2), [], [], Recipe())
    with pytest.raises(FloatingPointError, match="epoch"):
        downstream.fit(downstream.classifier("tiny", 2), images, [0, 1], Recipe(lr=1e30))
