"""A small classifier of the toy world, whose features stand in where there is no Inception network.

It is trained in minutes on rendered scenes to name what they show. A Frechet distance between its features says which
of two toy models draws better; it is not an FID and is never called one.
"""

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from nanomed import weights

NAME = "toy-classifier Frechet distance"
ATTRIBUTES = 12  # box, polyp in each of nine cells, instrument, text
SIDE = 64


class ToyClassifier(nn.Module):
    """Images (B, 3, 64, 64) in [-1, 1] -> (features (B, 128), logits (B, 12))."""

    def __init__(self):
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        self.convs = nn.ModuleList([nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(widths, widths[1:])])
        self.norms = nn.ModuleList([nn.GroupNorm(8, b) for b in widths[1:]])
        self.features = nn.Linear(128 * 16, 128)
        self.head = nn.Linear(128, ATTRIBUTES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for conv, norm in zip(self.convs, self.norms):
            x = F.silu(norm(conv(x)))
        features = self.features(x.flatten(1))
        return features, self.head(F.silu(features))


def load(path: str | Path) -> ToyClassifier:
    """The shipped classifier, ready to run."""
    return weights.load(weights.build(ToyClassifier), weights.read(path)).requires_grad_(False).eval()
