"""Do generated images teach? A classifier trained on them and tested on real images (Med-Art, Table 4).

The classifier is ViT-B/16 from the ImageNet-21k checkpoint, AdamW at a constant 2e-5, five epochs, as the paper says.
What it does not say is chosen here: batches of 16, weight decay 0.01, no augmentation. The row to compare with is the
same recipe on the real training images.

    train, test = Labelled(fakes, labels), Labelled(tests, test_labels)
    result = downstream.run("google/vit-base-patch16-224-in21k folder", train, test, classes=8)
    result.scores["f1_macro"]

Scores are numpy; they equal scikit-learn's, with an explicit None where a score is not defined.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor

from nanomed import weights
from nanomed.metrics.networks import vit
from nanomed.run.progress import Progress, working


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained."""

    lr: float = 2e-5
    epochs: int = 5
    batch: int = 16
    weight_decay: float = 0.01
    seed: int = 0  # of the head's start and the order of the images


TINY = vit.VitConfig(hidden_size=96, num_hidden_layers=3, num_attention_heads=3, intermediate_size=192, image_size=64,
                     patch_size=8)  # fmt: skip
TINY_RECIPE = Recipe(lr=1e-3)


class Labelled(NamedTuple):
    """Images and what they show."""

    images: Iterable[np.ndarray]  # uint8 (H, W, 3) of any sizes, read once
    labels: Sequence[int]  # 0 .. classes - 1


@dataclass(frozen=True)
class Result:
    """What a trained classifier says of the test images, and how right it is."""

    predictions: np.ndarray  # (N,) int64
    probabilities: np.ndarray  # (N, classes) float64
    scores: dict
    recipe: Recipe


def run(
    start: str | Path,
    train: Labelled,
    test: Labelled,
    classes: int,
    recipe: Recipe | None = None,
    device: torch.device | str = "cpu",
) -> Result:
    """Train on the first images, test on the second; on a CPU the same arguments give the same bits.

    start     "tiny", a small ViT from scratch at 64 x 64 pixels, or the folder of a published ViT
    train     the images to learn from, which are held resized
    recipe    None: the paper's, or for "tiny" one with its own learning rate
    """
    recipe = recipe or (TINY_RECIPE if str(start) == "tiny" else Recipe())
    network = classifier(start, classes, recipe.seed).to(device)
    fit(network, train.images, train.labels, recipe)
    probabilities = predict(network, test.images)
    return Result(probabilities.argmax(1), probabilities, scores(test.labels, probabilities), recipe)


def classifier(start: str | Path, classes: int, seed: int = 0) -> vit.VitClassifier:
    """A ViT with a fresh head for `classes`: on the backbone of a published folder, or "tiny", all of it fresh."""
    labels = tuple(str(number) for number in range(classes))
    if str(start) == "tiny":
        network = vit.VitClassifier(replace(TINY, labels=labels))
        vit.initialise(network, seed)
        return network
    source = vit.load(start)
    backbone = source.vit if isinstance(source, vit.VitClassifier) else source
    network = weights.build(vit.VitClassifier, replace(source.config, labels=labels))
    head = torch.nn.Linear(source.config.hidden_size, classes)
    vit.initialise(head, seed)
    tensors = {f"vit.{name}": t for name, t in backbone.state_dict().items() if not name.startswith("pooler.")}
    tensors |= {f"classifier.{name}": t for name, t in head.state_dict().items()}
    return weights.load(network, tensors)


