"""MSDM's training step and sampling against the work of the released loop, with the same networks, in one run.

    python tests/bench/bench_msdm.py train                    both sides in turns, fp32 and bf16, medians and ratios
    python tests/bench/bench_msdm.py train --allocator        ours keeps freed memory, the peer as it comes
    python tests/bench/bench_msdm.py overhead                 Python per solver step, with a network that does nothing
    python tests/bench/bench_msdm.py texts                    5,000 prompts with 260 texts, once each or row by row

The released loop encodes image and text at every step, runs the U-Net, clips and steps a default AdamW, and leaves
channels first in memory. Here the frozen parts' outputs are cached, so a step is the U-Net, the norm and an AdamW in
one pass.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))

from nanomed import systems
from nanomed.diffusion import samplers
from nanomed.diffusion.guidance import guided
from nanomed.run import cache
from nanomed.run.hardware import autocast, keep_memory, peak_memory
from nanomed.run.randomness import ImageNoise
from nanomed.training.optimizer import adamw, clip_gradients


def product_rate(device: torch.device, m: int, n: int, k: int, others: int = 1, times: int = 8) -> float:
    """FLOP/s of matrix products (m, k) (k, n) in fp32, with as many `others` on the right in turns: more than a cache
    holds, and each is read from memory."""
    a = torch.randn(m, k, device=device)
    right = [torch.randn(k, n, device=device) for _ in range(others)]
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        for b in right:
            a @ b
        wait(device)
        seconds.append((time.perf_counter() - start) / others)
    return 2 * m * n * k / statistics.median(seconds[1:])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class Step:
    """One side's training step. `ours` has the outputs of the frozen parts at hand; the peer makes them anew."""

    def __init__(self, side: str, config):
        if config.allocator and side == "ours":
            keep_memory()
        self.peer, self.device = side == "peer", torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        self.system = systems.build("msdm", random=True, self_conditioning=config.self_conditioning)
        if not self.peer or config.peer_channels_last:
            self.system.to(memory_format=torch.channels_last)
        self.system.to(self.device)
        self.params = list(self.system.trainable("unet").values())
        self.example = self.system.example("unet", config.batch, self.device)
        self.images = torch.rand(config.batch, 3, 256, 256, device=self.device) * 2 - 1
        self.ids = torch.randint(0, 49408, (config.batch, 64), device=self.device)
        self.mask = torch.ones(config.batch, 64, dtype=torch.bool, device=self.device)
        make = torch.optim.AdamW if self.peer else adamw
        self.optimizer = make(self.params, lr=1e-6)

    def __call__(self, precision: str) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        with autocast(precision, self.device):
            batch = self._encode() if self.peer else self.example
            loss = self.system(batch, "unet", 0)["loss"]
        loss.backward()
        clip = torch.nn.utils.clip_grad_norm_ if self.peer else clip_gradients
        clip(self.params, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        wait(self.device)
        return time.perf_counter() - start

    @torch.no_grad()
    def _encode(self) -> dict:
        moments, states = self.system.vae.moments(self.images), self.system.text_encoder(self.ids, self.mask)
        return {"moments": moments, "prompt_embeds": states, "attention_mask": self.mask}

    def rates(self, repeats: int) -> dict[str, float]:
        """FLOP of forward and backward, and FLOP/s of them and of matrix products: a square one, and those of the 1024
        channels at 8 x 8 that hold half of the network's weights."""
        with FlopCounterMode(display=False) as counter:
            self.system(self.example, "unet", 0)["loss"].backward()
        self.optimizer.zero_grad()
        seconds, square, small = [], [], []
        for _ in range(repeats):
            start = time.perf_counter()
            self.system(self.example, "unet", 0)["loss"].backward()
            wait(self.device)
            seconds.append(time.perf_counter() - start)
            self.optimizer.zero_grad()
            square.append(product_rate(self.device, 2048, 2048, 2048))
            small.append(product_rate(self.device, 64 * len(self.images), 9 * 1024, 1024, others=14, times=2))
        work = counter.get_total_flops()
        rates = {"forward and backward": work / statistics.median(seconds), "product 2048^3": statistics.median(square)}
        rates["product of its 8 x 8 maps"] = statistics.median(small)
        return {"work": work, "memory": peak_memory(self.device), **rates}


def _make(side: str, config) -> None:
    global step
    step = Step(side, config)


def _step(precision: str) -> float:
    return step(precision)


def _rates(repeats: int) -> dict[str, float]:
    return step.rates(repeats)


def train(config) -> None:
    """The two sides take turns, each in a process of its own: neither works in the other's heap."""
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1, _make, ("ours", config)) as ours, spawn.Pool(1, _make, ("peer", config)) as peer:
        turns = [(ours, "ours", "fp32"), (ours, "ours", "bf16"), (peer, "peer", "fp32")]
        seconds = {(name, precision): [] for _, name, precision in turns}
        for _ in range(config.repeats + 1):
            for pool, name, precision in turns:
                pool.apply(_step, (precision,))  # the first of a turn warms caches and is not counted
                seconds[name, precision].append(pool.apply(_step, (precision,)))
        medians = {key: statistics.median(values[1:]) for key, values in seconds.items()}
        for (name, precision), median in medians.items():
            ratio = medians["peer", "fp32"] / median
            print(f"{name} {precision}: {median:.3f} s a step of {config.batch}  {ratio:.2f}x")
        peer.terminate()
        rates = ours.apply(_rates, (config.repeats,))
    print(f"peak memory of ours {rates.pop('memory') / 1e9:.1f} GB, {rates.pop('work') / 1e9:.0f} GFLOP")
    for name, rate in rates.items():
        print(f"{name}: {rate / 1e9:.0f} GFLOP/s, reached to {rates['forward and backward'] / rate:.0%}")


