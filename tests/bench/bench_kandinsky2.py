"""Kandinsky 2.2's networks against diffusers' on the same weights and inputs, interleaved in one run.

    python tests/bench/bench_kandinsky2.py                 half the published widths, a minute on one core
    python tests/bench/bench_kandinsky2.py --full          the published networks (14 GB of memory)
    python tests/bench/bench_kandinsky2.py --full --device cuda --dtype bf16 --size 256

Median seconds of a forward pass for two rows (one image with guidance). The prior is also run as the system runs it,
without the padding that its mask hides (prompts of 20 tokens). Outputs are compared as well.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
import conftest  # noqa: E402, F401
import diffusers  # noqa: E402
from interleaved import compare  # noqa: E402

from nanomed import weights  # noqa: E402
from nanomed.autoencoders.movq import MoVQ  # noqa: E402
from nanomed.denoisers.kandinsky2 import DecoderUNet, PriorTransformer, shortest  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
UNET = dict(
    down_block_types=("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3),
    up_block_types=(*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
    mid_block_type="UNetMidBlock2DSimpleCrossAttn", resnet_time_scale_shift="scale_shift",
    encoder_hid_dim_type="image_proj", addition_embed_type="image",
)  # fmt: skip
MOVQ = dict(
    down_block_types=(*["DownEncoderBlock2D"] * 3, "AttnDownEncoderBlock2D"),
    up_block_types=("AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * 3), norm_type="spatial",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the published widths")
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--only", default="", help="unet, prior or movq")
    args = parser.parse_args()
    dtype, device = DTYPES[args.dtype], args.device
    torch.manual_seed(0)
    side = args.size // 8
    half = 1 if args.full else 2
    print(f"{'network':28} {'here':>9} {'diffusers':>10} {'ratio':>7}   largest difference")

    def like(ours, reference):
        """Ours with the reference's very tensors."""
        return weights.load(ours, dict(reference.state_dict())).to(device, dtype).eval()

    with torch.inference_mode():
        if args.only in ("", "unet"):
            config = dict(block_out_channels=[c // half for c in (384, 768, 1152, 1536)], encoder_hid_dim=1280,
                          in_channels=4, out_channels=8, layers_per_block=3, cross_attention_dim=768 // half,
                          attention_head_dim=64)  # fmt: skip
            reference = diffusers.UNet2DConditionModel(**config, **UNET).to(device, dtype).eval()
            ours = like(weights.build(DecoderUNet, **config), reference)
            for rows in (2, 8):
                x, image = torch.randn(rows, 4, side, side), torch.randn(rows, 1280)
                x, image = x.to(device, dtype), image.to(device, dtype)
                t = torch.full((rows,), 500, device=device)
                compare(
                    f"decoder U-Net, {rows} rows",
                    lambda: ours(x, t, image),  # noqa: B023
                    lambda: reference(x, t, None, added_cond_kwargs={"image_embeds": image}).sample,  # noqa: B023
                )
            del ours, reference
        if args.only in ("", "prior"):
            config = dict(num_attention_heads=32 // half, num_layers=20 // half, embedding_dim=1280)
            reference = diffusers.PriorTransformer(**config).to(device, dtype).eval()
            ours = like(weights.build(PriorTransformer, **config), reference)
            x, states, embeds = torch.randn(2, 1280), torch.randn(2, 77, 1280), torch.randn(2, 1280)
            x, states, embeds = (tensor.to(device, dtype) for tensor in (x, states, embeds))
            t, mask = torch.full((2,), 500, device=device), (torch.arange(77) < torch.tensor([[2], [20]])).to(device)
            whole = dict(text_states=states, text_embeds=embeds, text_mask=mask)
            (short,) = shortest(whole)
            there = lambda: reference(x, t, embeds, states, mask).predicted_image_embedding  # noqa: E731
            compare("prior, 77 text tokens", lambda: ours(x, t, **whole), there, args.repeats, device)
            compare("prior, without padding", lambda: ours(x, t, **short), there, args.repeats, device)
            del ours, reference
        if args.only in ("", "movq"):
            config = dict(block_out_channels=[128 // half, 256 // half, 256 // half, 512 // half], layers_per_block=2,
                          latent_channels=4, num_vq_embeddings=16384, vq_embed_dim=4)  # fmt: skip
            reference = diffusers.VQModel(**config, **MOVQ).to(device, dtype).eval()
            ours = like(weights.build(MoVQ, **config), reference)
            z, images = torch.randn(1, 4, side, side), torch.rand(1, 3, args.size, args.size)
            z, images = z.to(device, dtype), images.to(device, dtype)
            compare(
                "MoVQ decoder",
                lambda: ours.decode(z),
                lambda: reference.decode(z, force_not_quantize=True).sample,
                args.repeats,
                device,
            )
            compare(
                "MoVQ encoder",
                lambda: ours.encode(images),
                lambda: reference.encode(images).latents,
                args.repeats,
                device,
            )


if __name__ == "__main__":
    main()
