"""From sets of images to every number about them: what evaluate.py does between its command line and its files.

`measure` decodes every image once, brings each through each network once, on all ranks, and then computes on one.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanomed import weights
from nanomed.data.table import DataError
from nanomed.evaluation import extractors, imagesets, toyworld
from nanomed.evaluation.imagesets import ImageSet, Survey
from nanomed.evaluation.statistics import Statistics
from nanomed.evaluation.store import Extractor, Store, cached_as
from nanomed.metrics import downstream, entries, medvqa, memorisation, scores, uncertainty
from nanomed.metrics.colour import Colours
from nanomed.metrics.entries import Entries
from nanomed.metrics.networks import biomedclip, vit
from nanomed.metrics.networks.classifier import NAME as STAND_IN
from nanomed.run.progress import Progress, progress, working
from nanomed.run.ranks import ALONE, Ranks

METRICS = (
    "fid", "kid", "is", "pr", "dc", "fbeta", "authenticity", "vendi", "kfd", "hfd", "dino", "cmmd", "swav",
    "fbd", "frd", "clip", "biomedclip", "memorisation", "colour", "faithfulness", "classify",
)  # fmt: skip
USUAL = ("fid", "kid", "is", "pr", "colour", "memorisation", "faithfulness")
OF_INCEPTION = {"fid", "kid", "is", "pr", "dc", "fbeta", "authenticity", "vendi"}
OF_THEIR_OWN = {  # metrics with a network that no other reads: a function of a folder of weights, a batch, a device
    "kfd": partial(extractors.vit, vit.KVASIR),
    "hfd": partial(extractors.vit, vit.SKIN),
    "dino": extractors.dino,
    "cmmd": extractors.cmmd,
    "swav": extractors.swav,
    "fbd": extractors.fbd,
    "frd": extractors.radiomic,
    "clip": extractors.clip,
    "biomedclip": extractors.biomedclip,
}
OF_PROMPTS = {  # metrics that compare an image with its prompt: the name of the score and the tower that reads
    "clip": ("CLIPScore", extractors.clip_prompts),
    "biomedclip": ("BiomedCLIP score", extractors.biomedclip_prompts),
}
EVERYTHING = "all"  # of METRICS, as far as images and files allow
ORGANISERS = "imageclef2024"  # the protocol that has numbers of its own
FOREIGN = ("kid", "pr", "dc", "fbeta", "authenticity", "vendi")  # to that protocol, which has FID and IS


@dataclass
class Settings:
    """How sets are measured; evaluate.py's flags of the same names."""

    protocol: str = "tf"
    metrics: str = ""
    inception: str = ""
    classifier: str = ""
    weights: str = ""
    cache: str = "runs/cache"
    range: str = ""
    intervals: bool = True
    skip_bad: bool = False
    batch: int = 32
    k: int = entries.K
    seed: int = 2204


@dataclass
class Sets:
    """What is compared with what."""

    reals: dict[str, ImageSet]  # empty where there are only statistics
    fake: ImageSet
    train: ImageSet | None = None  # what the model was trained on, where it is known
    held_out: bool = False  # whether the model has not seen the real images
    toy_world: bool = False
    usual: tuple[str, ...] = USUAL  # what is measured when nothing is asked for
    notes: list[str] = field(default_factory=list)
    statistics: dict[str, Statistics] = field(default_factory=dict)  # of real images, from files


@dataclass
class Outcome:
    """What was found."""

    sets: Sets  # without the images that were skipped
    runs: dict[str, Entries]  # what compares with each of the real sets
    shared: Entries  # what does not depend on the real set
    notes: list[str]  # what a reader should know of the images
    colours: dict[str, Colours]  # of every set
    nearest: memorisation.Memorisation | None = None
    lacking: dict[str, str] = field(default_factory=dict)  # {metric: why it could not be measured}

    @property
    def results(self) -> Entries:
        """{metric: entry}; where there are several real sets, the metric's name says which."""
        if len(self.runs) == 1:
            return next(iter(self.runs.values())) | self.shared
        of_sets = {f"{name} [{run}]": entry for run, found in self.runs.items() for name, entry in found.items()}
        return of_sets | self.shared