@torch.inference_mode()
def overhead(config) -> None:
    """Microseconds of Python for a solver step at batch 1, guidance included, with a constant for a network."""
    system = systems.build("msdm-tiny")
    noise = ImageNoise(0, [0])
    constant = torch.zeros(2, 4, 4, 4)
    cond = {"pooled": torch.zeros(1, 8)}
    for name, sampler in (("msdm", samplers.ddim), ("dpmpp", samplers.dpmpp_2m)):
        times = []
        for _ in range(20):
            denoise = guided(lambda x, t, pooled: constant, cond, cond, 4.5)
            x = noise.randn(4, 4, 4)
            start = time.perf_counter()
            sampler(denoise, system.diffusion, x, 150, noise, **({"eta": 1.0} if name == "msdm" else {}))
            times.append((time.perf_counter() - start) / 150)
        print(f"{name}: {statistics.median(times) * 1e6:.0f} us a step")


@torch.inference_mode()
def texts(config) -> None:
    """Seconds to encode 5,000 rows with 260 texts through CLIP ViT-L/14: once each, and row by row with "" again."""
    from nanomed.data import grammar
    from nanomed.text.clip import ClipText, ClipTextConfig
    from nanomed.text.tokenizers import train_bpe

    torch.manual_seed(0)
    prompts = grammar.all_prompts()
    tokenizer, encoder = train_bpe(prompts, 400), ClipText(ClipTextConfig()).eval()

    def encode(batch: list[str]) -> dict[str, torch.Tensor]:
        ids, mask = tokenizer(batch, length=64)
        return {"prompt_embeds": encoder(ids, mask), "attention_mask": mask}

    rows = [prompts[i % 260] for i in range(5000)]
    remember = cache.Remembered(encode)
    start = time.perf_counter()
    for first in range(0, 5000, 16):
        remember(rows[first : first + 16])
        remember([""] * 16)
    once = time.perf_counter() - start
    start = time.perf_counter()
    for prompt in rows[: config.rows]:
        encode([prompt])
        encode([""])
    row_by_row = (time.perf_counter() - start) * 5000 / config.rows
    print(f"once each {once:.1f} s, row by row {row_by_row:.0f} s (from {config.rows} rows): {row_by_row / once:.0f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "overhead", "texts"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=40, help="rows that are timed one by one")
    parser.add_argument(
        "--allocator", action="store_true", help="ours keeps freed memory, as train.py does on a CPU"
    )
    parser.add_argument("--peer_channels_last", action="store_true", help="the peer's convolutions as ours")
    parser.add_argument("--self_conditioning", action="store_true", help="half the steps then run the network twice")
    config = parser.parse_args()
    {"train": train, "overhead": overhead, "texts": texts}[config.what](config)


if __name__ == "__main__":
    main()
