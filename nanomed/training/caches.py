"""What the frozen parts of a system make of the training data, computed once and kept on disk."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nanomed import weights
from nanomed.data.buckets import Shape
from nanomed.data.images import to_unit
from nanomed.data.table import Table
from nanomed.run.cache import Cache, Columns
from nanomed.run.progress import progress
from nanomed.run.ranks import Ranks
from nanomed.training.batches import Batches, ByShape, Kept, Samples, View, framed, pixels


def batches(config, system, stage: str, table: Table, ranks: Ranks) -> Batches:
    """Training batches of a stage. What its frozen parts make of images and prompts is computed once and kept on disk.

    A cached image has `config.views` random crops and colour jitters, and one of each flip for samples without a
    prompt; a cached field is a distribution's moments or a text's states, so draws from them stay fresh. With
    views = 0 images are decoded, cropped and encoded anew every time.
    """
    frozen, how = system.frozen(stage), samples(config, system, stage)
    images = texts = None
    prompts: list[str] = []
    if "image" in frozen and config.views:
        images = _images(config.cache, system, frozen["image"], table, how, ranks)
    if "text" in frozen and how.join == 1:  # joined prompts are too many to keep
        prompts = sorted({"", *(text for row in table.rows for text in (*row.prompts, *row.paraphrases))})
        texts = _texts(config.cache, system, frozen["text"], prompts, ranks)
    kept = Kept(images, texts, {text: i for i, text in enumerate(prompts)})
    return Batches(table.rows, how, config.batch, ranks, kept, config.accumulate)


def samples(config, system, stage: str) -> Samples:
    """How a stage's samples are made; an autoencoder sees centre crops of images as they are."""
    if not system.uses_text(stage):
        return Samples(system.size, config.seed, pairs=False, augment=False, jitter=system.jitter)
    return Samples(
        system.size,
        config.seed,
        dropout=system.dropout if config.dropout is None else config.dropout,
        augment=config.augment,
        jitter=system.jitter,
        views=config.views,
        replace={"some": 0.5, "all": 1.0}.get(config.strategy, 0.0) if config.paraphrases else 0.0,
        join=getattr(config, "join", 1),
        places=getattr(config, "places", 0.0),
        places_first=getattr(config, "places_first", 0) * config.accumulate,
        flips=getattr(config, "flips", True),
        trimmed=system.trimmed,
        shapes=shapes(config, system, stage),
    )


def shapes(config, system, stage: str) -> tuple[Shape, ...]:
    """Heights and widths of a stage's images, where `--buckets` asks for several; an autoencoder's are squares."""
    return system.bucket_shapes() if getattr(config, "buckets", False) and system.uses_text(stage) else ()


def images_of(table: Table, size: int, device: torch.device, batch: int = 32) -> Iterator[Tensor]:
    """All images of a table once, centre-cropped, in batches (B, 3, size, size) in [-1, 1]."""
    for start in progress(range(0, len(table.rows), batch), "all images once", "batch"):
        rows = table.rows[start : start + batch]
        yield torch.stack([to_unit(pixels(row, size, 0, View(0), augment=False)) for row in rows]).to(device)


def _images(cache: str, system, frozen: tuple, table: Table, how: Samples, ranks: Ranks) -> Columns | ByShape:
    (parts, encode), looks = frozen, how.looks
    fingerprints = [weights.fingerprint(system.get_submodule(part)) for part in parts.split()]

    def columns(numbers: Sequence[int], shape: Shape | None) -> Columns:
        """Of rows of the table, in squares or in a shape."""

        def look(i: int) -> tuple:
            row, view = table.rows[numbers[i // len(looks)]], looks[i % len(looks)]
            if shape is None:
                return pixels(row, how.size, how.seed, view, how.augment, how.jitter), ()
            return framed(row, shape, how.seed, view, how.augment, how.jitter)

        @torch.inference_mode()
        def make(rows: list[int]) -> dict[str, Tensor]:
            arrays, sizes = zip(*(look(i) for i in rows))
            fields = encode(torch.stack([to_unit(array) for array in arrays]).to(ranks.device))
            return fields | ({"sizes": torch.tensor(sizes)} if shape else {})

        key = {
            "fields": f"{parts} of images",
            "weights": fingerprints,
            "images": [
                [table.rows[number].file.name, table.sums[number], *filter(None, [table.rows[number].range])]
                for number in numbers
            ],
            "size": how.size, "views": [[look.number, *look.flip] for look in looks], "augment": how.augment,
            "jitter": how.jitter, "pad": system.pad, "seed": how.seed,
        }  # fmt: skip
        key = key | ({"pad": False, "shape": shape} if shape else {})
        return Cache(cache, ranks).read(key, len(numbers) * len(looks), make, what=str(key["fields"]))

    if not how.shapes:
        return columns(range(len(table.rows)), None)
    places, kept, where = how.shaped(table.rows), [], {}
    for place in sorted(set(places)):
        numbers = [i for i, other in enumerate(places) if other == place]
        for at, number in enumerate(numbers):
            where |= {number * len(looks) + k: (len(kept), at * len(looks) + k) for k in range(len(looks))}
        kept.append(columns(numbers, how.shapes[place]))
    return ByShape(kept, [where[i] for i in range(len(where))])


def _texts(cache: str, system, frozen: tuple, prompts: list[str], ranks: Ranks) -> Columns:
    parts, encode = frozen

    @torch.inference_mode()
    def make(rows: list[int]) -> dict[str, Tensor]:
        return encode([prompts[i] for i in rows])

    networks = " ".join(weights.fingerprint(system.get_submodule(part)) for part in parts.split())
    key = {"fields": f"{parts} of prompts", "weights": networks, "prompts": prompts}
    if system.pieces > 1:
        key["pieces"] = system.pieces
    return Cache(cache, ranks).read(key, len(prompts), make, what=str(key["fields"]))