def exactly() -> None:
    """Full float32 products on a GPU, where training takes fewer bits: numbers are compared to a thousandth."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@dataclass
class Asked:
    """The metrics that were asked for, and what is said of those that cannot be measured."""

    names: Sequence[str]  # that are refused by name; empty: none were named
    notes: list[str]
    lacking: dict[str, str] | None  # {metric: why}, where everything was asked for; None: what is lacking is an error


class Eyes:
    """Looks at sets, once at each: what decoding shows, and what networks make of them. Collective: every rank does
    the same in the same order."""

    def __init__(self, settings: Settings, ranks: Ranks):
        self.cache, self.skip_bad = settings.cache, settings.skip_bad
        self.ranks = ranks
        self.store = Store(Path(settings.cache) / "features", ranks)
        self.notes: list[str] = []
        self.seen: dict[tuple, ImageSet] = {}
        self.surveys: dict[tuple[str, ...], Survey] = {}
        self.read: dict[tuple, dict[str, Tensor]] = {}

    def look(self, images: ImageSet) -> ImageSet:
        """The set without its damaged images. Two sets of the same files may have other prompts and classes."""

        def key(of: ImageSet) -> tuple:
            return of.name, of.hashes, of.labels, of.prompts

        if key(images) not in self.seen:
            survey = imagesets.survey(images, self.cache, self.ranks)
            whole, survey, lines = imagesets.sound(images, survey, self.skip_bad)
            self.notes += [*lines, *imagesets.remarks(whole, survey)]
            self.seen[key(images)] = self.seen[key(whole)] = whole
            self.surveys[whole.hashes] = survey
        return self.seen[key(images)]

    def survey(self, images: ImageSet) -> Survey:
        """What decoding showed of a set that was looked at."""
        return self.surveys[images.hashes]

    def features(self, extractor: Extractor, images: ImageSet) -> dict[str, Tensor]:
        """{column: (N, ...)} of the whole images of a set, from the cache where it is there."""
        if images.parts:
            parts = [self.features(extractor, part) for part in images.parts]
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        key = extractor.name, extractor.protocol, images.hashes
        if key not in self.read:
            with Progress(len(images) // self.ranks.world, f"{images.name}, {extractor.name}", "image") as bar:

                def image(row: int) -> np.ndarray:
                    bar.update()
                    return images.image(row)

                self.read[key] = self.store.read(extractor, images.hashes, image, images.name)
        return self.read[key]


def measure(sets: Sets, asked: Sequence[str], settings: Settings, ranks: Ranks = ALONE) -> Outcome | None:
    """Every number that was asked for but those of `classify`, which trains; None on all ranks but the first. Called
    where gradients are off.

    asked      names among METRICS, refused by name where the images do not allow them; empty: `sets.usual`, as far as
               the images allow; "all": whatever images and files allow, and the rest is said to be lacking
    """
    if settings.protocol == ORGANISERS and sets.statistics:
        names = ", ".join(sets.statistics)
        raise DataError(f"{names}: the protocol {ORGANISERS} is of class probabilities, and needs the real images")
    eyes = Eyes(settings, ranks)
    fake = eyes.look(sets.fake)
    reals = {name: eyes.look(real) for name, real in sets.reals.items()}
    train = eyes.look(sets.train) if sets.train else None
    unseen = {digest for real in reals.values() for digest in real.hashes} - set(train.hashes if train else ())
    held_out = sets.held_out and bool(unseen)
    sets = replace(sets, reals=reals, fake=fake, train=train, held_out=held_out, notes=list(sets.notes))
    if train is not None and not sets.held_out:
        sets.notes.append("the real images count as the training images, whose copies are looked for; else say --train")
    notes = [*sets.notes, *eyes.notes]
    lacking: dict[str, str] | None = {} if EVERYTHING in asked else None
    asked = METRICS if EVERYTHING in asked else asked
    request = Asked(asked, notes, lacking)
    wanted = [name for name in asked or sets.usual if _possible(name, sets, request, settings)]
    networks = _networks(wanted, request, sets.toy_world, settings, ranks.device)
    wanted = [name for name in wanted if name not in (lacking or {})]
    found: dict[str, dict] = {}
    for name, network in list(networks.items()):
        try:
            found[name] = {images.hashes: eyes.features(network, images) for images in _who(name, sets, wanted)}
        except ValueError as error:  # images that a network cannot look at
            said = str(error).removeprefix(f"--metrics {name}: ")
            if lacking is None or ranks.world > 1:  # the others would wait for this one
                raise DataError(f"--metrics {name}: {said}") from None
            lacking[name] = said
            del networks[name]
    notes += eyes.store.notes
    if not ranks.first:
        return None
    seen = Seen(networks, found, settings, ranks.device)

    outcome = Outcome(sets, {}, {}, notes, {fake.name: eyes.survey(fake).colours()}, lacking=lacking or {})
    if "memorisation" in wanted:
        try:
            with working("looking for copies"):
                outcome.nearest, outcome.shared = _memorisation(sets, eyes, seen)
        except ValueError as error:  # too few held-out images once those that are training images are left out
            if lacking is None and "memorisation" in asked:
                raise DataError(f"--metrics memorisation: {error}") from None
            notes.append(f"memorisation is left out: {error}")
    if "faithfulness" in wanted:
        outcome.shared |= _faithfulness(fake, asked if lacking is None else ())
    for name in filter(networks.__contains__, OF_PROMPTS):
        outcome.shared |= _clip_score(sets, name, seen)
    for name, real in reals.items():
        if not real.parts:
            notes += imagesets.mismatches(real, eyes.survey(real), fake, eyes.survey(fake))
        outcome.colours[name] = eyes.survey(real).colours()
        try:
            with working(f"distances to {name}, with intervals and floors"):
                run = _distances(wanted, seen, real, fake)
        except ValueError as error:  # features that are no numbers: weights that are none
            raise DataError(f"{fake.name} against {real.name}: {error}; check the network's file") from None
        if "frd" in networks:
            try:
                run |= _radiomic(seen, real, fake)
            except ValueError as error:  # images without texture
                if lacking is None:
                    raise DataError(f"--metrics frd: {error}") from None
                lacking["frd"] = str(error)
        if "colour" in wanted:
            columns = eyes.survey(real).columns, eyes.survey(fake).columns
            run |= entries.colour_drift(*columns, settings.intervals, settings.seed)
        outcome.runs[name] = {metric: entry | {"real": real.digest} for metric, entry in run.items()}
    if "fbd" in networks and "MEDVQA-GI fidelity" not in {metric for run in outcome.runs.values() for metric in run}:
        notes.append("fidelity and agreement of MEDVQA-GI are left out: they need prompts of generated images, two "
                     "in a row the same in other words, and real images that answer both")  # fmt: skip
    for name, known in sets.statistics.items():
        if "fid" in wanted:
            if not known.of:
                notes.append(f"{known.name} does not say how its features were made; --protocol {settings.protocol} is "
                             f"taken: files of pytorch-fid need pytorch-fid, those of clean-fid clean")  # fmt: skip
            try:
                entry = _to_statistics(seen, fake, known)
            except ValueError as error:
                raise DataError(f"{fake.name} against {known.name}: {error}") from None
            outcome.runs[name] = {label: values | {"real": known.digest} for label, values in entry.items()}
    return outcome


# ------------------------------------------------------------------------------------------------ what can be measured


def _possible(name: str, sets: Sets, asked: Asked, settings: Settings) -> bool:
    """Whether the images allow a metric. Where not, an error if it was asked for by name, unless what is lacking is
    counted."""
    least = min(len(images) for images in (*sets.reals.values(), sets.fake))
    reason = ""
    if not sets.reals and name not in ("fid", "faithfulness", *OF_PROMPTS):
        reason = f"needs real images, and {', '.join(sets.statistics)} holds statistics, which only fid can be taken to"
    elif name in entries.LEAST or name in OF_THEIR_OWN and name not in OF_PROMPTS:
        need = entries.LEAST.get("dc" if name == "dino" else name, 2)
        need = max(need, settings.k + 1) if name in ("pr", "dino") else need
        if name == "is" and settings.protocol != ORGANISERS:
            least = len(sets.fake)
        if least < need:
            reason = f"needs at least {need} images in each set, and the smallest has {least}"
        if settings.protocol == ORGANISERS and name in FOREIGN:
            return False
    elif name == "memorisation":
        few = memorisation.FEWEST
        if sets.train is None:
            reason = "needs the training images: --train DIR"
        elif len(sets.train) < few:
            reason = f"needs at least {few} training images, and {sets.train.name} has {len(sets.train)}"
        elif sets.held_out and sum(map(len, sets.reals.values())) < few:
            reason = f"needs at least {few} held-out images"
    elif name == "faithfulness" or name in OF_PROMPTS:
        if not sets.fake.prompts:
            reason = f"needs the prompts of {sets.fake.name}: --prompts FILE, or the manifest.jsonl of sample.py"
    elif name == "classify":
        without = [images.name for images in (sets.fake, *sets.reals.values()) if not images.labels]
        if without:
            reason = f"needs the class of every image, and {without[0]} has none: class folders, or a column label"
    if reason and asked.lacking is not None:
        asked.lacking[name] = reason + _file_too(name, settings)
        return False
    if reason and name in asked.names:
        raise DataError(f"--metrics {name} {reason}")
    if reason and name in OF_INCEPTION:
        asked.notes.append(f"{name} is left out: it {reason}")
    return not reason


def _file_too(name: str, settings: Settings) -> str:
    """What a metric of prompts or classes lacks besides these: its network's file, where that is missing, too."""
    files = {"clip": extractors.CLIP_SCORE, "biomedclip": biomedclip.REPOSITORY,
             "classify": settings.classifier or vit.BACKBONE}  # fmt: skip
    try:
        if name in files and files[name] != "tiny":
            weights.find(files[name], settings.weights or None)
    except weights.WeightsNotFound as error:
        return f"; and {download(error)}"
    return ""


