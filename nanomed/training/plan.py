"""The dry run: what a stage would cost, before it is started."""

import time

import torch

from nanomed.run.hardware import autocast, peak_memory
from nanomed.training.optimizer import adamw, clip_gradients
from nanomed.training.placement import memory, places_of


def dry_run(config, system, stage: str, device: torch.device) -> None:
    """Print what a stage would cost: parameters, memory, seconds a step, hours, disk.

    Two real steps are made. On a CPU they use batches of 1 and 2 samples and the rest is extrapolated along a line.
    """
    if config.rank:
        system.adapt(stage, config.rank, config.alpha or None, config.adapter)
    params = system.trainable(stage)
    optimizer = adamw(params.values(), lr=0.0)

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
    _print_memory(config, system, stage)
    copies = 3 + bool(config.ema)  # weights, two moments, the average
    print(f"  disk           {(config.keep + 1) * copies * 4 * trained / 1e9:.1f} GB of checkpoints\n")


def _print_memory(config, system, stage: str) -> None:
    """The arithmetic on shapes: what asked for, and the other places that the frozen parts can have."""
    own = places_of(config.frozen, system, stage, bool(config.rank))
    table = memory(system, stage, config.batch, own, 2)
    others = {"cpu": 1, "share": 2} if own else {}
    whole = {"in all": table.pop("in all")}
    for place, ranks in others.items():
        label = "in all, --frozen cpu" if place == "cpu" else f"in all, --frozen share over {ranks}"
        moved = places_of(place, system, stage, bool(config.rank))
        if place == "cpu":  # a part whose adapter trains stays
            moved = {part: where for part, where in moved.items() if part not in system.stages[stage]}
        whole[label] = memory(system, stage, config.batch, moved, ranks)["in all"]
    for name, gb in table.items():
        print(f"  {name:28} {gb:6.2f} GB")
    for name, gb in whole.items():
        fits = [f"{size} GB" for size in (24, 40, 80) if gb < 0.95 * size] or ["none of 24, 40, 80 GB"]
        print(f"  {name:28} {gb:6.2f} GB, fits a card of {', '.join(fits)}")
