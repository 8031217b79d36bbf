"""The dry run: what a stage would cost, before it is started.

Memory is counted on shapes (shadow.py), so that the largest system says on any machine which card it fits. A GPU makes
real steps besides, and says what its allocator held in them. A CPU makes them where they take seconds; else the time of
one is that of its floating-point operations at half the pace of a large layer here.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from nanomed.run.progress import working
from nanomed.training.caches import shapes
from nanomed.training.placement import gigabytes, places_of
from nanomed.training.shadow import Cost, cost_of, descent_of, one_step

CARDS = (8, 12, 16, 24, 40, 80)  # gigabytes
PATIENCE = 20  # seconds that two steps may take on a CPU
SLOWER = 2.0  # than one layer's products are networks: 1.4 to 2.5 for eight of 10 to 90 GFLOP a step, in fp32 and bf16


def dry_run(config, system, stage: str, device: torch.device) -> None:
    """Print what a stage would cost: parameters, memory, seconds a step, hours, disk."""
    if config.rank:
        system.adapt(stage, config.rank, config.alpha or None, config.adapter)
    params = system.trainable(stage)
    if several := shapes(config, system, stage):
        largest = max(several, key=lambda shape: shape[0] * shape[1])  # the square, where its area is the limit
        if largest != (system.size, system.size):
            system.latent_shape = system.latent_size(*largest)
        print(f"--buckets: {len(several)} shapes, counted at the largest, {largest[0]} x {largest[1]} pixels")
    kinds = system.kinds(stage)
    with working(f"stage {stage}: counting a step on shapes"):
        costs = {name: cost_of(config, system, stage, card=True, **settings) for name, settings in kinds.items()}

    trained = sum(p.numel() for p in params.values())
    print(f"stage {stage}")
    for part, module in system.named_children():
        count = sum(p.numel() for p in module.parameters())
        print(f"  {part:14} {count:>13,} parameters{'  trained' if part in system.stages[stage] else ''}")
    print(f"  {'total':14} {sum(p.numel() for p in system.parameters()):>13,} parameters, {trained:,} trained")
    _print_memory(config, system, stage, costs)
    seconds, how = _time(config, system, stage, costs["a step"], device)
    print(f"  one step       {seconds * config.accumulate:.2f} s, {config.batch * config.accumulate} samples ({how})")
    if config.epochs:  # how many steps they are, the data decide, which are not read
        each = seconds / config.batch * 1000 / 3600
        print(f"  {config.epochs:g} epochs      {each * config.epochs:.2f} hours on this device for each 1,000 samples")
    else:
        print(f"  {config.steps:,} steps {seconds * config.accumulate * config.steps / 3600:.1f} hours on this device")
    copies = 3 + bool(config.ema)  # weights, two moments, the average
    print(f"  disk           {(config.keep + 1) * copies * 4 * trained / 1e9:.1f} GB of checkpoints\n")


def _print_memory(config, system, stage: str, costs: dict[str, Cost]) -> None:
    """The arithmetic on shapes: as asked for, and with the frozen parts in the other places."""
    for name, cost in costs.items():
        print(f"  {name:30} {cost.bytes / 1e9:6.2f} GB beside the weights, {cost.flops / 1e12:.2f} TFLOP")
    most = max(cost.bytes for cost in costs.values())
    for label, asked in (("", config.frozen), (", --frozen cpu", "cpu"), (", --frozen share over 2", "share")):
        gb = gigabytes(system, places_of(asked, system, stage), most, 2)
        fits = [f"{size} GB" for size in CARDS if gb < 0.95 * size] or [f"none of {', '.join(map(str, CARDS))} GB"]
        print(f"  {'in all' + label:30} {gb:6.2f} GB by its shapes, fits a card of {', '.join(fits)}")


def _time(config, system, stage: str, cost: Cost, device: torch.device) -> tuple[float, str]:
    """(seconds of a step, how they are known). On a GPU its allocator's peak is printed besides."""
    pace = flops_per_second(config.precision, device) if device.type == "cpu" else float("inf")
    guess = SLOWER * cost.flops / pace
    if 2 * guess > PATIENCE:
        tera, pace = cost.flops / 1e12, pace / SLOWER / 1e9
        return guess, f"no real step: {tera:.1f} TFLOP at {pace:.0f} GFLOP/s of this CPU, right within a factor of 2"
    for part, place in places_of(config.frozen, system, stage).items():
        if place == "cpu":
            system.get_submodule(part).cpu()
    descent, kinds, took = descent_of(config, system), system.kinds(stage), 0.0
    for name, settings in reversed(kinds.items()) if device.type == "cuda" else [("a step", kinds["a step"])]:
        with working(f"stage {stage}: two real steps"), under(system, settings):
            for _ in range(2):
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                start = time.monotonic()
                one_step(config, system, stage, descent, config.clip)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                took = time.monotonic() - start
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device) / 1e9
            print(f"  {'measured, ' + name:30} {peak:6.2f} GB at most in PyTorch's allocator, {took:.2f} s")
    return took, "the second of two real ones"


@contextmanager
def under(system, settings: dict) -> Iterator[None]:
    """With other attributes for a while."""
    before = {name: getattr(system, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(system, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(system, name, value)


def flops_per_second(precision: str, device: torch.device) -> float:
    """The pace of a layer of 1,024 x 1,024 weights on as many rows: the best of three."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    a, times = torch.ones(1024, 1024, dtype=dtype, device=device), []
    for _ in range(4):  # the first wakes threads
        start = time.monotonic()
        F.linear(a, a)
        times.append(time.monotonic() - start)
    return 2 * 1024**3 / min(times[1:])
