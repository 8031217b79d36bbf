"""T5 on captions of 40 to 90 tokens that are padded to 120: trimmed, padded, and transformers, interleaved in one run.

    python tests/bench/bench_t5.py                                       small, seconds
    python tests/bench/bench_t5.py --width 4096 --ff 10240 --heads 64 --layers 2 --repeats 5      XXL's layers, 2 of 24
    python tests/bench/bench_t5.py --width 4096 --ff 10240 --heads 64 --layers 24 --dtype bf16 --device cuda

Every line is the mean over the batches, for the forward pass and, with --backward, for forward and backward with a
frozen T5 and adapters of rank 8 as Med-Art has them. Batch 1 is Med-Art's. The states at text are compared as well.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
import conftest  # noqa: E402, F401  (lets transformers import where torchvision's binary does not fit torch)
import transformers  # noqa: E402

from nanomed import weights  # noqa: E402
from nanomed.adapters import lora  # noqa: E402
from nanomed.text.t5 import T5Config, T5Encoder, encoder_half  # noqa: E402

TARGETS = ["q", "k", "v", "o", "wo"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def captions(batch: int, length: int, seed: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Ids and mask of `batch` texts of 40 to 90 tokens, padded to `length`."""
    draw = torch.Generator().manual_seed(seed)
    real = torch.randint(40, 91, (batch, 1), generator=draw)
    mask = torch.arange(length) < real
    return torch.randint(3, vocab, (batch, length), generator=draw).masked_fill(~mask, 0), mask


def timed(work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--ff", type=int, default=320)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=120)
    parser.add_argument("--repeats", type=int, default=9, help="batches, each of other captions")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backward", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    shape = dict(vocab_size=2000, d_model=args.width, d_kv=64, d_ff=args.ff, num_layers=args.layers,
                 num_heads=args.heads, feed_forward_proj="gated-gelu")  # fmt: skip
    with torch.device(args.device):
        reference = transformers.T5EncoderModel(transformers.T5Config(**shape)).eval().to(DTYPES[args.dtype])
    ours = weights.build(T5Encoder, T5Config(**shape))
    weights.load(ours, encoder_half(dict(reference.state_dict()))).requires_grad_(False)  # one copy of the weights
    reference.requires_grad_(False)
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "transformers": lambda ids, mask: reference(ids, attention_mask=mask.long()).last_hidden_state,
        "padded": ours,
        "trimmed": ours.trimmed,
    }
    errors = []
    with torch.no_grad():  # before the adapters, and once for warmth
        for seed in range(2):
            ids, mask = (tensor.to(args.device) for tensor in captions(args.batch, args.length, seed, 2000))
            expected, *found = (way(ids, mask)[mask].float() for way in ways.values())
            errors += [(states - expected).abs().max() / expected.abs().max().clamp(min=1) for states in found]
    print(f"largest difference from transformers at text: {max(errors).item():.1e}")
    if args.backward:
        lora.inject(ours, rank=8, targets=TARGETS)
        del ways["transformers"]  # its adapters would be peft's: bench_lora.py measures those

    def run(way: Callable[[Tensor, Tensor], Tensor], ids: Tensor, mask: Tensor) -> None:
        with torch.set_grad_enabled(args.backward):
            states = way(ids, mask)
            if args.backward:
                states[mask].float().sum().backward()

    times: dict[str, list[float]] = {name: [] for name in ways}
    tokens = []
    for seed in range(-1, args.repeats):
        ids, mask = captions(args.batch, args.length, max(seed, 0), 2000)
        for name, way in ways.items():
            seconds = timed(partial(run, way, ids.to(args.device), mask.to(args.device)), args.device)
            if seed >= 0:  # the first one is for warmth
                times[name].append(seconds)
        tokens += mask.sum(1).tolist() if seed >= 0 else []
    print(f"{args.layers} layers of width {args.width}, {args.dtype}, batch {args.batch}, "
          f"{statistics.mean(tokens):.0f} tokens of {args.length} on average")  # fmt: skip
    padded = statistics.mean(times["padded"])  # the mean: how long a caption is decides how long it takes
    for name, seconds in times.items():
        mean = statistics.mean(seconds)
        print(f"{name:>14} {1000 * mean:10.2f} ms   {padded / mean:5.2f} x the speed of padded")


if __name__ == "__main__":
    main()