def _networks(
    wanted: Sequence[str], asked: Asked, toy_world: bool, settings: Settings, device: torch.device
) -> dict[str, Extractor]:
    """The networks that the metrics need: "main" for those of Inception, the others by their metric. What
    has no file is an error, or counted as lacking."""
    found: dict[str, Extractor] = {}
    lacking = asked.lacking
    more = settings.weights, settings.batch, device
    if OF_INCEPTION & set(wanted) or "memorisation" in wanted:
        try:
            if settings.protocol == ORGANISERS:
                if OF_INCEPTION & set(wanted):
                    found["main"] = extractors.organisers(settings.inception, *more)
            else:
                found["main"] = extractors.inception(settings.inception, settings.weights, settings.protocol, *more[1:])
        except weights.WeightsNotFound as error:
            stand_in = extractors.stand_in(*more) if toy_world and not settings.inception else None
            if stand_in is not None and settings.protocol != ORGANISERS:
                asked.notes.append(
                    f"{error}. Until then the toy world's own classifier stands in: good for comparing toy models "
                    f"only, and no FID"
                )
                found["main"] = stand_in
                if "is" in wanted and lacking is not None:
                    lacking["is"] = str(error)
                elif "is" in asked.names:
                    raise
            elif lacking is not None:
                lacking.update({name: str(error) for name in wanted if name in OF_INCEPTION})
            elif OF_INCEPTION & set(wanted):
                raise
            else:
                asked.notes.append(f"memorisation in pixels only: {error}")
    for name, make in OF_THEIR_OWN.items():
        if name in wanted:
            try:
                found[name] = make(*more)
            except weights.WeightsNotFound as error:
                if lacking is None:
                    raise
                lacking[name] = download(error)
    return found


