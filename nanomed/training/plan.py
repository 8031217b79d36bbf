"""The dry run: what a stage would cost, before it is started."""

import time

import torch

from nanomed.run.hardware import autocast, peak_memory
from nanomed.run.progress import working
from nanomed.training.caches import shapes
from nanomed.training.optimizer import adamw, clip_gradients
from nanomed.training.placement import gigabytes, places_of


def dry_run(config, system, stage: str, device: torch.device) -> None:
    """Print what a stage would cost: parameters, memory, seconds a step, hours, disk.

    Two real steps are made. On a CPU they use batches of 1 and 2 samples and the rest is extrapolated along a line.
    """
    if config.rank:
        system.adapt(stage, config.rank, config.alpha or None, config.adapter)
    params = system.trainable(stage)
    for part, place in places_of(config.frozen, system, stage).items():
        if place == "cpu":
            system.get_submodule(part).cpu()
    optimizer = adamw(params.values(), lr=0.0)
    if several := shapes(config, system, stage):
        largest = max(several, key=lambda shape: shape[0] * shape[1])  # the square, where its area is the limit
        if largest != (system.size, system.size):
            system.latent_shape = system.latent_size(*largest)
        print(f"--buckets: {len(several)} shapes, measured at the largest, {largest[0]} x {largest[1]} pixels")

    def steps(batch: int) -> tuple[float, float]:
        for _ in range(2):  # the first one also allocates the optimizer's state
            start = time.monotonic()
            with autocast(config.precision, device):
                loss = system(system.example(stage, batch, device), stage, 1)["loss"]
            loss.backward()
            clip_gradients(list(params.values()), config.clip)
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
        return time.monotonic() - start, peak_memory(device)

    sizes = [config.batch] if device.type == "cuda" or config.batch <= 2 else [1, 2]
    with working(f"stage {stage}: two steps as a trial"):
        measured = [steps(size) for size in sizes]
    seconds, peak = measured[-1]
    note = ""
    if len(measured) == 2:
        extra = config.batch - 2
        seconds += extra * max(measured[1][0] - measured[0][0], measured[1][0] / 2)
        peak += extra * max(measured[1][1] - measured[0][1], 0)
        note = f" (extrapolated to batch {config.batch} from batches of 1 and 2)"
    trained = sum(p.numel() for p in params.values())
    if device.type == "cpu":  # weights that are zeros nobody has written to are in no process's memory yet
        hollow = [part for name, part in system.named_children() if name not in system.shapes]
        peak += sum(p.nbytes for part in hollow for p in part.parameters() if not p.requires_grad)
    print(f"stage {stage}")
    for part, module in system.named_children():
        count = sum(p.numel() for p in module.parameters())
        print(f"  {part:14} {count:>13,} parameters{'  trained' if part in system.stages[stage] else ''}")
    print(f"  {'total':14} {sum(p.numel() for p in system.parameters()):>13,} parameters, {trained:,} trained")
    print(f"  peak memory    {peak / 1e9:.1f} GB on {device}{note}")
    print(f"  one step       {seconds * config.accumulate:.2f} s, {config.batch * config.accumulate} samples{note}")
    if config.epochs:  # how many steps they are, the data decide, which are not read
        each = seconds / config.batch * 1000 / 3600
        print(f"  {config.epochs:g} epochs      {each * config.epochs:.2f} hours on this device for each 1,000 samples")
    else:
        print(f"  {config.steps:,} steps {seconds * config.accumulate * config.steps / 3600:.1f} hours on this device")
    _print_memory(config, system, stage, trained)
    copies = 3 + bool(config.ema)  # weights, two moments, the average
    print(f"  disk           {(config.keep + 1) * copies * 4 * trained / 1e9:.1f} GB of checkpoints\n")


def _print_memory(config, system, stage: str, trained: int) -> None:
    """The arithmetic on shapes: as asked for, and with the frozen parts in the other places."""
    steps = system.activations(stage, config.batch)
    for name, held in steps.items():
        print(f"  {name:28} {held / 1e9:6.2f} GB of activations")
    for label, asked in (("", config.frozen), (", --frozen cpu", "cpu"), (", --frozen share over 2", "share")):
        gb = gigabytes(system, places_of(asked, system, stage), trained, max(steps.values()), 2)
        fits = [f"{size} GB" for size in (24, 40, 80) if gb < 0.95 * size] or ["none of 24, 40, 80 GB"]
        print(f"  {'in all' + label:28} {gb:6.2f} GB, fits a card of {', '.join(fits)}")
