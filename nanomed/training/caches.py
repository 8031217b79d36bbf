"""What the frozen parts of a system make of the training data, computed once and kept on disk."""

from collections.abc import Iterator

import torch
from torch import Tensor

from nanomed import weights
from nanomed.data.images import to_unit
from nanomed.data.table import Table
from nanomed.run import files
from nanomed.run.cache import cached
from nanomed.run.ranks import Ranks
from nanomed.training.batches import Batches, View, pixels, views


def batches(config, system, stage: str, table: Table, ranks: Ranks) -> Batches:
    """Training batches of a stage. What its frozen parts make of images and prompts is computed once and kept on disk.

    A cached image has `config.views` random crops and colour jitters, and one of each flip for samples without a
    prompt; a cached field is a distribution's moments or a text's states, so draws from them stay fresh. With
    views = 0 images are decoded, cropped and encoded anew every time.
    """
    frozen = system.frozen(stage)
    pairs = system.uses_text(stage)
    augment = config.augment and pairs  # the autoencoder sees centre crops as they are
    dropout = (system.dropout if config.dropout is None else config.dropout) if pairs else 0.0
    columns = texts = None
    if "image" in frozen and config.views:
        looks = views(config.views, flips=dropout > 0)
        columns = _cached_images(config, system, *frozen["image"], table, looks, augment, ranks)
    if "text" in frozen and config.join == 1:  # joined prompts are too many to keep
        texts = _cached_texts(config, system, *frozen["text"], table, ranks)
        if config.offload:
            system.offload(frozen["text"][0])
    replace = {"some": 0.5, "all": 1.0}.get(config.strategy, 0.0) if config.paraphrases else 0.0
    return Batches(
        table.rows,
        system.size,
        config.batch,
        config.seed,
        ranks.rank,
        ranks.world,
        pairs=pairs,
        dropout=dropout,
        augment=augment,
        view_count=config.views,
        columns=columns,
        texts=texts,
        replace=replace,
        join=config.join if pairs else 1,
        places=config.places if pairs else 0.0,
        places_first=config.places_first * config.accumulate if pairs else 0,
        jitter=system.jitter,
    )


def images_of(table: Table, size: int, device: torch.device, batch: int = 32) -> Iterator[Tensor]:
    """All images of a table once, centre-cropped, in batches (B, 3, size, size) in [-1, 1]."""
    for start in range(0, len(table.rows), batch):
        rows = table.rows[start : start + batch]
        yield torch.stack([to_unit(pixels(row, size, 0, View(0), augment=False)) for row in rows]).to(device)


def _cached_images(config, system, part, encode, table, looks, augment, ranks):
    @torch.inference_mode()
    def make(rows: list[int]) -> dict[str, Tensor]:
        each = [
            pixels(table.rows[i // len(looks)], system.size, config.seed, looks[i % len(looks)], augment, system.jitter)
            for i in rows
        ]
        return encode(torch.stack([to_unit(array) for array in each]).to(ranks.device))

    key = {
        "fields": f"{part} of images", "weights": [weights.fingerprint(system.get_submodule(p)) for p in part.split()],
        "images": [[row.file.name, files.sha256(row.file)] for row in table.rows],
        "size": system.size, "views": [[look.number, *look.flip] for look in looks], "augment": augment,
        "jitter": system.jitter, "pad": system.pad, "seed": config.seed,
    }  # fmt: skip
    return cached(config.cache, key, len(table.rows) * len(looks), make, 32, ranks)


def _cached_texts(config, system, part, encode, table, ranks):
    prompts = sorted({"", *(text for row in table.rows for text in (*row.prompts, *row.paraphrases))})

    @torch.inference_mode()
    def make(rows: list[int]) -> dict[str, Tensor]:
        return encode([prompts[i] for i in rows])

    key = {
        "fields": f"{part} of prompts", "weights": weights.fingerprint(system.get_submodule(part)), "prompts": prompts,
    }  # fmt: skip
    return {text: i for i, text in enumerate(prompts)}, cached(
        config.cache, key, len(prompts), make, 32, ranks
    )