def download(error: Exception) -> str:
    """What is missing and the command that gets it, without the places that were looked at."""
    said = re.fullmatch(r"(\S+) was not found at .*; get it with: (.*)", str(error), re.DOTALL)
    return f"{said[1]} is missing; get it with: {said[2]}" if said else str(error)


def _who(network: str, sets: Sets, wanted: Sequence[str]) -> Iterator[ImageSet]:
    """The sets that a network must look at."""
    yield from (sets.fake, *sets.reals.values())
    if network == "main" and "memorisation" in wanted and sets.train is not None:
        yield sets.train


# ---------------------------------------------------------------------------------------------------------- numbers


@dataclass
class Seen:
    """What networks made of the images: each network by its metric's name, "main" for those of Inception."""

    networks: dict[str, Extractor]
    found: dict[str, dict]  # {network: {images' hashes: {column: (N, ...)}}}
    settings: Settings
    device: torch.device  # where numbers are computed

    def pair(self, name: str, real: ImageSet, fake: ImageSet, column: str = "features") -> entries.Measured:
        """Two sets by one network."""
        network, settings = self.networks[name], self.settings
        stand_in = network.name in STAND_IN.replace("-", " ")
        protocol = network.name if stand_in else f"{network.name}, {network.protocol}"
        features = [self.found[name][images.hashes][column].to(self.device) for images in (real, fake)]
        protocol += {"tokens": ", class token of length 1"}.get(column, "")
        prefix = f"{STAND_IN.split()[0]} " if stand_in else ""
        how = entries.How(settings.intervals, settings.seed, settings.k, prefix)
        return entries.Measured(*features, protocol, network.network, how)


