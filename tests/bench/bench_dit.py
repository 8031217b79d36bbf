"""Hunyuan-DiT and DiT against diffusers' networks on the same weights and inputs, interleaved in one run.

    python tests/bench/bench_dit.py                                    2 of 40 blocks at 256 pixels, S/8; a minute
    python tests/bench/bench_dit.py --only hunyuan --layers 40 --size 1024 --device cuda --dtype bf16
    python tests/bench/bench_dit.py --only dit --dit XL/2

Median seconds of a forward pass with guidance (two rows; Hunyuan's text is read once, as its sampler does); of a LoRA
step of rank 8 on one row of Hunyuan (diffusers with peft's adapter); of a training step of DiT on eight rows.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
import conftest  # noqa: E402, F401
import diffusers  # noqa: E402
import peft  # noqa: E402
from diffusers.pipelines.hunyuandit import pipeline_hunyuandit as published  # noqa: E402
from interleaved import compare  # noqa: E402
from test_dit import published as renamed  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from nanomed import weights  # noqa: E402
from nanomed.adapters import lora  # noqa: E402
from nanomed.denoisers.dit import DiT, DiTConfig  # noqa: E402
from nanomed.denoisers.hunyuan import HunyuanConfig, HunyuanTransformer  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def step(network: nn.Module, run: Callable[[], Tensor], target: Tensor) -> Tensor:
    """Forward and backward; the loss."""
    network.zero_grad()
    loss = nn.functional.mse_loss(run().float(), target.float())
    loss.backward()
    return loss.detach()


def hunyuan(args: argparse.Namespace) -> None:
    device, dtype, side = args.device, DTYPES[args.dtype], args.size // 8
    shape = dict(num_layers=args.layers, sample_size=side, mlp_ratio=4.3637, cross_attention_dim=1024,
                 cross_attention_dim_t5=2048, pooled_projection_dim=1024,
                 use_style_cond_and_image_meta_size=False)  # fmt: skip
    reference = diffusers.HunyuanDiT2DModel(
        **shape, hidden_size=1408, num_attention_heads=16, attention_head_dim=88, in_channels=4, patch_size=2
    )
    reference.to(device, dtype).eval()
    ours = weights.build(HunyuanTransformer, HunyuanConfig(**shape))
    weights.load(ours, {name: tensor.clone() for name, tensor in reference.state_dict().items()}).eval()
    grid = (side // 2, side // 2)
    cos, sin = published.get_2d_rotary_pos_embed(
        88, published.get_resize_crop_region_for_grid(grid, 32), grid, device=device, output_type="pt"
    )

    def given(rows: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        text = dict(bert=torch.randn(rows, 77, 1024).to(device, dtype), bert_mask=torch.arange(77) < 30,
                    t5=torch.randn(rows, 256, 2048).to(device, dtype), t5_mask=torch.arange(256) < 40)  # fmt: skip
        text = {name: t.expand(rows, -1).to(device) if name.endswith("mask") else t for name, t in text.items()}
        return torch.randn(rows, 4, side, side).to(device, dtype), torch.full((rows,), 500, device=device), text

    def there(x: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
        mask, mask_t5 = text["bert_mask"].long(), text["t5_mask"].long()
        out = reference(x, t.to(dtype), text["bert"], mask, text["t5"], mask_t5, image_rotary_emb=(cos, sin))
        return out.sample

    x, t, text = given(2)
    with torch.inference_mode():
        read = ours.read_text(**text)
        runs = partial(ours, x, t, **read), partial(there, x, t, text)
        compare("Hunyuan-DiT, with guidance", *runs, args.repeats, device)
    x, t, text = given(1)
    target = torch.randn(1, 8, side, side, device=device)
    lora.inject(ours, 8)
    peft.get_peft_model(reference, peft.LoraConfig(r=8, lora_alpha=8, target_modules=list(lora.ATTENTION)))
    compare(
        "Hunyuan-DiT, LoRA step, rank 8",
        lambda: step(ours, lambda: ours(x, t, **text), target),
        lambda: step(reference, lambda: there(x, t, text), target),
        args.repeats,
        device,
    )


def dit(args: argparse.Namespace) -> None:
    device, dtype = args.device, DTYPES[args.dtype]
    c = DiTConfig.named(args.dit, num_classes=8)
    reference = diffusers.DiTTransformer2DModel(
        c.num_heads, c.hidden_size // c.num_heads, 4, 8, c.depth, sample_size=64, patch_size=c.patch_size,
        num_embeds_ada_norm=8, norm_eps=1e-6,
    )  # fmt: skip
    shared = reference.transformer_blocks[0].norm1.emb
    shared.time_proj.downscale_freq_shift = 0
    for block in reference.transformer_blocks:
        block.norm1.emb = shared
    reference.to(device, dtype).eval()
    tensors = {name: tensor.clone() for name, tensor in renamed(reference.state_dict(), c).items()}
    ours = weights.load(weights.build(DiT, c), tensors).eval()

    def given(rows: int) -> tuple[Tensor, Tensor, Tensor]:
        return (torch.randn(rows, 4, 64, 64).to(device, dtype), torch.full((rows,), 500, device=device),
                torch.arange(rows, device=device) % 9)  # fmt: skip

    batch = given(2)
    with torch.inference_mode():
        runs = partial(ours, *batch), lambda: reference(*batch).sample
        compare(f"DiT-{args.dit}, with guidance", *runs, args.repeats, device)
    batch, target = given(8), torch.randn(8, 8, 64, 64, device=device)
    compare(
        f"DiT-{args.dit}, training step",
        lambda: step(ours, lambda: ours(*batch), target),
        lambda: step(reference, lambda: reference(*batch).sample, target),
        args.repeats,
        device,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="blocks of Hunyuan-DiT, 40 as published")
    parser.add_argument("--size", type=int, default=256, help="side of its images in pixels")
    parser.add_argument("--dit", default="S/8", help="member of the DiT family")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--only", default="", help="hunyuan or dit")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"{args.layers} blocks of Hunyuan-DiT at {args.size} pixels, DiT-{args.dit}; {args.device} {args.dtype}")
    print(f"{'':28} {'here':>9} {'diffusers':>10} {'ratio':>7}   largest difference")
    for name, run in (("hunyuan", hunyuan), ("dit", dit)):
        if args.only in ("", name):
            run(args)


if __name__ == "__main__":
    main()
