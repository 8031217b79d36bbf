"""Kandinsky 3's U-Net against diffusers' on the same weights and inputs, interleaved in one run.

    python tests/bench/bench_kandinsky3.py               256 pixels, a third of the published widths, a minute
    python tests/bench/bench_kandinsky3.py --size 512 --width 1 --device cuda --dtype bf16

Median seconds of a forward pass with guidance (two rows, 40 places of text), as it is in every step of a sampler (here
the text is read once before the first, which is timed by itself), and of a LoRA step of rank 8 on one row (forward and
backward through the frozen network; diffusers with peft's adapter).
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
import conftest  # noqa: E402, F401
import diffusers  # noqa: E402
import peft  # noqa: E402
from interleaved import compare  # noqa: E402

from nanomed import weights  # noqa: E402
from nanomed.adapters import lora  # noqa: E402
from nanomed.denoisers.kandinsky3 import Kandinsky3Config, Kandinsky3UNet  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=3, help="divides the published widths")
    parser.add_argument("--size", type=int, default=256, help="side of the images in pixels")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    args = parser.parse_args()
    device, dtype, side = args.device, DTYPES[args.dtype], args.size // 8
    torch.manual_seed(0)
    shape = dict(time_embedding_dim=1536 // args.width, cross_attention_dim=64 * (64 // args.width),
                 block_out_channels=tuple(c // args.width for c in (384, 768, 1536, 3072)))  # fmt: skip
    reference = diffusers.Kandinsky3UNet(**shape).to(device, dtype).eval()
    ours = weights.load(weights.build(Kandinsky3UNet, Kandinsky3Config(**shape)), dict(reference.state_dict()))
    ours = ours.eval().to(memory_format=torch.channels_last)
    print(f"kandinsky3 {args.size} pixels, widths 1/{args.width}, {device} {args.dtype}")
    print(f"{'':28} {'here':>9} {'diffusers':>10} {'ratio':>7}   largest difference")

    def given(rows: int) -> tuple[torch.Tensor, ...]:
        x, text = torch.randn(rows, 4, side, side).to(device, dtype), torch.randn(rows, 40, 4096).to(device, dtype)
        return x, torch.full((rows,), 500, device=device), text, torch.ones(rows, 40, device=device)

    def there(x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return reference(x, t, encoder_hidden_states=text, encoder_attention_mask=mask).sample

    batch = given(2)
    with torch.inference_mode():
        read = ours.read_text(*batch[2:])
        here = lambda: ours(*batch[:2], **read)  # noqa: E731
        step, _ = compare("forward with guidance", here, lambda: there(*batch), args.repeats, device)
        whole, _ = compare("the text anew every time", lambda: ours(*batch), here, args.repeats, device)
        print(f"reading the text takes {max(whole - step, 0):.3f}s, once for a prompt")
    single = given(1)
    noise = torch.randn_like(single[0])
    lora.inject(ours, 8)
    adapter = peft.LoraConfig(r=8, lora_alpha=8, target_modules=list(lora.ATTENTION))
    adapted = peft.get_peft_model(reference, adapter)

    def step(network: torch.nn.Module, run: Callable) -> torch.Tensor:
        network.zero_grad()
        loss = torch.nn.functional.mse_loss(run().float(), noise.float())
        loss.backward()
        return loss.detach()

    compare(
        "LoRA step, rank 8",
        lambda: step(ours, lambda: ours(*single)),
        lambda: step(adapted, lambda: there(*single)),
        args.repeats,
        device,
    )


if __name__ == "__main__":
    main()
