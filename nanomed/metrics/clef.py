"""The protocol `imageclef2024`: what the organisers of ImageCLEFmed MEDVQA-GI 2024 called FID and Inception Score.

Their script differs from an ordinary FID in two ways, and both shrink it. The features are the 1000 softmax
probabilities of an ImageNet classifier instead of its pooled features. Two distributions on the probability simplex are
at most sqrt(2) apart, and the Frechet distance of their Gaussians is at most their squared 2-Wasserstein distance, so
the value lies in [0, 2] (times n / (n - 1), for the covariance is the unbiased one) and is near 0.1 for any endoscopic
images: a classifier that never saw an endoscope spreads its doubts over the same few classes for all of them. And
images are brought to 299 x 299 by `numpy.resize`, which does not interpolate: it reads the bytes in their order and
starts again at the first when they run out. A 256 x 256 image is sheared and repeated, a 720 x 576 image counts with
its first 124 rows. Such a value compares with others of this protocol and with nothing else, least of all with a FID.

The score of ten groups depends on the order of the images, which was that of the organisers' file system, and does not
depend on the real images.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from nanomed.metrics import scores
from nanomed.metrics.networks.inception import Inception

SIDE = 299
GROUPS = 10
EPSILON = 1e-16

Classifier = Callable[[Tensor], Tensor]  # images (B, 3, 299, 299) in [-1, 1] -> probabilities (B, classes)


def rewrap(image: np.ndarray, side: int = SIDE) -> np.ndarray:
    """`np.resize(image, (side, side, 3))` bit for bit: the flat values, cut short or repeated. Any shape and number of
    channels, as the image was read. A long image is a view of its first values; nothing longer is ever made."""
    flat, need = image.reshape(-1), side * side * 3
    if not len(flat):
        raise ValueError(f"an image of shape {image.shape} has no pixels")
    if len(flat) < need:
        flat = np.tile(flat, -(-need // len(flat)))
    return flat[:need].reshape(side, side, 3)


def prepare(images: list[np.ndarray]) -> Tensor:
    """uint8 images of any sizes as the classifier's input: (B, 3, 299, 299) in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([rewrap(image) for image in images]))
    return (pixels.float() / 127.5 - 1).permute(0, 3, 1, 2)


def probabilities(classify: Classifier, images: Iterable[np.ndarray], batch: int = 32) -> Tensor:
    """Class probabilities (N, classes) in float64 of uint8 images, streamed in batches."""
    found, held = [], []
    for image in images:
        held.append(image)
        if len(held) == batch:
            found.append(classify(prepare(held)).cpu().double())
            held = []
    if held:
        found.append(classify(prepare(held)).cpu().double())
    if not found:
        raise ValueError("no images")
    return torch.cat(found)


def of_inception(network: Inception) -> Classifier:
    """The FID network as the classifier. Of its 1008 outputs, 1 to 1000 are the ImageNet classes (0 is the background
    and 1001 to 1007 are unused); their softmax stands in for Keras's InceptionV3, whose weights are others."""

    def classify(images: Tensor) -> Tensor:
        weight = network.fc.weight
        features, _ = network(images.to(weight.device, memory_format=torch.channels_last))
        return network.fc(features)[:, 1:1001].softmax(1)

    return classify


def frechet(real: Tensor, fake: Tensor) -> float:
    """Their FID, in [0, 2 n / (n - 1)], of two sets of probabilities (N, classes). Raises ValueError for anything that
    is not a distribution over classes."""
    scores.check(2, real, fake)
    for p in (real, fake):
        if (p < 0).any() or ((p.sum(1) - 1).abs() > 1e-3).any():
            raise ValueError("imageclef2024 compares class probabilities: rows must be >= 0 and sum to 1")
    return scores.frechet_distance(real, fake)


def group_scores(p: Tensor, groups: int = GROUPS) -> Tensor:
    """Their Inception Score of every group of floor(N / groups) images in the given order; what is left over at the end
    is not counted. exp(mean KL(p(y|x) || p(y))) with 1e-16 inside both logarithms; (groups,) in float64."""
    scores.check(groups, p)
    parts = p.double()[: len(p) // groups * groups].view(groups, -1, p.shape[1])  # (groups, N / groups, classes)
    marginal = parts.mean(1, keepdim=True)
    divergence = (parts * ((parts + EPSILON).log() - (marginal + EPSILON).log())).sum(2)
    return divergence.mean(1).exp()


def inception_score(p: Tensor, groups: int = GROUPS) -> tuple[float, float, float]:
    """Mean, population standard deviation and median of the score over groups."""
    values = group_scores(p, groups).numpy()
    return float(values.mean()), float(values.std()), float(np.median(values))
