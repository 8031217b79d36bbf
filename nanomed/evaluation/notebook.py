"""`nanomed.evaluate(real, fake)`: what evaluate.py measures, of folders or of images in memory, as a table that a
notebook shows."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from nanomed.data import ranges
from nanomed.evaluation import imagesets, measuring, reports, table, webpage
from nanomed.evaluation.imagesets import ImageSet
from nanomed.metrics.entries import Entries
from nanomed.run.flags import UsageError
from nanomed.run.ranks import Ranks, device_of

Images = str | Path | Sequence[Image.Image]


class Results(dict):
    """{metric: entry}, what results.json holds; `notes` says what to know of the images. Printed it is a table."""

    notes: list[str]

    def __init__(self, entries: Entries, notes: Sequence[str] = ()):
        super().__init__(json.loads(json.dumps(entries)))  # as the file has them: lists, no tuples
        self.notes = list(notes)

    def __repr__(self) -> str:
        return "\n".join([table.full(self), *(f"note: {note}" for note in self.notes)])

    __str__ = __repr__

    def _repr_html_(self) -> str:
        return webpage.measures(self) + webpage.bullets(self.notes)


def evaluate(
    real: Images, fake: Images, metrics: str = "", train: Images | None = None, **settings: str | int | bool
) -> Results:
    """Measure generated images against real ones.

    real, fake   a folder, a data set as train.py names it, or a list of PIL images
    metrics      such as "fid,kid,colour", or "all"; "": the usual ones, as far as images and files allow
    train        what the model was trained on, for memorisation; None: the real images
    settings     protocol, weights, cache, range, batch, seed, intervals, skip_bad: as evaluate.py's flags

    Raises DataError for images that cannot be read or are too few for what was asked for by name, UsageError for a
    metric that there is none of, WeightsNotFound for a network's file.
    """
    asked = tuple(name.strip() for name in metrics.split(",") if name.strip())
    if unknown := [name for name in asked if name not in (*measuring.METRICS, measuring.EVERYTHING)]:
        raise UsageError(f"metrics {unknown[0]}: choose among {', '.join(measuring.METRICS)}, or all")
    if "classify" in asked:
        raise UsageError("metrics classify trains a network: python evaluate.py --metrics classify does it")
    how = measuring.Settings(metrics=metrics, **settings)  # type: ignore[arg-type]
    ranges.judge(how.range)
    with tempfile.TemporaryDirectory() as room, torch.inference_mode():
        given = {"real": real, "fake": fake} | ({} if train is None else {"train": train})
        found = {name: _set(images, name, Path(room), how) for name, images in given.items()}
        known = found.get("train", found["real"])
        folders = [str(images) if isinstance(images, (str, Path)) else "" for images in (real, fake)]
        notes = imagesets.suspicions({folders[0]: found["real"]} if folders[0] else {}, folders[1], found["fake"])
        sets = measuring.Sets({"real": found["real"]}, found["fake"], known, train is not None, notes=notes)
        measuring.exactly()
        outcome = measuring.measure(sets, asked, how, Ranks(device=device_of(float64=True)))
    assert outcome is not None
    notes = [*outcome.notes, *(f"not measured: {line}" for line in reports.lacking(outcome))]
    return Results(outcome.results, notes)


def _set(images: Images, name: str, room: Path, how: measuring.Settings) -> ImageSet:
    """A set by its name, or of images that are written down without loss for as long as it takes."""
    if isinstance(images, (str, Path)):
        folder = str(images)
        found = imagesets.find(folder, name, cache=how.cache, span=how.range)
        return imagesets.with_prompts(found, folder, "") if name == "fake" else found
    images = list(images)
    if odd := [type(image).__name__ for image in images if not isinstance(image, Image.Image)]:
        raise UsageError(f"{name}: a list of PIL images is expected, and one is a {odd[0]}")
    if not images:
        raise UsageError(f"{name}: a list without images")
    (room / name).mkdir()
    for i, image in enumerate(images):
        image.convert("RGB").save(room / name / f"{i:06d}.png")  # the bytes of sample.py, so the hashes agree
    return imagesets.find(str(room / name), name, cache=how.cache)
