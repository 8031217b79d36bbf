"""The organisers' numbers of MEDVQA-GI 2025 beside FBD: fidelity, agreement and diversity of images and prompts.

By the scoring script that they gave to participants (github.com/SushantGautam/MedVQA, submission_task2.py of gi-2025).
An objective is two prompts that say the same in other words, with the real images that answer both; ten images were
drawn for every prompt. Features are BiomedCLIP's class tokens, before the projection, brought to length 1.

fidelity   mean over objectives of 100 / (1 + d), where d is the mean of the squared Frechet distances between the
           images of either prompt and the real ones; at most 100
agreement  mean over objectives of the mean cosine of every image of one prompt with every image of the other
diversity  mean over prompts of the mean distance of two images of one prompt

The script pairs prompts 1 and 2, 3 and 4, ... but stops after half of the prompts; here all count. Its FBD takes a real
image once for every objective that it answers, ours once. It reads BiomedCLIP's ViT from another copy
(ikim-uk-essen/BiomedCLIP_ViT_patch16_224), whose way to resize and crop was not to be had: for square images resized by
bicubic interpolation it can only differ in mean and deviation.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nanomed.metrics import scores

LEAST = 2  # images of a prompt, and of an objective


class Objective(NamedTuple):
    """Features of length 1: of two prompts' images (N, D) and (M, D), and of the real ones (K, D)."""

    one: Tensor
    other: Tensor
    real: Tensor


def fidelity(objective: Objective) -> float:
    """100 / (1 + d) of one objective. Raises ValueError for fewer than two images anywhere."""
    distances = [scores.frechet_distance(x, objective.real) for x in (objective.one, objective.other)]
    return 100 / (1 + sum(distances) / 2)


def agreement(objective: Objective) -> float:
    """The mean cosine over pairs: the product of the two means."""
    scores.check(1, objective.one, objective.other)
    return float(objective.one.double().mean(0) @ objective.other.double().mean(0))


def diversity(features: Tensor) -> float:
    """The mean distance of two of N >= 2 images."""
    scores.check(2, features)
    return torch.pdist(features.double()).mean().item()


def by_chance(objective: Objective, seed: int = 0) -> Objective | None:
    """Two disjoint draws of the real images in the prompts' place, and a third in the real ones', of equal size and no
    larger than the prompts' images: what a perfect generator would be. None where fewer than two remain for each."""
    n = min(len(objective.one), len(objective.other), len(objective.real) // 3)
    if n < LEAST:
        return None
    order = torch.randperm(len(objective.real), generator=torch.Generator().manual_seed(seed))
    return Objective(*objective.real[order[: 3 * n]].split(n))