def _distances(wanted: Sequence[str], seen: Seen, real: ImageSet, fake: ImageSet) -> Entries:
    """Everything that compares features of one real set with those of the generated images."""
    networks, found, settings = seen.networks, seen.found, seen.settings
    results: Entries = {}
    for key, label in (("kfd", "KFD"), ("hfd", "HFD"), ("swav", "SwAV-FD")):
        if key in networks:
            results |= seen.pair(key, real, fake).frechet(label)
    if "fbd" in networks:
        tokens = seen.pair("fbd", real, fake, "tokens")
        results |= tokens.frechet("FBD") | _medvqa(tokens, real, fake)
    if "dino" in networks:
        dino = seen.pair("dino", real, fake)
        results |= dino.frechet("FD-DINOv2")
        among = _repeated(dino, ["pr", "dc", *({"fbeta", "authenticity", "vendi"} & set(wanted))])
        results |= {f"DINOv2 {name}": entry for name, entry in among.items()}
    if "cmmd" in networks:
        results |= seen.pair("cmmd", real, fake).cmmd()
    main = networks.get("main")
    if main is None:
        return results
    of_real, of_fake = found["main"][real.hashes], found["main"][fake.hashes]
    if settings.protocol == ORGANISERS:
        p, q = of_real["probabilities"], of_fake["probabilities"]
        theirs = entries.imageclef2024(p, q, main.network, settings.intervals, settings.seed)
        return {name: e for name, e in theirs.items() if name[:3].strip().lower() in wanted} | results
    sets = seen.pair("main", real, fake)
    first: Entries = {}
    if "fid" in wanted:
        first |= sets.frechet("Frechet distance" if sets.prefix else "FID")
    asked = {"kid", EVERYTHING} & set(settings.metrics.split(","))
    if "kid" in wanted and (asked or not sets.prefix):
        first |= sets.kernel()
    if "is" in wanted and "logits" in of_fake:
        logits = of_real["logits"] if settings.intervals else None
        first |= entries.inception_score(of_fake["logits"], logits, sets.protocol, main.network, len(real))
    return first | _repeated(sets, wanted) | results


def _radiomic(seen: Seen, real: ImageSet, fake: ImageSet) -> Entries:
    network, settings = seen.networks["frd"], seen.settings
    sides = [{key: seen.found["frd"][images.hashes][key] for key in ("features", "v0")} for images in (real, fake)]
    return entries.radiomic(*sides, network.protocol, settings.intervals, settings.seed)


