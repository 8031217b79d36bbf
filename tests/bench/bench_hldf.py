"""What back-propagation through a sampler costs, in every way to do it, and what HLDF adds to a training.

    python tests/bench/bench_hldf.py                  all ways, interleaved, each in a process of its own (minutes)
    python tests/bench/bench_hldf.py --steps 4 --rounds 1      a glance
    python tests/bench/bench_hldf.py --flops          Med-Art at full size, by arithmetic (no weights are made)

A PixArt of 4 layers, width 432, 256 tokens, 40 tokens of text, guidance 4.5, rank 8, M = 20 steps of DPM-Solver++ in
fp32, one thread. The loss is on the latents, so that nothing hides the sampler. Columns:

    time       seconds of forward and backward, and relative to holding all activations
    live       the most bytes of tensors at one time above those before: torch's profiler, in a run of its own
    rss        growth of the process's resident memory, which the heap's fragmentation inflates
    cosine     of the gradient with that of "held"
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parents[2]))

from nanomed.adapters import lora
from nanomed.denoisers.pixart import PixArtConfig, PixArtTransformer
from nanomed.diffusion import hldf, samplers
from nanomed.diffusion.guidance import guided
from nanomed.diffusion.process import Diffusion
from nanomed.systems.medart import MedArt

SMALL = PixArtConfig(num_attention_heads=6, attention_head_dim=72, num_layers=4, sample_size=32)
WAYS = {
    "no gradient": dict(gradient=False),
    "held": dict(),
    "checkpoint per block": dict(blocks=True),
    "checkpoint per step": dict(per_step=True),
    "recomputed": dict(recomputed=True),
    "recomputed, keep 4": dict(recomputed=True, keep=4),
    "recomputed, keep 10": dict(recomputed=True, keep=10),
    "recomputed, per block": dict(recomputed=True, blocks=True),
    "last 10 steps": dict(recomputed=True, last=10),
    "last 5 steps": dict(recomputed=True, last=5),
    "last step": dict(recomputed=True, last=1),
}


class Event:
    """The sampler part of an HLDF step."""

    def __init__(self, steps: int):
        torch.manual_seed(0)
        self.steps = steps
        self.net = PixArtTransformer(SMALL)
        self.params = lora.inject(self.net, 8, targets=MedArt.adapters["transformer"])
        with torch.no_grad():
            for param in self.params:
                param += 0.01 * torch.randn_like(param)
        self.states = torch.randn(2, 1, 40, 4096)
        self.noise = torch.randn(1, 4, 32, 32)
        self.mask = torch.ones(1, 40, dtype=torch.bool)

    def epsilon(self, x: Tensor, t: Tensor, **text: Tensor) -> Tensor:
        return self.net(x, t, **text).chunk(2, 1)[0]

    def __call__(self, gradient=True, blocks=False, per_step=False, recomputed=False, keep=0, last=None) -> Tensor:
        """The gradient of all that trains, in one vector."""
        self.net.checkpointing = blocks
        with torch.set_grad_enabled(gradient):
            null, cond = (self.net.read_text(states, self.mask) for states in self.states)
            if recomputed:
                arguments = (cond, null, 4.5, self.params, hldf.Calls(self.steps, keep, last))
                denoise = hldf.recomputed(self.epsilon, *arguments)
            else:
                denoise = whole = guided(self.epsilon, cond, null, 4.5)
            if per_step:
                denoise = lambda x, t: checkpoint(whole, x, t, use_reentrant=False)  # noqa: E731
            latents = samplers.dpmpp_2m(denoise, Diffusion(), self.noise, self.steps)
        if not gradient:
            return torch.zeros(1)
        latents.square().mean().backward()
        found = torch.cat([param.grad.flatten() for param in self.params])
        self.net.zero_grad()
        return found


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {name} in /proc/self/status")


def peak_live(run: Callable[[], object]) -> int:
    """The most bytes of tensors alive at one time during run(), beyond those that were before."""
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        run()
    events = measured.profiler.kineto_results.events()
    level = peak = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        level += change
        peak = max(peak, level)
    return peak


def child(way: str, steps: int, live: bool, gradient: Path) -> None:
    """Measure one way in this fresh process; the result is a line of JSON."""
    torch.set_num_threads(1)
    event, options = Event(steps), WAYS[way]
    if live:
        print(json.dumps({"live": peak_live(lambda: event(**options))}))
        return
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
    before, start = resident("VmRSS"), time.perf_counter()
    found = event(**options)
    seconds = time.perf_counter() - start
    rss = resident("VmHWM") - before
    if way == "held":
        torch.save(found, gradient)
    reference = torch.load(gradient, weights_only=True) if gradient.is_file() and options else found
    cosine = torch.nn.functional.cosine_similarity(found, reference, 0).item() if way != "no gradient" else 0.0
    print(json.dumps({"seconds": seconds, "rss": rss, "norm": found.norm().item(), "cosine": cosine}))


def ways(config: argparse.Namespace) -> None:
    """Every way, `rounds` times in turn. "held" goes first, for the others are compared with its gradient."""
    import tempfile

    order = ["held", *(way for way in WAYS if way != "held")]
    found: dict[str, list[dict]] = {way: [] for way in order}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(config.rounds + 1):  # the last turn is that of the profiler
            for way in order:
                live = turn == config.rounds
                words = [sys.executable, __file__, "--child", way, "--steps", str(config.steps), "--gradient"]
                words += [f"{folder}/held.pt", *(["--live"] if live else [])]
                answer = subprocess.run(words, check=True, capture_output=True, text=True).stdout
                found[way].append(json.loads(answer.splitlines()[-1]))
    unit = statistics.median(run["seconds"] for run in found["held"][:-1])
    print(f"M = {config.steps}, median of {config.rounds}\n{'way':24} {'time':>8} {'ratio':>6} {'live MB':>9} "
          f"{'rss MB':>8} {'norm':>10} {'cosine':>9}")  # fmt: skip
    for way in WAYS:
        *runs, profiled = found[way]
        seconds, rss = (statistics.median(run[key] for run in runs) for key in ("seconds", "rss"))
        print(f"{way:24} {seconds:7.2f}s {seconds / unit:6.2f} {profiled['live'] / 1e6:9.1f} {rss / 1e6:8.1f} "
              f"{runs[0]['norm']:10.4g} {runs[0]['cosine']:9.6f}")  # fmt: skip


# ----------------------------------------------------------------------------------------------------- full size


def flops(config: argparse.Namespace) -> None:
    """Multiply-adds of Med-Art's training at 512 pixels, batch 1, counted without making a tensor."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    from nanomed.autoencoders.kl import AutoencoderKL
    from nanomed.text.t5 import T5Config, T5Encoder

    def count(run: Callable[[], object]) -> float:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops() / 1e12

    with FakeTensorMode():  # shapes without memory
        vae, t5, net = AutoencoderKL().requires_grad_(False), T5Encoder(T5Config()), PixArtTransformer()
        lora.inject(net, 8, targets=MedArt.adapters["transformer"])
        lora.inject(t5, 8, targets=MedArt.adapters["text_encoder"])
        image, z = torch.empty(1, 3, 512, 512), torch.empty(1, 4, 64, 64)
        t, mask = torch.zeros(1, dtype=torch.int64), torch.ones(1, 120, dtype=torch.bool)
        kv = torch.empty(1, 28, 2, 120, 1152)
        ids = torch.zeros(1, 120, dtype=torch.int64)
        attention = 2 * 2 * 28 * (1024 * 1024 + 1024 * 120) * 1152 / 1e12  # of one forward pass; not in the counts
        part = {
            "encode": count(lambda: vae.moments(image)),
            "decode": count(lambda: vae.decode(z)),
            "decode, back": count(lambda: vae.decode(z.requires_grad_()).sum().backward()),
            "t5": count(lambda: t5(ids, mask)),
            "t5, back": count(lambda: t5(ids, mask).sum().backward()),
        }
        z = torch.empty(1, 4, 64, 64)
        with torch.no_grad():
            part["dit"] = count(lambda: net(z, t, kv=kv, attention_mask=mask)) + attention
        z.requires_grad_()
        both = count(lambda: net(z, t, kv=kv.requires_grad_(), attention_mask=mask).sum().backward()) + 3 * attention
    released = part["encode"] + part["t5, back"] + both + part["dit"]
    ours = part["encode"] + 0.6 * part["t5, back"] + both
    event = part["decode, back"] + 2 * part["t5, back"] + config.steps * 2 * (part["dit"] + both)
    kept = part["decode, back"] + 2 * part["t5, back"] + config.steps * 2 * both
    for name, value in part.items():
        print(f"{name:36} {value:8.2f} TFLOP")
    print(f"{'dit, forward and backward':36} {both:8.2f} TFLOP")
    rows = {"step as released": released, "step here (no checkpoint, trimmed T5)": ours,
            "HLDF event, recomputed": event, "HLDF event, activations held": kept}  # fmt: skip
    for name, value in rows.items():
        print(f"{name:36} {value:8.2f} TFLOP")
    print(
        f"\n{'overhead of HLDF':36} {'N = 100':>8} {'250':>7} {'500':>7} {'1500':>7}   (the paper measured 9% at 500)"
    )
    for name, step in (("beside the released step", released), ("beside the step here", ours)):
        print(f"{name:36} " + " ".join(f"{event / step / n:7.1%}" for n in (100, 250, 500, 1500)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="M")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--flops", action="store_true")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("--live", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--gradient", type=Path, default=Path("held.pt"), help=argparse.SUPPRESS)
    config = parser.parse_args()
    if config.child:
        child(config.child, config.steps, config.live, config.gradient)
    elif config.flops:
        flops(config)
    else:
        ways(config)


if __name__ == "__main__":
    main()
