"""Are there training images among the samples? Nearest neighbours, and a test that knows how near is by chance.

A sample's relative distance s is the distance to its nearest training image over its distance to 5 % of the training
images: a ratio, so that plain images, which are near to everything, do not look copied. Images the model never saw
show how small s gets by chance. Where their number m runs out, extreme value theory goes on: among images in about D
dimensions the share of nearest neighbours closer than s falls like s^D (the neighbours are a Poisson process; Facco et
al. 2017 read D off the same law), so log(u / s) below a low threshold u is exponential. With x_1 .. x_k the excesses
log(u / s) of the k held-out images below u, the smallest 10 %, a sample with the excess x has the p-value

    p = (k + 1) / (m + 1) * (1 + x / (x_1 + .. + x_k))^-k

which is exact under that law although D is not known: an exponential over the sum of k others is beta prime, whatever
their rate. Above u it is the conformal (1 + held-out images as near) / (m + 1). An exact copy has s = 0 and p = 0.

Benjamini and Hochberg's rule over all samples and spaces flags copies with half of the `level`. The other half goes to
one question about the whole set, asked by a one-sided Mann-Whitney test (Meehan et al. 2020): are samples nearer to the
training images than held-out images are? So if nothing is copied, the chance of any alarm is at most `level`.

Two spaces serve best: small pixels, where blurred and flipped copies are near too, and the features of a network.

    train, fake, held_out = ({"pixels": pixels(images)} for images in (...))
    found = examine(train, fake, held_out)
    found.verdict, found.flagged, found.closest
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from scipy.stats import mannwhitneyu
from torch import Tensor

SIDE = 16  # of the small pixels: a blur by a 64th of the width is all but gone in them
TAIL, MOST = 0.1, 100  # the held-out images that the tail is fitted to: their share, at most so many
FEWEST = 20  # held-out images, below which nothing can be said
YARDSTICK, SHARE = 1000, 0.05  # relative to the distance of 5 % of so many training images
ROUNDING = 1e-3  # a relative distance below this is the same image
_ENTRIES = 1 << 25  # of a block of distances: 128 MB


@dataclass(frozen=True)
class Space:
    """What one space says. Distances in pixels are root mean squares in grey levels of 0 to 255."""

    nearest: np.ndarray  # (K,) index of every sample's nearest training image
    distances: np.ndarray  # (K,) to it
    relative: np.ndarray  # (K,) over the distance to 5 % of the training images
    reference_distances: np.ndarray  # (m,) of the held-out images, copies of training images left out
    reference_relative: np.ndarray  # (m,)
    p: np.ndarray  # (K,) of each sample on its own
    dimension: float  # D of the held-out images' tail; inf where they are all equally near
    nearer: float  # share of pairs in which the sample is relatively nearer than the held-out image; 0.5 is chance
    p_set: float  # of that, one-sided
    leaked: int  # held-out images that are copies of training images, which say nothing about chance


@dataclass(frozen=True)
class Pair:
    """A sample and the training image it is nearest to, in the space where that is least likely by chance."""

    sample: int
    train: int
    space: str
    distance: float
    p: float  # over all spaces
    flagged: bool


@dataclass(frozen=True)
class Memorisation:
    """The result of `examine`."""

    spaces: dict[str, Space]
    p: np.ndarray  # (K,) of each sample over all spaces: the smallest times their number
    flagged: list[int]  # samples that are copies at the level
    closest: list[Pair]  # the least likely first; all flagged ones come before the others
    level: float
    left_one_out: bool  # the training images themselves stood in for held-out ones

    @property
    def nearer(self) -> list[str]:
        """The spaces in which the samples as a set are nearer to the training images than chance at the level."""
        return [name for name, s in self.spaces.items() if s.p_set <= self.level / 2 / len(self.spaces)]

    @property
    def alarm(self) -> bool:
        """Whether a pair is too near, or the set as a whole."""
        return bool(self.flagged or self.nearer)

    @property
    def verdict(self) -> str:
        """One line for a report."""
        reference = "other training images" if self.left_one_out else "held-out images"
        m = min(len(space.reference_relative) for space in self.spaces.values())
        basis = f"level {self.level:g}, {len(self.p)} samples, {m} {reference}"
        if self.flagged:
            said = f"{len(self.flagged)} of {len(self.p)} samples are copies of training images ({basis})"
        elif self.nearer:
            shares = ", ".join(f"{self.spaces[name].nearer:.0%} in {name}" for name in self.nearer)
            said = (
                f"no sample is a copy by itself, but together they are nearer to the training images than {reference} "
                f"are: in {shares} of pairs ({basis})"
            )
        else:
            said = f"no sign of memorisation ({basis})"
        if leaked := max(space.leaked for space in self.spaces.values()):
            kind = "training images have a double" if self.left_one_out else "held-out images are training images"
            said += f"; {leaked} {kind}"
        return said

    def statistics(self) -> dict:
        """The numbers, as plain values for a results file."""
        return {
            "verdict": self.verdict,
            "level": self.level,
            "samples": len(self.p),
            "flagged": self.flagged,
            "smallest_p": float(self.p.min()),
            "reference": "training images, each against the others" if self.left_one_out else "held-out images",
            "spaces": {
                name: {
                    "median_distance": float(np.median(s.distances)),
                    "median_reference_distance": float(np.median(s.reference_distances)),
                    "nearer": s.nearer,
                    "p_set": s.p_set,
                    "dimension": s.dimension if np.isfinite(s.dimension) else None,
                    "reference": len(s.reference_relative),
                    "leaked": s.leaked,
                }
                for name, s in self.spaces.items()
            },
        }


def pixels(images: Iterable[np.ndarray], side: int = SIDE) -> Tensor:
    """uint8 images (H, W, 3) of any sizes as small ones, float (N, 3, side, side) in 0 to 255.

    The filter is symmetric, so that flipped copies stay copies; Pillow's BOX is not.
    """
    small = [np.asarray(Image.fromarray(x).resize((side, side), Image.Resampling.BILINEAR)) for x in images]
    if not small:
        return torch.empty(0, 3, side, side)
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float()


def examine(
    train: Mapping[str, Tensor],
    fake: Mapping[str, Tensor],
    held_out: Mapping[str, Tensor] | None = None,
    level: float = 0.01,
    closest: int = 24,
) -> Memorisation:
    """Search the samples for training images.

    train, fake, held_out   what the spaces make of each set: {"pixels": (N, 3, s, s), "inception": (N, D), ...}.
                            Images (4 dimensions) are compared under flips too, features (2) as they are
    held_out                real images that the model was not trained on, from the same source. None: the training
                            images, each against the others
    level                   the chance of any alarm if nothing is memorised
    closest                 how many pairs to return

    Raises ValueError where sets do not match or fewer than 20 images are there to say what chance is.
    """
    if not train or not all(train.keys() == s.keys() for s in (fake, held_out) if s is not None):
        raise ValueError(f"training images, samples and held-out images want the same spaces, not {list(train)}, "
                         f"{list(fake)}, {list(held_out or train)}")  # fmt: skip
    for side in (train, fake, held_out or {}):
        if len({len(x) for x in side.values()}) > 1:
            raise ValueError("the spaces of a set hold different numbers of images")
    spaces = {name: _space(train[name], fake[name], held_out[name] if held_out else None) for name in train}
    every = np.stack([space.p for space in spaces.values()])  # (spaces, K)
    p = np.minimum(every.min(0) * len(spaces), 1)
    flagged = benjamini_hochberg(p, level / 2)
    names, least = list(spaces), every.argmin(0)
    order = np.lexsort((np.stack([s.relative for s in spaces.values()]).min(0), p))
    marked = set(flagged)
    pairs = []
    for i in map(int, order[:closest]):
        name = names[least[i]]
        space = spaces[name]
        pairs.append(Pair(i, int(space.nearest[i]), name, float(space.distances[i]), float(p[i]), i in marked))
    return Memorisation(spaces, p, flagged, pairs, level, held_out is None)


def benjamini_hochberg(p: np.ndarray, level: float) -> list[int]:
    """The hypotheses rejected at a false discovery rate of `level`, in the order of their numbers."""
    ordered = np.sort(p)
    passing = np.flatnonzero(ordered <= level * np.arange(1, len(p) + 1) / len(p))
    return np.flatnonzero(p <= ordered[passing[-1]]).tolist() if len(passing) else []


def _space(train: Tensor, fake: Tensor, held_out: Tensor | None) -> Space:
    if len(train) < FEWEST or not len(fake):
        raise ValueError(f"{len(train)} training images and {len(fake)} samples: at least {FEWEST} and 1 are needed")
    train, fake = train.detach().cpu(), fake.detach().cpu()
    held_out = None if held_out is None else held_out.detach().cpu()
    for name, x in (("training images", train), ("samples", fake), ("held-out images", held_out)):
        if x is not None and (x.shape[1:] != train.shape[1:] or not x.isfinite().all()):
            raise ValueError(f"the {name} are {tuple(x.shape)} beside {tuple(train.shape)}, or not finite")
    itself = held_out is None
    index, distances, relative = nearest(fake, train)
    _, reference, reference_relative = nearest(train if itself else held_out, train, itself)
    own = reference_relative > ROUNDING
    reference, reference_relative = reference[own], reference_relative[own]
    if len(reference) < FEWEST:
        raise ValueError(f"{len(reference)} held-out images that are no training images: at least {FEWEST} are needed")
    p, dimension = tail_p(relative, reference_relative, paired=itself)
    ours, theirs = relative, reference_relative
    if itself:
        # Distances inside one set hang together, so a mean over them varies more than the test believes: one half of
        # the training images is held out from the other instead, which is as good as images never seen.
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))
        half, other = train[order[::2]], train[order[1::2]]
        ours, theirs = nearest(fake, half)[2], nearest(other, half)[2]
        theirs = theirs[theirs > ROUNDING]
    test = mannwhitneyu(ours, theirs, alternative="less")
    nearer = 1 - test.statistic / (len(ours) * len(theirs))
    return Space(index, distances, relative, reference, reference_relative, p, dimension, float(nearer),
                 float(test.pvalue), int((~own).sum()))  # fmt: skip


def tail_p(values: np.ndarray, reference: np.ndarray, paired: bool = False) -> tuple[np.ndarray, float]:
    """p-values of being as small as `values` under the law of `reference`, and the dimension D of its tail.

    paired   neighbours are often mutual, as among training images: a value then counts as half of one
    """
    ordered, m = np.sort(reference), len(reference)
    k = max(1, min(int(TAIL * m), MOST))
    p = (1 + np.searchsorted(ordered, values, side="right")) / (m + 1)
    threshold = ordered[k]
    total = np.log(threshold / ordered[:k]).sum()
    counted = max(1, k // 2) if paired else k
    low = values < threshold
    with np.errstate(divide="ignore"):
        excess = np.log(threshold) - np.log(values[low])
    share = excess * (k / counted) / total if total > 0 else np.full(low.sum(), np.inf)
    p[low] = (k + 1) / (m + 1) * (1 + share) ** -float(counted)
    return p, float(k / total) if total > 0 else float("inf")


def nearest(queries: Tensor, train: Tensor, itself: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every query's nearest training image: its index, the distance, and the relative distance; (K,) each.

    itself   the queries are the training images: no image is its own neighbour

    Works in blocks of rows: no K x N matrix is held.
    """
    centre = train.mean(0, dtype=torch.float64).float()  # products of centred numbers lose less to rounding
    reference = _rows(train, centre)  # (N, D)
    squares = reference.square().sum(1)
    sample = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:YARDSTICK].sort().values
    rank = max(2, round(SHARE * len(sample)))  # of the nearest alone every relative distance would be 1
    flips = [(), (3,), (2,), (2, 3)] if queries.ndim == 4 else [()]
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    rows = max(1, _ENTRIES // len(train))
    for first in range(0, len(queries), rows):
        block = queries[first : first + rows]
        views = [_rows(block.flip(axes), centre) for axes in flips]  # (R, D) each
        distances = _squared(views[0], reference, squares)  # (R, N)
        for view in views[1:]:
            distances = torch.minimum(distances, _squared(view, reference, squares), out=distances)
        if itself:
            own = torch.arange(len(distances))
            distances[own, own + first] = torch.inf
        index = distances.argmin(1)
        # The product form is off by rounding where images agree: the pair that matters is subtracted.
        exact = torch.stack([(view - reference[index]).square().sum(1) for view in views]).amin(0)
        yardstick = distances[:, sample].kthvalue(rank, dim=1).values
        found.append((index, exact.sqrt(), yardstick.clamp(min=0).sqrt()))
    index, distance, yardstick = (torch.cat(column).double().numpy() for column in zip(*found))
    # An image on which 5 % of the training images lie has nothing to be measured by: as far as the yardstick.
    relative = np.divide(distance, yardstick, out=np.ones_like(distance), where=yardstick > 0)
    return index.astype(np.int64), distance, np.minimum(relative, 1)


def _squared(x: Tensor, y: Tensor, squares: Tensor) -> Tensor:
    """|x_i - y_j|^2, (n, m), from the squares (m,) of y."""
    return torch.addmm(squares.expand(len(x), -1), x, y.T, alpha=-2).add_(x.square().sum(1, keepdim=True))


def _rows(x: Tensor, centre: Tensor) -> Tensor:
    """Images or features as centred rows (N, D); images such that a distance is a root mean square over pixels."""
    scale = centre.numel() ** -0.5 if x.ndim == 4 else 1.0
    return (x.float() - centre).mul_(scale).flatten(1)