def _to_statistics(seen: Seen, fake: ImageSet, known: Statistics) -> Entries:
    """The Frechet distance to the moments that a file holds."""
    network, settings, device = seen.networks["main"], seen.settings, seen.device
    if settings.protocol == ORGANISERS:
        raise ValueError(f"the protocol {ORGANISERS} is of class probabilities, and needs the real images")
    features = seen.found["main"][fake.hashes]["features"].to(device)
    mean, factor = known.mean.to(device), known.factor.to(device)
    protocol = f"{network.name}, {network.protocol}"
    if known.of and known.of != cached_as(network):
        raise ValueError(f"holds features of {known.of}, and those of the images are of {cached_as(network)}")
    label = STAND_IN if network.name in STAND_IN.replace("-", " ") else "FID"
    how = entries.How(settings.intervals, settings.seed)
    return {label: entries.frechet_to_statistics(features, mean, factor, protocol, network.network, how)}


def _repeated(sets: entries.Measured, wanted: Sequence[str]) -> Entries:
    """What is counted among neighbours and within a set, on the features of whichever network."""
    results: Entries = {}
    if "pr" in wanted:
        results |= sets.precision_recall()
    if "dc" in wanted:
        results |= sets.density_coverage()
    if "fbeta" in wanted:
        results |= sets.f_beta()
    if "authenticity" in wanted:
        results |= sets.authenticity()
    if "vendi" in wanted:
        results |= sets.vendi()
    return results


def _medvqa(sets: entries.Measured, real: ImageSet, fake: ImageSet) -> Entries:
    """MEDVQA-GI's numbers, where there are prompts: the first and second, third and fourth, ... are an objective where
    real images answer both."""
    places: dict[str, list[int]] = {}
    for row, prompts in enumerate(fake.prompts):
        places.setdefault(prompts[0], []).append(row)
    answer = [set(prompts) for prompts in real.prompts]
    told, objectives = list(places), []
    for one, other in zip(told[::2], told[1::2]):
        both = [row for row, prompts in enumerate(answer) if {one, other} <= prompts]
        if min(len(both), len(places[one]), len(places[other])) >= medvqa.LEAST:
            objectives.append(medvqa.Objective(sets.fake[places[one]], sets.fake[places[other]], sets.real[both]))
    each = [sets.fake[rows] for rows in places.values() if len(rows) >= medvqa.LEAST]
    counts = len(real), len(fake)
    return entries.medvqa2025(objectives, each, sets.protocol, sets.network, counts, sets.how)


def _memorisation(sets: Sets, eyes: Eyes, seen: Seen) -> tuple[memorisation.Memorisation, Entries]:
    """The nearest training image of every generated one, in small pixels and in features."""
    networks, settings = seen.networks, seen.settings
    held_out = imagesets.union("real", list(sets.reals.values())) if sets.held_out else None

    def spaces(images: ImageSet) -> dict[str, Tensor]:
        parts = images.parts or (images,)
        made = {"pixels": torch.cat([eyes.survey(eyes.look(part)).columns["small"].float() for part in parts])}
        if "main" in networks and settings.protocol != ORGANISERS:
            made["features"] = torch.cat([eyes.features(networks["main"], part)["features"] for part in parts])
        return made

    result = memorisation.examine(spaces(sets.train), spaces(sets.fake), spaces(held_out) if held_out else None)
    main = networks.get("main")
    network = {"network": main.network} if main and settings.protocol != ORGANISERS else {}
    about = {"n_real": len(sets.train), "n_fake": len(sets.fake), "train": sets.train.name} | network
    copies = entries.share([row in set(result.flagged) for row in range(len(sets.fake))], "") | about
    copies |= {"protocol": f"nearest training image, level {result.level:g}", "statistics": result.statistics()}
    results: Entries = {"copies of training images": copies}
    for name, space in result.spaces.items():
        results[f"nearer than held-out, {name}"] = about | {
            "value": space.nearer,
            "protocol": "share of pairs, 0.5 is chance",
            "p": space.p_set,
        }
    return result, results


