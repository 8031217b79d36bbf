"""MSDM's training step and sampling against the work of the released loop, with the same networks, in one run.

    python tests/bench/bench_msdm.py train                    both sides interleaved, fp32 and bf16, medians and ratios
    python tests/bench/bench_msdm.py train --side ours --allocator     one side in a process of its own
    python tests/bench/bench_msdm.py overhead                 Python per solver step, with a network that does nothing
    python tests/bench/bench_msdm.py texts                    5,000 prompts with 260 texts, once each or row by row

The released loop encodes image and text at every step, runs the U-Net, clips and steps a default AdamW. Here the
frozen parts' outputs are cached, so a step is the U-Net, the norm and a fused AdamW.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))

from nanomed import cache, runtime, samplers, systems
from nanomed.diffusion import guided


def product_rate(device: torch.device, dtype: torch.dtype, n: int = 2048, times: int = 6) -> float:
    """FLOP/s of a square matrix product."""
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = 0.0
    for _ in range(times):
        start = time.perf_counter()
        a @ a
        wait(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def train(config) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.allocator:
        runtime.keep_memory()
    torch.manual_seed(0)
    system = systems.build("msdm", random=True, self_conditioning=config.self_conditioning)
    system.to(device, memory_format=torch.channels_last)
    params = list(system.trainable("unet").values())
    example = system.example("unet", config.batch, device)
    images = torch.rand(config.batch, 3, 256, 256, device=device) * 2 - 1
    ids = torch.randint(0, 49408, (config.batch, 64), device=device)
    mask = torch.ones(config.batch, 64, dtype=torch.bool, device=device)
    optimizers = {"ours": torch.optim.AdamW(params, lr=1e-6, fused=True), "peer": torch.optim.AdamW(params, lr=1e-6)}

    def ours(precision: str) -> None:
        with runtime.autocast(precision, device):
            loss = system(example, "unet", 0)["loss"]
        loss.backward()
        runtime.clip_gradients(params, 1.0)
        optimizers["ours"].step()
        optimizers["ours"].zero_grad()

    def peer(precision: str) -> None:
        with runtime.autocast(precision, device):
            with torch.no_grad():
                moments = system.vae.moments(images)
                states = system.text_encoder(ids, mask)
            batch = {"moments": moments, "prompt_embeds": states, "attention_mask": mask}
            loss = system(batch, "unet", 0)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizers["peer"].step()
        optimizers["peer"].zero_grad()

    def timed(step, precision: str) -> float:
        start = time.perf_counter()
        step(precision)
        wait(device)
        return time.perf_counter() - start

    sides = {"both": (("ours", ours), ("peer", peer)), "ours": (("ours", ours),), "peer": (("peer", peer),)}[
        config.side
    ]
    precisions = ("fp32", "bf16") if config.precision == "both" else (config.precision,)
    runs: dict[tuple[str, str], list[float]] = {}
    for number in range(config.repeats + 1):
        for name, step in sides:
            for precision in precisions if name == "ours" else ("fp32",):
                seconds = timed(step, precision)
                if number:
                    runs.setdefault((name, precision), []).append(seconds)
    medians = {key: statistics.median(values) for key, values in runs.items()}
    for (name, precision), seconds in medians.items():
        ratio = f"  {medians['peer', 'fp32'] / seconds:.2f}x" if ("peer", "fp32") in medians else ""
        print(f"{name} {precision}: {seconds:.3f} s a step of {config.batch}{ratio}")
    print(f"peak memory {runtime.peak_memory(device) / 1e9:.1f} GB")

    with FlopCounterMode(display=False) as counter:
        loss = system(example, "unet", 0)["loss"]
        loss.backward()
    optimizers["ours"].zero_grad()
    work, best = counter.get_total_flops(), float("inf")
    for _ in range(config.repeats):
        start = time.perf_counter()
        system(example, "unet", 0)["loss"].backward()
        wait(device)
        best = min(best, time.perf_counter() - start)
        optimizers["ours"].zero_grad()
    rate = product_rate(device, torch.float32)
    reached = work / best
    print(f"forward and backward {work / 1e9:.0f} GFLOP at {reached / 1e9:.0f} GFLOP/s")
    print(f"a matrix product {rate / 1e9:.0f} GFLOP/s: {reached / rate:.0%} of it")


@torch.inference_mode()
def overhead(config) -> None:
    """Microseconds of Python for a solver step at batch 1, guidance included, with a constant for a network."""
    system = systems.build("msdm-tiny")
    noise = runtime.ImageNoise(0, [0])
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
    parser.add_argument("--side", choices=["both", "ours", "peer"], default="both")
    parser.add_argument("--precision", choices=["both", "fp32", "bf16"], default="both")
    parser.add_argument("--allocator", action="store_true")
    parser.add_argument("--self_conditioning", action="store_true", help="half the steps then run the network twice")
    config = parser.parse_args()
    {"train": train, "overhead": overhead, "texts": texts}[config.what](config)


if __name__ == "__main__":
    main()
