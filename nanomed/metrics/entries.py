"""Features to entries of results.json: every value with its N, protocol, network, interval, floor and warning.

An interval says where the value would land for other images of the same sources at this N; the floor is what two
disjoint sets of real images give at the same N, so it is what a perfect generator would get.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanomed.metrics import clef, colour, diversity, frd, medvqa, scores, uncertainty

SMALL = 2048  # below this many images the bias of an FID is larger than most papers' differences
GROUPS, KID_GROUPS = 10, 20  # of the jackknives
SUBSETS, SUBSET = 100, 1000  # of KID
SPLITS = 10  # of the Inception Score
BINS, BETA = 20, 8.0  # of the F-beta curves
K, K_COVERAGE = 3, 5  # neighbours of precision and recall, of density and coverage
LEAST = {  # images that a metric needs
    "fid": 2, "kid": 2, "is": SPLITS, "pr": K + 1, "dc": K_COVERAGE + 1, "fbeta": BINS, "authenticity": 2, "vendi": 1
}  # fmt: skip

Entries = dict[str, dict]


@dataclass(frozen=True)
class How:
    """How entries are made of features."""

    sure: bool = True  # with intervals and floors: about a dozen times the arithmetic
    seed: int = 0  # of groups and subsets
    k: int = K  # neighbours of precision and recall
    prefix: str = ""  # before the names of the distances, where they are not the published network's


class Measured:
    """Two sets of features of one network under one protocol, and the entries that can be made of them.

    real, fake   (N, D) on any device
    protocol     as it is to be printed, such as "Inception pool3, tf"
    network      fingerprint of the weights
    """

    def __init__(self, real: Tensor, fake: Tensor, protocol: str, network: str, how: How = How()) -> None:
        self.real, self.fake, self.protocol, self.network, self.how = real, fake, protocol, network, how
        self.prefix, self.sure, self.seed, self.k = how.prefix, how.sure, how.seed, how.k
        self.n = min(len(real), len(fake))
        self._neighbours: dict[str, tuple] | None = None  # of precision to coverage, once they were asked for

    def frechet(self, name: str = "FID") -> Entries:
        """The Frechet distance."""
        entry = self._entry(scores.frechet_distance(self.real, self.fake), biased=True)
        if self.sure and self.n >= 2 * GROUPS:
            ends = uncertainty.frechet_interval(self.real, self.fake, GROUPS, seed=self.seed)
            entry |= interval(ends, jackknife(GROUPS))
        return {self.prefix + name: entry | self._floor(scores.frechet_distance)}

    def kernel(self) -> Entries:
        """The kernel distance: mean and deviation over subsets, interval of the mean."""

        def value(a: Tensor, b: Tensor) -> float:
            return scores.kernel_distance(a, b, SUBSETS, SUBSET, self.seed)[0]

        mean, deviation = scores.kernel_distance(self.real, self.fake, SUBSETS, SUBSET, self.seed)
        size = min(SUBSET, self.n)
        entry = self._entry(mean, f"{SUBSETS} subsets of {size:,}") | {"deviation": deviation}
        if self.sure and self.n >= 2 * KID_GROUPS:
            ends = uncertainty.kernel_interval(self.real, self.fake, KID_GROUPS, seed=self.seed)
            entry |= interval(ends, jackknife(KID_GROUPS))
        return {self.prefix + "KID": entry | self._floor(value)}

    def cmmd(self) -> Entries:
        """CMMD of CLIP embeddings."""
        entry = self._entry(scores.cmmd(self.real, self.fake), "RBF sigma 10, times 1000", biased=True)
        if self.sure and self.n >= 2 * KID_GROUPS:
            low, high = uncertainty.kernel_interval(
                self.real, self.fake, KID_GROUPS, seed=self.seed, kernel=scores.gaussian_kernel, biased=True
            )
            entry |= interval((max(1000 * low, 0.0), 1000 * high), jackknife(KID_GROUPS))
        return {"CMMD": entry | self._floor(scores.cmmd)}

    def precision_recall(self) -> Entries:
        """Precision, recall and their harmonic mean."""

        def values(a: Tensor, b: Tensor) -> Sequence[float]:
            precision, recall = scores.precision_recall(a, b, self.k)
            return precision, recall, scores.f1(precision, recall)

        return self._of_neighbours(("precision", "recall", "F1"), values, self.k)

    def density_coverage(self) -> Entries:
        """Density and coverage."""

        def values(a: Tensor, b: Tensor) -> Sequence[float]:
            return scores.density_coverage(a, b, K_COVERAGE)

        return self._of_neighbours(("density", "coverage"), values, K_COVERAGE)

    def f_beta(self) -> Entries:
        """F8 (recall) and F1/8 (precision) of the curve between them, which each entry holds in 21 points,
        with that of two sets of real images (`of_real`)."""
        bins = diversity.clusters(self.real, self.fake, BINS, seed=self.seed)

        def values(a: Tensor, b: Tensor) -> Sequence[float]:
            points = diversity.curve(a, b)
            return diversity.f_beta(points, BETA), diversity.f_beta(points, 1 / BETA)

        def fresh(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return diversity.clusters(a, b, BINS, seed=self.seed)

        points = diversity.curve(*bins, angles=21).tolist()
        how = (f"{BINS} clusters, recall first", f"{BINS} clusters, precision first")
        found = [self._entry(value, said) | {"curve": points} for said, value in zip(how, values(*bins))]
        if self.sure and self.n >= 2 * GROUPS:
            ends = uncertainty.intervals(values, *bins, groups=GROUPS, seed=self.seed, support=(0.0, 1.0))
            found = [entry | interval(pair, jackknife(GROUPS)) for entry, pair in zip(found, ends)]
        if self.sure and len(self.real) >= 2 * BINS:
            halves, used = uncertainty.floor(fresh, self.real, self.n, self.seed)
            of_real = {"of_real": diversity.curve(*halves, angles=21).tolist()}
            found = [entry | of_real | _floor(value, used) for entry, value in zip(found, values(*halves))]
        return dict(zip(("F8", "F1/8"), found))

    def authenticity(self) -> Entries:
        """The share of fakes that are not too near a real image."""
        entry = self._entry(diversity.authenticity(self.real, self.fake), "about 0.5 for new images of the same kind")
        if self.sure and self.n >= 2 * GROUPS:
            ends = uncertainty.interval(
                diversity.authenticity, self.real, self.fake, groups=GROUPS, seed=self.seed, support=(0.0, 1.0)
            )
            entry |= interval(ends, jackknife(GROUPS))
        return {"authenticity": entry | self._floor(diversity.authenticity)}

    def vendi(self) -> Entries:
        """The Vendi score of the fakes; its "floor" is the real images' own at the same N, what there is to reach."""
        entry = self._entry(diversity.vendi(self.fake), "cosine")
        if self.sure and len(self.fake) >= 2 * GROUPS:
            ends = uncertainty.interval(
                diversity.vendi, self.fake, groups=GROUPS, seed=self.seed, support=(1.0, len(self.fake))
            )
            entry |= interval(ends, jackknife(GROUPS))
        if self.sure:
            order = torch.randperm(len(self.real), generator=torch.Generator().manual_seed(self.seed))[: self.n]
            own = diversity.vendi(self.real[order])
            entry["floor"] = {"value": own, "method": "the Vendi score of real images", "n": self.n}
        return {"Vendi score": entry}

    def _of_neighbours(self, names: Sequence[str], values: Callable, k: int) -> Entries:
        """Entries of numbers that one pass over all distances gives, with their intervals."""
        left = self.n - -(-self.n // GROUPS)  # images of the smaller set when a group is left out
        if self.sure and self.n >= 2 * GROUPS and left > k:
            if self._neighbours is None:
                near = self.k if left > self.k else K
                self._neighbours = uncertainty.neighbour_intervals(
                    self.real, self.fake, (near, K_COVERAGE), GROUPS, seed=self.seed
                )
            found = [self._neighbours[name.lower()] for name in names]
            entries = {
                name: self._entry(value, f"k = {k}") | interval(ends, jackknife(GROUPS))
                for name, (value, ends) in zip(names, found)
            }
        else:
            entries = {name: self._entry(value, f"k = {k}") for name, value in zip(names, values(self.real, self.fake))}
        if self.sure and len(self.real) >= 2 * (k + 1):
            floors, used = uncertainty.floor(values, self.real, self.n, self.seed)
            for entry, value in zip(entries.values(), floors):
                entry |= _floor(value, used)
        return entries

    def _entry(self, value: float, how: str = "", biased: bool = False) -> dict:
        entry = {
            "value": value,
            "protocol": ", ".join(filter(None, (self.protocol, how))),
            "n_real": len(self.real),
            "n_fake": len(self.fake),
            "network": self.network,
        }
        return entry | small(self.n, biased, self.sure)

    def _floor(self, statistic: Callable[[Tensor, Tensor], float]) -> dict:
        if not self.sure or len(self.real) < 4:
            return {}
        return _floor(*uncertainty.floor(statistic, self.real, self.n, self.seed))


def frechet_to_statistics(
    fake: Tensor, mean: Tensor, factor: Tensor, protocol: str, network: str, how: How = How()
) -> dict:
    """The entry of a Frechet distance to a mean (D,) and a covariance F F^T, F (D, r), that a file holds: without a
    floor, and with an interval that knows the generated images only."""
    distance, rows = scores.distances_to_moments(fake, mean, factor), torch.arange(len(fake))
    about = {"protocol": f"{protocol}, to statistics", "n_real": 0, "n_fake": len(fake), "network": network}
    entry = {"value": distance(rows)} | about | small(len(fake), biased=True)
    if how.sure and len(fake) >= 2 * GROUPS:
        ends = uncertainty.interval(distance, rows, groups=GROUPS, seed=how.seed)
        entry |= interval(ends, f"{jackknife(GROUPS)}, the real statistics as they are")
    return entry


def inception_score(logits: Tensor, of_real: Tensor | None, protocol: str, network: str, n_real: int) -> Entries:
    """The Inception Score of logits (N, classes); its "floor" is the real images' own score at the same N, which is
    rather a ceiling."""
    splits = scores.split_scores(logits, SPLITS)
    entry = {
        "value": splits.mean().item(),
        "deviation": splits.std(correction=0).item(),
        "protocol": f"{protocol}, {SPLITS} splits",
        "n_real": n_real,
        "n_fake": len(logits),
        "network": network,
    }
    entry |= interval(uncertainty.mean_interval(splits), f"Student's t over the {SPLITS} splits")
    if of_real is not None and len(of_real) >= SPLITS:
        own = of_real[: len(logits)]
        value = scores.inception_score(own, SPLITS)[0]
        entry["floor"] = {"value": value, "method": "the Inception Score of real images", "n": len(own)}
    return {"IS": entry | small(len(logits))}


def clip_score(
    images: Tensor, texts: Tensor, protocol: str, network: str, of_real: Tensor | None = None, name: str = "CLIPScore"
) -> Entries:
    """CLIPScore (Hessel et al. 2021): the mean over images of 2.5 max(cos(image, prompt), 0), from embeddings (N, D) of
    both; `of_real` are the scores (M,) of real images and their own prompts."""
    each = scores.clip_scores(images, texts)
    entry = {"value": each.mean().item(), "protocol": protocol, "n_real": 0, "n_fake": len(each), "network": network}
    if len(each) >= 2:
        entry |= interval(_within(uncertainty.mean_interval(each), 0.0, 2.5), "Student's t over the images")
    if of_real is not None:
        entry["floor"] = {"value": of_real.mean().item(), "method": "real images and their prompts", "n": len(of_real)}
    return {name: entry | small(len(each))}


def medvqa2025(
    objectives: Sequence[medvqa.Objective],
    prompts: Sequence[Tensor],
    protocol: str,
    network: str,
    n: tuple[int, int],
    how: How = How(),
) -> Entries:
    """Fidelity, agreement and diversity of MEDVQA-GI 2025: the first two of objectives, the last of the features (N, D)
    of each prompt with two images or more; n images there are on the real and the generated side.

    The interval is over objectives or prompts; the floor, rather a ceiling, is of real images in the prompts' place.
    """
    chance = [found for one in objectives if (found := medvqa.by_chance(one, how.seed))] if how.sure else []
    entries: Entries = {}
    for name, value, those, perfect, what, support in (
        ("fidelity", medvqa.fidelity, objectives, chance, "objectives", (0.0, 100.0)),
        ("agreement", medvqa.agreement, objectives, chance, "objectives", (-1.0, 1.0)),
        ("diversity", medvqa.diversity, prompts, [one.real for one in chance], "prompts", (0.0, 2.0)),
    ):
        if not those:
            continue
        each = torch.tensor([value(one) for one in those], dtype=torch.float64)
        entry = {"value": each.mean().item(), "protocol": f"{protocol}, {len(each):,} {what}", "n_real": n[0],
                 "n_fake": n[1], "network": network}  # fmt: skip
        if how.sure and len(each) >= 2:
            entry |= interval(_within(uncertainty.mean_interval(each), *support), f"Student's t over the {what}")
        if perfect:
            own = sum(map(value, perfect)) / len(perfect)
            n_own = len(perfect[0] if what == "prompts" else perfect[0].one)
            entry["floor"] = {"value": own, "method": "real images in the prompts' place", "n": n_own}
        entries[f"MEDVQA-GI {name}"] = entry | small(n[1])
    return entries


def radiomic(
    real: Mapping[str, Tensor], fake: Mapping[str, Tensor], protocol: str, sure: bool = True, seed: int = 0
) -> Entries:
    """FRD v1 and v0 from {"features": (N, 693), "v0": (N, 93)} of both sets."""
    entries: Entries = {}
    for name, column, distance, how in (
        ("FRD v1", "features", frd.distance_v1, "log of the squared distance"),
        ("FRD v0", "v0", frd.distance_v0, "scaled to 7.457"),
    ):
        a, b = real[column], fake[column]
        n, width = min(len(a), len(b)), a.shape[1]
        entry = {"value": distance(a, b), "protocol": f"{protocol}, {width} features, {how}", "n_real": len(a),
                 "n_fake": len(b)} | small(n, biased=True)  # fmt: skip
        if n <= width:
            entry["flag"] = f"N = {n:,} for {width} features: their covariance is singular; compare at equal N only"
        if sure and n >= 2 * GROUPS:
            low = 0.0 if name == "FRD v0" else -np.inf
            ends = uncertainty.interval(distance, a, b, groups=GROUPS, seed=seed, support=(low, np.inf))
            entry |= interval(ends, jackknife(GROUPS))
        if sure and len(a) >= 4:
            entry |= _floor(*uncertainty.floor(distance, a, n, seed))
        entries[name] = entry
    return entries


def imageclef2024(real: Tensor, fake: Tensor, network: str, sure: bool = True, seed: int = 0) -> Entries:
    """The organisers' numbers from class probabilities (N, 1000): FID in [0, 2], mean, deviation and median of the IS.

    Images are taken in the order of the rows, which decides the groups of the IS.
    """
    entries: Entries = {}
    about = {"protocol": "imageclef2024", "n_real": len(real), "n_fake": len(fake), "network": network}
    n = min(len(real), len(fake))
    fid = about | {"value": clef.frechet(real, fake)} | small(n, biased=True)
    if sure and n >= 2 * GROUPS:
        fid |= interval(uncertainty.interval(clef.frechet, real, fake, groups=GROUPS, seed=seed), jackknife(GROUPS))
    if sure and len(real) >= 4:
        fid |= _floor(*uncertainty.floor(clef.frechet, real, n, seed))
    entries["FID"] = fid
    if len(fake) >= clef.GROUPS:
        mean, deviation, median = clef.inception_score(fake)
        mine = about | {"protocol": f"imageclef2024, {clef.GROUPS} groups"} | small(len(fake))
        ends = uncertainty.mean_interval(clef.group_scores(fake))
        entries["IS"] = mine | {"value": mean} | interval(ends, f"Student's t over the {clef.GROUPS} groups")
        entries["IS std"] = mine | {"value": deviation}
        entries["IS med"] = mine | {"value": median}
    return entries


def share(answers: Sequence[bool], protocol: str) -> dict:
    """The entry of a share of right answers, with Wilson's interval."""
    n, p = len(answers), sum(answers) / len(answers)
    z = 1.959964  # of the normal distribution, 95 %
    centre, reach = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    ends = max((centre - reach) / (1 + z * z / n), 0.0), min((centre + reach) / (1 + z * z / n), 1.0)
    entry = {"value": p, "protocol": protocol, "n_real": 0, "n_fake": n}
    return entry | interval(ends, "Wilson's formula for a share")


def small(n: int, biased: bool = False, sure: bool = True) -> dict:
    """The flag of a value from fewer than 2,048 images; `sure`: it has an interval, where there are enough for one."""
    if n >= SMALL:
        return {}
    said = ["biased upwards, compare at equal N and with the floor"] if biased else []
    if n < 2 * GROUPS:
        said.append("too few images for an interval")
    elif not biased:
        said.append("read it with its interval" if sure else "it may be far off, and has no interval")
    return {"flag": f"N = {n:,} is below {SMALL:,}: {'; '.join(said)}"}


def jackknife(groups: int) -> str:
    """The name of the method."""
    return f"jackknife over {groups} groups of images"


def _within(ends: tuple[float, float], low: float, high: float) -> tuple[float, float]:
    """An interval, no further than a value can be."""
    return max(ends[0], low), min(ends[1], high)


def interval(ends: tuple[float, float], method: str) -> dict:
    """What an entry says of the two ends of its interval."""
    return {"interval": {"low": ends[0], "high": ends[1], "level": 0.95, "method": method}}


def _floor(value: float, used: int) -> dict:
    return {"floor": {"value": value, "method": f"real against real, two disjoint sets of {used:,}", "n": used}}


def colour_drift(real: Mapping[str, Tensor], fake: Mapping[str, Tensor], sure: bool = True, seed: int = 0) -> Entries:
    """Distances of colours, from what `nanomed.metrics.colour.measure` says of every image: means and stds (N, 3) and
    saturation (N, bins)."""

    def rows(of: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([of["means"].double(), of["stds"].double(), of["saturation"].double()], 1)  # (N, 6 + bins)

    def values(a: Tensor, b: Tensor) -> Sequence[float]:
        sides = [
            colour.Colours(x[:, :3].numpy(), x[:, 3:6].numpy(), np.zeros((3, 256)), x[:, 6:].mean(0).numpy())
            for x in (a, b)
        ]
        drift = colour.drift(*sides)
        return drift["mean_abs"], drift["std_abs"], drift["saturation_w1"], drift["hldf"]

    a, b = rows(real), rows(fake)
    named = (
        ("colour mean distance", "grey levels, over channels"),
        ("colour std distance", "grey levels, over channels"),
        ("saturation distance", "Wasserstein-1, 0 to 1"),
        ("HLDF colour distance", "Med-Art, eq. 4 between sets"),
    )
    n = min(len(a), len(b))
    entries = {
        name: {"value": value, "protocol": f"pixels, {how}", "n_real": len(a), "n_fake": len(b)}
        for (name, how), value in zip(named, values(a, b))
    }
    if sure and n >= 2 * GROUPS:
        found = uncertainty.intervals(values, a, b, groups=GROUPS, seed=seed)
        for entry, ends in zip(entries.values(), found):
            entry |= interval(ends, jackknife(GROUPS))
    if sure and len(a) >= 4:
        floors, used = uncertainty.floor(values, a, n, seed)
        for entry, value in zip(entries.values(), floors):
            entry |= _floor(value, used)
    return entries
