"""The dry run: what a stage would cost, before it is started."""

import time

import torch

from nanomed.run.hardware import autocast, peak_memory
from nanomed.training.optimizer import AdamW, clip_gradients


def dry_run(config, system, stage: str, device: torch.device) -> None:
    """Print what a stage would cost: parameters, memory, seconds a step, hours, disk.

    Two real steps are made. On a CPU they use batches of 1 and 2 samples and the rest is extrapolated along a line.
    """
    if config.rank:
        system.adapt(stage, config.rank, config.alpha or None, config.adapter)
    params = system.trainable(stage)
    optimizer = AdamW(params.values(), lr=0.0)

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
    for name, gb in system.memory(stage, config.batch).items():
        fits = [f"{size} GB" for size in (24, 40, 80) if gb < 0.95 * size] or ["none of 24, 40, 80 GB"]
        print(f"  {name:28} {gb:5.1f} GB" + (f", fits a card of {', '.join(fits)}" if "in all" in name else ""))
    copies = 3 + bool(config.ema)  # weights, two moments, the average
    print(f"  disk           {(config.keep + 1) * copies * 4 * trained / 1e9:.1f} GB of checkpoints\n")
