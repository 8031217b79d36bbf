"""What surrounds the training loop: batches with their caches, the judge of a checkpoint, the dry run, the finish."""

import time
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from nanomed import files, runtime, weights
from nanomed.cache import cached
from nanomed.data.batches import Batches, View, pixels, views
from nanomed.data.images import to_unit
from nanomed.data.table import Table


def batches(config, system, stage: str, table: Table, rank: int, world: int, device: torch.device) -> Batches:
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
        columns = _cached_images(config, system, *frozen["image"], table, looks, augment, rank, world, device)
    if "text" in frozen and config.join == 1:  # joined prompts are too many to keep
        texts = _cached_texts(config, system, *frozen["text"], table, rank, world)
        if config.offload:
            system.offload(frozen["text"][0])
    replace = {"some": 0.5, "all": 1.0}.get(config.strategy, 0.0) if config.paraphrases else 0.0
    return Batches(
        table.rows,
        system.size,
        config.batch,
        config.seed,
        rank,
        world,
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


def _cached_images(config, system, part, encode, table, looks, augment, rank, world, device):
    @torch.inference_mode()
    def make(rows: list[int]) -> dict[str, Tensor]:
        each = [
            pixels(table.rows[i // len(looks)], system.size, config.seed, looks[i % len(looks)], augment, system.jitter)
            for i in rows
        ]
        return encode(torch.stack([to_unit(array) for array in each]).to(device))

    key = {
        "fields": f"{part} of images", "weights": [weights.fingerprint(system.get_submodule(p)) for p in part.split()],
        "images": [[row.file.name, files.sha256(row.file)] for row in table.rows],
        "size": system.size, "views": [[look.number, *look.flip] for look in looks], "augment": augment,
        "jitter": system.jitter, "pad": system.pad, "seed": config.seed,
    }  # fmt: skip
    return cached(config.cache, key, len(table.rows) * len(looks), make, 32, rank, world, runtime.barrier)


def _cached_texts(config, system, part, encode, table, rank, world):
    prompts = sorted({"", *(text for row in table.rows for text in (*row.prompts, *row.paraphrases))})

    @torch.inference_mode()
    def make(rows: list[int]) -> dict[str, Tensor]:
        return encode([prompts[i] for i in rows])

    key = {
        "fields": f"{part} of prompts", "weights": weights.fingerprint(system.get_submodule(part)), "prompts": prompts,
    }  # fmt: skip
    return {text: i for i, text in enumerate(prompts)}, cached(
        config.cache, key, len(prompts), make, 32, rank, world, runtime.barrier
    )


def images_of(table: Table, size: int, device: torch.device, batch: int = 32) -> Iterator[Tensor]:
    """All images of a table once, centre-cropped, in batches (B, 3, size, size) in [-1, 1]."""
    for start in range(0, len(table.rows), batch):
        rows = table.rows[start : start + batch]
        yield torch.stack([to_unit(pixels(row, size, 0, View(0), augment=False)) for row in rows]).to(device)


class Judge:
    """Looks at a stage from outside: the loss on held-out images, a grid, and the number to choose the best by.

    That number is a Frechet distance between held-out images and images of fixed prompts and seeds where a feature
    network is at hand (`measure` says which), else the validation loss.
    """

    def __init__(self, config, system, stage, run, valid: Table, rank: int, world: int, device: torch.device):
        self.config, self.system, self.stage, self.run = config, system, stage, run
        self.valid, self.rank, self.world, self.device = valid, rank, world, device
        self.draws = system.uses_text(stage)
        self.distance, self.measure = None, "validation loss"
        if self.draws and config.score_images:
            from nanomed.metrics.features import frechet_to

            arrays = [pixels(row, system.size, 0, View(0), augment=False) for row in valid.rows]
            self.distance, name = frechet_to(arrays, toy=config.data.startswith("toy"), folder=config.weights or None)
            self.measure = name or self.measure
        self.prompts = self._grid_prompts() if self.draws else []
        if rank == 0:
            print(f"stage {stage}: the best checkpoint is the one of the lowest {self.measure}")

    def _grid_prompts(self) -> list[str]:
        if self.config.grid_prompts:
            from nanomed.data.prompts import read_prompts

            return read_prompts(self.config.grid_prompts)[: max(self.config.score_images, 16)]
        pairs = [prompt for row in self.valid.rows for prompt in row.prompts]
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(self.config.seed))
        return [pairs[i] for i in order[: max(self.config.score_images, 16)].tolist()]

    @torch.no_grad()
    def __call__(self, step: int, ema: runtime.EMA | None) -> float:
        """Validate, draw the grid and return the score of the averaged weights; every rank gets the same number."""
        with ema.swapped() if ema else nullcontext():
            self.system.eval()
            loss = self._loss()
            images = self._draw() if self.draws else self._reconstruct()
            if self.rank == 0 and len(images):
                name = f"{self.stage}-step-{step:06d}.png"
                files.write_png(self.run.folder / "samples" / name, grid(images[:16]))
            score = self.distance(images) if self.distance else loss
        self.system.trainable(self.stage)
        self.run.log(
            stage=self.stage, step=step, valid_loss=round(loss, 6), score=round(score, 6), score_is=self.measure
        )
        return score

    def _loss(self) -> float:
        """The training loss on held-out samples at fixed noise and timesteps, the ranks sharing the batches."""
        batch = min(self.config.batch, 32)
        held_out = Batches(self.valid.rows, self.system.size, batch, seed=0, pairs=self.draws, augment=False)
        total = count = 0
        for i in range(min(8, -(-len(held_out.items) // batch)))[self.rank :: self.world]:
            torch.manual_seed(runtime.seed_of("validation", i))
            inputs = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in held_out[i].items()}
            total += self.system(inputs, self.stage, 0)["loss"].item()
            count += 1
        held_out.close()
        return runtime.mean_over_ranks(total / max(count, 1), count, self.device)

    def _draw(self) -> Tensor:
        """uint8 images (N, S, S, 3) of the fixed prompts, each from its own seed; the ranks share the work."""
        batch, drawn = 16, []
        for start in list(range(0, len(self.prompts), batch))[self.rank :: self.world]:
            prompts = self.prompts[start : start + batch]
            noise = runtime.ImageNoise(self.config.seed, range(start, start + len(prompts)), self.device)
            with runtime.autocast(self.config.precision, self.device):
                drawn.append(self.system.sample(prompts, noise).float())
        mine = (
            files.to_bytes(torch.cat(drawn))
            if drawn
            else torch.empty(0, self.system.size, self.system.size, 3, dtype=torch.uint8)
        )
        return runtime.gather_rows(mine, len(self.prompts), batch, self.rank, self.world, self.device)

    def _reconstruct(self) -> Tensor:
        """Held-out images, each followed by what the autoencoder makes of it."""
        images = next(images_of(self.valid, self.system.size, self.device, batch=8))
        pairs = torch.stack([images, self.system.reconstruct(images)], dim=1).flatten(0, 1)
        return files.to_bytes((pairs.float() / 2 + 0.5).clamp(0, 1))


def grid(images: Tensor) -> Tensor:
    """uint8 images (N, S, S, 3) side by side, as near to a square as N allows."""
    columns = max(d for d in range(1, int(len(images) ** 0.5) + 1) if len(images) % d == 0)
    columns = len(images) // columns
    rows = images.unflatten(0, (-1, columns))  # (R, C, S, S, 3)
    return rows.permute(0, 2, 1, 3, 4).flatten(0, 1).flatten(1, 2)


def dry_run(config, system, stage: str, device: torch.device) -> None:
    """Print what a stage would cost: parameters, memory, seconds a step, hours, disk.

    Two real steps are made. On a CPU they use batches of 1 and 2 samples and the rest is extrapolated along a line.
    """
    if config.rank:
        system.adapt(stage, config.rank, config.alpha or None, config.adapter)
    params = system.trainable(stage)
    optimizer = runtime.AdamW(params.values(), lr=0.0)

    def steps(batch: int) -> tuple[float, float]:
        for _ in range(2):  # the first one also allocates the optimizer's state
            start = time.monotonic()
            with runtime.autocast(config.precision, device):
                loss = system(system.example(stage, batch, device), stage, 1)["loss"]
            loss.backward()
            runtime.clip_gradients(list(params.values()), config.clip)
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
        return time.monotonic() - start, runtime.peak_memory(device)

    sizes = [config.batch] if device.type == "cuda" or config.batch <= 2 else [1, 2]
    measured = [steps(size) for size in sizes]
    seconds, memory = measured[-1]
    note = ""
    if len(measured) == 2:
        extra = config.batch - 2
        seconds += extra * max(measured[1][0] - measured[0][0], measured[1][0] / 2)
        memory += extra * max(measured[1][1] - measured[0][1], 0)
        note = f" (extrapolated to batch {config.batch} from batches of 1 and 2)"
    trained = sum(p.numel() for p in params.values())
    print(f"stage {stage}")
    for part, module in system.named_children():
        count = sum(p.numel() for p in module.parameters())
        print(f"  {part:14} {count:>13,} parameters{'  trained' if part in system.stages[stage] else ''}")
    print(f"  {'total':14} {sum(p.numel() for p in system.parameters()):>13,} parameters, {trained:,} trained")
    print(f"  peak memory    {memory / 1e9:.1f} GB on {device}{note}")
    print(f"  one step       {seconds * config.accumulate:.2f} s, {config.batch * config.accumulate} samples{note}")
    print(f"  {config.steps:,} steps {seconds * config.accumulate * config.steps / 3600:.1f} hours on this device")
    for name, gb in system.memory(stage, config.batch).items():
        fits = [f"{size} GB" for size in (24, 40, 80) if gb < 0.95 * size] or ["none of 24, 40, 80 GB"]
        print(f"  {name:28} {gb:5.1f} GB" + (f", fits a card of {', '.join(fits)}" if "in all" in name else ""))
    copies = 3 + bool(config.ema)  # weights, two moments, the average
    print(f"  disk           {(config.keep + 1) * copies * 4 * trained / 1e9:.1f} GB of checkpoints\n")


def draw_and_evaluate(config, system, run, valid: Table, rank: int, world: int, device: torch.device) -> dict:
    """Draw the prompts of `config.test_prompts` with sample.py and measure them with evaluate.py."""
    import evaluate
    import sample
    from nanomed.data.prompts import read_prompts

    out = run.folder / "test"
    settings = sample.Config(prompts=config.test_prompts, out=str(out), seed=config.seed)
    sample.draw(system, read_prompts(config.test_prompts), settings, rank, world, device, progress=True)
    return evaluate.of_run(out, [row.file for row in valid.rows], config) if rank == 0 else {}
