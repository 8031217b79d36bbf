"""Stable Diffusion's U-Net against diffusers' on the same weights and inputs, interleaved in one run.

    python tests/bench/bench_stable_diffusion.py               256 pixels, half the published widths, a minute
    python tests/bench/bench_stable_diffusion.py --size 512 --width 1 --layers 1     the published widths, 4 GB
    python tests/bench/bench_stable_diffusion.py --model sdxl --size 1024 --width 1 --device cuda --dtype bf16

Median seconds of a forward pass with guidance (two rows; the text read once, as a sampler does) and of a LoRA step of
rank 8 on one row (forward and backward through the frozen network; diffusers with peft's adapter).
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
from nanomed.denoisers.stable_diffusion import StableDiffusionConfig, StableDiffusionUNet  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def config(model: str, width: int, layers: int) -> dict:
    """The published shape with 1/width of the channels and as much of the heads, which so stay as wide as they are."""
    if model == "sd15":
        return dict(
            block_out_channels=[c // width for c in (320, 640, 1280, 1280)], layers_per_block=layers,
            cross_attention_dim=768, attention_head_dim=8 // width,
            down_block_types=[*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
            up_block_types=["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
        )  # fmt: skip
    return dict(
        block_out_channels=[c // width for c in (320, 640, 1280)], layers_per_block=layers, cross_attention_dim=2048,
        attention_head_dim=[5, 10 // width, 20 // width], transformer_layers_per_block=[1, 2, 10 // width],
        down_block_types=["DownBlock2D", *["CrossAttnDownBlock2D"] * 2], use_linear_projection=True,
        up_block_types=[*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"], addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--width", type=int, default=2, help="divides the published widths")
    parser.add_argument("--layers", type=int, default=2, help="layers_per_block, 2 as published")
    parser.add_argument("--size", type=int, default=256, help="side of the images in pixels")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--only", default="", help="forward or step")
    args = parser.parse_args()
    device, dtype, side = args.device, DTYPES[args.dtype], args.size // 8
    torch.manual_seed(0)
    settings = config(args.model, args.width, args.layers)
    reference = diffusers.UNet2DConditionModel(**settings).to(device, dtype).eval()
    ours = weights.build(StableDiffusionUNet, StableDiffusionConfig(**settings))
    ours = weights.load(ours, dict(reference.state_dict())).eval().to(memory_format=torch.channels_last)
    print(f"{args.model} {args.size} pixels, widths 1/{args.width}, {args.layers} layers, {device} {args.dtype}")
    print(f"{'':28} {'here':>9} {'diffusers':>10} {'ratio':>7}   largest difference")

    def given(rows: int) -> tuple[torch.Tensor, torch.Tensor, dict]:
        x = torch.randn(rows, 4, side, side).to(device, dtype)
        text = {"prompt_embeds": torch.randn(rows, 77, settings["cross_attention_dim"]).to(device, dtype)}
        if args.model == "sdxl":
            text["text_embeds"] = torch.randn(rows, 1280).to(device, dtype)
            text["time_ids"] = torch.tensor([[args.size, args.size, 0, 0, args.size, args.size]] * rows).to(device)
        return x, torch.full((rows,), 500, device=device), text

    def there(x: torch.Tensor, t: torch.Tensor, text: dict) -> torch.Tensor:
        added = {name: text[name] for name in ("text_embeds", "time_ids") if name in text}
        return reference(x, t, text["prompt_embeds"], added_cond_kwargs=added or None).sample

    if args.only in ("", "forward"):
        x, t, text = given(2)
        with torch.inference_mode():
            read = ours.read_text(**text)
            compare(
                "forward with guidance", lambda: ours(x, t, **read), lambda: there(x, t, text), args.repeats, device
            )
    if args.only in ("", "step"):
        x, t, text = given(1)
        noise = torch.randn_like(x)
        lora.inject(ours, 8)
        reference.requires_grad_(False)
        reference.add_adapter(peft.LoraConfig(r=8, lora_alpha=8, target_modules=list(lora.ATTENTION)))

        def step(network: torch.nn.Module, run: Callable) -> torch.Tensor:
            network.zero_grad()
            loss = torch.nn.functional.mse_loss(run().float(), noise.float())
            loss.backward()
            return loss.detach()

        compare(
            "LoRA step, rank 8",
            lambda: step(ours, lambda: ours(x, t, **text)),
            lambda: step(reference, lambda: there(x, t, text)),
            args.repeats,
            device,
        )


if __name__ == "__main__":
    main()
