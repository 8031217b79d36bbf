"""What an adapter costs: nanomed's and peft's on the same layers, interleaved in one run.

    python tests/bench/bench_lora.py                                      small, seconds
    python tests/bench/bench_lora.py --width 1152 --blocks 3 --repeats 9  PixArt-XL/2's layers, 1024 tokens

The stack has the linear layers of PixArt's blocks (attention of latents and of 120 text tokens, feed-forward) without
the attention itself, so that nothing hides the adapters. Every line is the median of interleaved repeats, and its
ratio to the base forward; arithmetic alone says 2.0 for a LoRA step and 3.0 where all weights train.
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
import conftest  # noqa: E402, F401  (lets peft import where torchvision's binary does not fit torch)
import peft  # noqa: E402

from nanomed.adapters import lora  # noqa: E402

TARGETS = ["to_q", "to_k", "to_v", "to_out", "fc1", "fc2"]


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        text = self.to_k(context) * self.to_v(context)
        return self.to_out(self.to_q(x) + (text if context is x else text.mean(1, keepdim=True)))


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.attn1, self.attn2 = Attention(width), Attention(width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.attn1(x, x)
        x = x + self.attn2(x, text)
        return x + self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Stack(nn.Module):
    def __init__(self, width: int, blocks: int):
        super().__init__()
        self.blocks = nn.ModuleList([Block(width) for _ in range(blocks)])

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, text)
        return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(width=256, blocks=2, tokens=1024, batch=1, rank=8, repeats=15, threads=0).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kind", default="lora", choices=lora.KINDS)
    parser.add_argument("--dtype", default="float32", help="of the network; adapters are float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)

    base = Stack(args.width, args.blocks).to(device, dtype)
    full = copy.deepcopy(base)
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    params = lora.inject(ours, args.rank, targets=TARGETS, kind=args.kind)
    with torch.no_grad():
        for param in params:
            param += 0.02 * torch.randn_like(param)
    merged = copy.deepcopy(ours)
    lora.merge(merged)
    settings = dict(r=args.rank, lora_alpha=args.rank, use_dora="dora" in args.kind, use_rslora=args.kind[:2] == "rs")
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**settings, target_modules=TARGETS))
    for name, param in theirs.named_parameters():
        param.data = param.data.float() if ".lora_" in name else param.data
    peft.set_peft_model_state_dict(theirs, {f"base_model.model.{k}": v for k, v in lora.state(ours).items()})
    base.requires_grad_(False)

    x = torch.randn(args.batch, args.tokens, args.width, device=device, dtype=dtype)
    text = torch.randn(args.batch, 120, args.width, device=device, dtype=dtype)
    error = (ours(x, text) - theirs(x, text)).norm() / theirs(x, text).norm()

    def forward(net: nn.Module):
        def run():
            with torch.no_grad():
                net(x, text)

        return run

    def step(net: nn.Module):
        start = x.clone().requires_grad_()  # as in a network, where the layers before these train too

        def run():
            net(start, text).sum().backward()
            net.zero_grad()
            start.grad = None

        return run

    def seconds(run) -> float:
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    runs = {
        "forward, base": forward(base), "forward, merged": forward(merged),
        "forward, unmerged": forward(ours), "forward, peft": forward(theirs),
        "step, nanomed": step(ours), "step, peft": step(theirs),
        "step, dx alone": step(base), "step, all weights": step(full),
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(args.repeats + 2):
        for name, run in runs.items():
            taken = seconds(run)
            if repeat >= 2:
                times[name].append(taken)
    median = {name: statistics.median(values) for name, values in times.items()}
    unit = median["forward, base"]
    print(
        f"{args.kind} rank {args.rank}, {args.blocks} blocks of width {args.width}, {args.batch} x {args.tokens} tokens"
    )
    print(f"{args.dtype} on {device}, {torch.get_num_threads()} threads; outputs differ from peft's by {error:.1e}")
    for name, value in median.items():
        spread = max(times[name]) / min(times[name])
        print(f"  {name:20} {value * 1e3:9.2f} ms   {value / unit:5.2f} x forward   (max/min {spread:.2f})")
    print(f"  step: {median['step, peft'] / median['step, nanomed']:.2f}x faster than peft")
    overhead = {name: median[f"forward, {name}"] / unit - 1 for name in ("unmerged", "peft")}
    print(f"  unmerged overhead: {overhead['unmerged']:.1%}, peft's {overhead['peft']:.1%}")


if __name__ == "__main__":
    main()