def _faithfulness(fake: ImageSet, asked: Sequence[str]) -> Entries:
    images = (fake.image(row) for row in progress(range(len(fake)), f"{fake.name}, toy reader", "image"))
    judged = toyworld.faithfulness(images, [prompts[0] for prompts in fake.prompts])
    if not judged and "faithfulness" in asked:
        raise DataError(f"--metrics faithfulness: no prompt of {fake.name} is of the toy world's grammar")
    return {label: entries.share(answers, "toy reader") for label, answers in judged.items()}


def _clip_score(sets: Sets, name: str, seen: Seen) -> Entries:
    """Agreement of every generated image with its first prompt; beside it the real ones', where they have any."""
    network, settings = seen.networks[name], seen.settings

    def pairs(images: ImageSet) -> tuple[Tensor, Tensor]:
        places: dict[str, int] = {}  # each prompt once
        rows = [places.setdefault(prompts[0], len(places)) for prompts in images.prompts]
        with working(f"{images.name}, {network.name} of {len(places):,} prompts"):
            texts = read(list(places), settings.weights, settings.batch, seen.device)
        return seen.found[name][images.hashes]["features"], texts[rows]

    label, read = OF_PROMPTS[name]
    told = [real for real in sets.reals.values() if real.prompts]
    own = torch.cat([scores.clip_scores(*pairs(real)) for real in told]) if told and settings.intervals else None
    protocol = f"{network.name}, {network.protocol}, first prompt"
    return entries.clip_score(*pairs(sets.fake), protocol, network.network, own, label)


def classify(sets: Sets, settings: Settings, device: torch.device | str = "cpu") -> Entries:
    """Med-Art's Table 4: a classifier trained on generated images, and one on real ones, tested on real ones."""
    tests = (
        imagesets.union("real", list(sets.reals.values())) if len(sets.reals) > 1 else next(iter(sets.reals.values()))
    )
    rows = {"generated": sets.fake}
    if sets.held_out and sets.train is not None and sets.train.labels:
        rows["real"] = sets.train
    classes = sorted({label for images in (tests, *rows.values()) for label in images.labels})
    start = settings.classifier or vit.BACKBONE
    start = start if start == "tiny" else weights.find(start, settings.weights or None)

    def labelled(images: ImageSet) -> downstream.Labelled:
        decoded = (images.image(row) for row in range(len(images)))
        return downstream.Labelled(decoded, [classes.index(label) for label in images.labels])

    results: Entries = {}
    for name, images in rows.items():
        result = downstream.run(start, labelled(images), labelled(tests), len(classes), device=device)
        truth = torch.tensor([classes.index(label) for label in tests.labels])
        results |= _scores(name, truth, torch.from_numpy(result.probabilities), result, len(images), settings)
    return results


SCORES = {"f1_macro": "F1 macro", "f1_weighted": "F1 weighted", "balanced_accuracy": "balanced accuracy",
          "auc_macro": "AUC macro", "auc_weighted": "AUC weighted"}  # fmt: skip


def _scores(name: str, truth: Tensor, probabilities: Tensor, result, n_train: int, settings) -> Entries:
    table = torch.cat([truth[:, None].double(), probabilities], 1)  # (N, 1 + classes)

    def values(rows: Tensor) -> list[float]:
        found = downstream.scores(rows[:, 0].long().numpy(), rows[:, 1:].numpy())
        return [float("nan") if found[key] is None else found[key] for key in SCORES]

    ends = [None] * len(SCORES)
    if settings.intervals and len(table) >= 2 * entries.GROUPS:
        ends = uncertainty.intervals(values, table, groups=entries.GROUPS, seed=settings.seed, support=(0.0, 1.0))
    recipe = result.recipe
    start = Path(settings.classifier or vit.BACKBONE).name
    how = f"{start} trained on {n_train:,} {name} images, AdamW {recipe.lr:g}, {recipe.epochs} epochs; tested on real"
    found: Entries = {}
    for (key, label), pair in zip(SCORES.items(), ends):
        entry = {"value": result.scores[key], "protocol": how, "n_real": len(table), "n_fake": n_train}
        if pair is not None and all(end == end for end in pair):
            entry |= entries.interval(pair, entries.jackknife(entries.GROUPS))
        found[f"classifier {label} [{name}]"] = entry
    return found