def fit(network: vit.VitClassifier, images: Iterable[np.ndarray], labels: Sequence[int], recipe: Recipe) -> list[float]:
    """Train all of the network in place; the mean loss of each epoch. Afterwards it is frozen, ready to `predict`.

    Raises ValueError where labels and images do not match, FloatingPointError where the loss is not finite.
    """
    pixels, device = _held(images, network.config.image_size), next(network.parameters()).device
    targets = torch.from_numpy(_labels(labels, len(network.config.labels), len(pixels)))
    network.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    order, losses = torch.Generator().manual_seed(recipe.seed), []
    passes = Progress(recipe.epochs * -(-len(pixels) // recipe.batch), "training the classifier", "step")
    for epoch in range(recipe.epochs):
        total = 0.0
        for rows in torch.randperm(len(pixels), generator=order).split(recipe.batch):
            loss = F.cross_entropy(network(vit.normalised(pixels[rows].to(device))), targets[rows].to(device))
            if not loss.isfinite():
                raise FloatingPointError(f"epoch {epoch + 1}: the classifier's loss is {loss.item()}; lower its rate")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
            passes.update(loss=f"{loss.item():.3f}")
        losses.append(total / len(pixels))
    passes.close()
    network.eval().requires_grad_(False)
    return losses


def predict(network: vit.VitClassifier, images: Iterable[np.ndarray], batch: int = 32) -> np.ndarray:
    """Class probabilities (N, classes) in float64 for uint8 images of any sizes, streamed."""
    with working("classifying images"):
        features = vit.classifier_features(network, images, batch)
    logits = network.classifier(features.to(network.classifier.weight.device))
    return logits.double().softmax(1).cpu().numpy()


def _held(images: Iterable[np.ndarray], size: int) -> Tensor:
    """uint8 (N, 3, size, size): resized once, not in every epoch."""
    with working("reading images for the classifier"):
        held = [torch.from_numpy(vit.resized(image, size).copy()).permute(2, 0, 1) for image in images]
    if not held:
        raise ValueError("no image to train a classifier on")
    return torch.stack(held)


def _labels(labels: Sequence[int], classes: int, n: int) -> np.ndarray:
    labels = np.asarray(labels)
    if len(labels) != n:
        raise ValueError(f"{len(labels)} labels for {n} images")
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels are whole numbers, one an image, not {labels.dtype} {labels.shape}")
    if n and not (0 <= labels.min() and labels.max() < classes):
        raise ValueError(f"labels run from {labels.min()} to {labels.max()}, but there are {classes} classes")
    return labels.astype(np.int64)


# ------------------------------------------------------------------------------------------------------------ scores


def scores(labels: Sequence[int], probabilities: np.ndarray, predictions: Sequence[int] | None = None) -> dict:
    """How right class probabilities (N, C), or scores that rank like them, are about labels (N,) of 0 .. C - 1.

    accuracy, balanced_accuracy, {precision, recall, f1, auc}_{macro, weighted}; `confusion` [truth][prediction]; and
    `per_class` with precision, recall, f1, auc, support. Macro averages run over the classes that occur in labels or
    predictions, balanced accuracy and AUC over those that occur in the labels; weighted ones weigh by support.
    A ratio 0 / 0 is 0, as is usual. AUC is one class against the rest, and None where the labels are all of one class.

    predictions   the largest probability's class where not given
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    if probabilities.ndim != 2 or not len(probabilities):
        raise ValueError(f"probabilities are (N, classes) with N >= 1, not {probabilities.shape}")
    if not np.isfinite(probabilities).all():
        row = int(np.flatnonzero(~np.isfinite(probabilities).all(1))[0])
        raise ValueError(f"the probabilities of image {row} are not finite")
    n, classes = probabilities.shape
    truth = _labels(labels, classes, n)
    guess = _labels(probabilities.argmax(1) if predictions is None else predictions, classes, n)

    confusion = np.bincount(truth * classes + guess, minlength=classes**2).reshape(classes, classes)
    right, support, guessed = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    precision, recall = _ratio(right, guessed), _ratio(right, support)
    f1 = _ratio(2 * right, support + guessed)
    aucs = [auc(truth == c, probabilities[:, c]) for c in range(classes)]

    occurs, present = (support + guessed) > 0, support > 0
    found: dict = {"accuracy": float(right.sum() / n), "balanced_accuracy": float(recall[present].mean())}
    for name, values in (("precision", precision), ("recall", recall), ("f1", f1)):
        found[f"{name}_macro"] = float(values[occurs].mean())
        found[f"{name}_weighted"] = float(values @ support / n)
    defined = [c for c in range(classes) if aucs[c] is not None]
    values, weight = np.array([aucs[c] for c in defined]), support[defined]
    found["auc_macro"] = float(values.mean()) if defined else None
    found["auc_weighted"] = float(values @ weight / weight.sum()) if defined and weight.sum() else None
    found["confusion"] = confusion.tolist()
    found["per_class"] = [
        {"precision": float(p), "recall": float(r), "f1": float(f), "auc": a, "support": int(s)}
        for p, r, f, a, s in zip(precision, recall, f1, aucs, support)
    ]
    return found


def auc(positive: np.ndarray, scores: np.ndarray) -> float | None:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    From the sum of the positives' ranks (Mann and Whitney). None where either kind is absent.
    """
    positive = np.asarray(positive, dtype=bool)
    p, n = int(positive.sum()), int((~positive).sum())
    if not p or not n:
        return None
    return float((rankdata(scores)[positive].sum() - p * (p + 1) / 2) / (p * n))


def _ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    return np.divide(over, under, out=np.zeros(len(over)), where=under > 0)
