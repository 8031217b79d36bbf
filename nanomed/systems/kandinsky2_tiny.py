"""A miniature of Kandinsky 2.2 that needs no published weights: it learns the toy world from nothing, then is adapted.

Two stages come before the prior and the decoder, for what the published repositories bring along:

    "vae"    MoVQ, by the mean absolute error of reconstructions
    "clip"   the two towers, by telling which text belongs to which image (Radford et al. 2021, section 2.3)

It departs from the big one where minutes on a CPU ask for it: 32 x 32 pixels, latents of unit deviation clamped at 3,
and a decoder that predicts v, which learns what the embedding says in a tenth of the steps.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nanomed import weights
from nanomed.autoencoders.movq import SpatialNorm
from nanomed.systems.base import read_config
from nanomed.systems.kandinsky2 import Kandinsky2
from nanomed.systems.kandinsky2_parts import NETWORKS, SCHEDULES
from nanomed.text.tokenizers import ClipTokenizer

PRESETS = {
    "kandinsky2-tiny": dict(
        size=32, steps=25, prior_steps=10, guidance=2.0, prior_guidance=2.0, dropout=0.1,
        networks=dict(
            text_encoder=dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                              max_position_embeddings=64, hidden_act="gelu", projection_dim=64),
            image_encoder=dict(hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
                               image_size=32, patch_size=8, hidden_act="gelu", projection_dim=64),
            prior=dict(num_attention_heads=4, attention_head_dim=32, num_layers=3, embedding_dim=64, num_embeddings=64),
            unet=dict(block_out_channels=(64, 96, 128), layers_per_block=1, cross_attention_dim=64,
                      attention_head_dim=32, encoder_hid_dim=64),
            movq=dict(block_out_channels=(32, 32, 64), layers_per_block=1, num_vq_embeddings=1),
        ),
    ),
}  # fmt: skip
RECIPES = {
    "kandinsky2-tiny": {
        "": dict(data="toy:2000", allocator=True, batch=32, schedule="cosine", warmup=20, clip=1.0,
                 test_prompts="weights/msdm-tiny/test.csv"),
        "vae": dict(steps=300, batch=16, lr=2e-3, ema=0.0, save_every=150),
        "clip": dict(steps=300, batch=64, lr=1e-3, ema=0.0, save_every=150, join=3),
        # the prior is judged by its loss, for there is no decoder yet
        "prior": dict(steps=800, lr=1e-3, ema=0.99, save_every=400, views=4, join=3, score_images=0),
        "decoder": dict(steps=1000, lr=2e-3, ema=0.99, save_every=500, views=4),
    },
}  # fmt: skip
DECODER_SCHEDULE = replace(SCHEDULES[1], prediction="v", clip=3.0)
TEMPERATURE = 0.07  # of the contrastive loss; the learned one of CLIP begins there


class Tiny(Kandinsky2):
    """Kandinsky 2.2 in small. `networks` holds the shapes of its parts, as their constructors take them."""

    stages = {"vae": ("movq",), "clip": ("text_encoder", "image_encoder"), **Kandinsky2.stages}

    def __init__(self, tokenizer: ClipTokenizer, networks: dict[str, dict], **settings):
        parts = {}
        for name, make in NETWORKS.items():
            size = {"vocab_size": len(tokenizer)} if name == "text_encoder" else {}
            parts[name] = make(**networks[name], **size)
        super().__init__(tokenizer, parts, (SCHEDULES[0], DECODER_SCHEDULE), published=False, **settings)
        self.networks = networks

    def frozen(self, stage: str) -> dict[str, tuple[str, Callable]]:
        return super().frozen(stage) if stage in Kandinsky2.stages else {}

    def draws(self, stage: str) -> bool:
        return stage in Kandinsky2.stages

    def forward(self, batch: dict, stage: str, step: int) -> dict[str, Tensor]:
        if stage == "vae":
            return {"loss": F.l1_loss(self.reconstruct(batch["image"]), batch["image"])}
        if stage == "clip":
            return {"loss": self.contrast(batch["image"], batch["prompt"])}
        return super().forward(batch, stage, step)

    def contrast(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Cross-entropy of each image choosing its text among those of the batch, and of each text its image."""
        pictures = F.normalize(self.embed(images), dim=-1)
        texts = F.normalize(self.encode_text(prompts)["text_embeds"], dim=-1)
        scores = pictures @ texts.T / TEMPERATURE  # (B, B)
        own = torch.arange(len(images), device=images.device)
        return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] through MoVQ and back."""
        return self.movq.decode(self.movq.encode(images))

    def finish(self, stage: str, image_batches: Iterable[Tensor]) -> dict[str, float]:
        """Bring latents and embeddings to unit deviation by the weights themselves, which changes no image."""
        if stage not in ("vae", "clip"):
            return {}
        seen = torch.cat([(self.movq.encode if stage == "vae" else self.embed)(images) for images in image_batches])
        deviation = seen.std()
        if stage == "clip":
            self.image_encoder.visual_projection.weight.div_(deviation)
            return {"embedding_std": deviation.item()}
        for tensor in (self.movq.quant_conv.weight, self.movq.quant_conv.bias):
            tensor.div_(deviation)
        readers = [m for m in self.movq.modules() if isinstance(m, SpatialNorm)]
        for convolution in [self.movq.post_quant_conv, *(c for norm in readers for c in (norm.conv_y, norm.conv_b))]:
            convolution.weight.mul_(deviation)
        return {"latent_std": deviation.item()}

    def example(self, stage: str, batch: int, device: torch.device) -> dict:
        if stage in Kandinsky2.stages:
            return super().example(stage, batch, device)
        images = torch.rand(batch, 3, self.size, self.size, device=device) * 2 - 1
        return {"image": images, "prompt": [f"Generate an image with {i} polyps." for i in range(batch)]}

    def config(self) -> dict:
        return super().config() | {"system": "kandinsky2-tiny", "networks": self.networks}

    def save(self, folder: str | Path, parts: Iterable[str] = ()) -> None:
        self.tokenizer.save(Path(folder) / "tokenizer")
        super().save(folder, parts)


def build(
    preset: str, weights_folder: str | None = None, random: bool = False, dtype: torch.dtype | None = None, **options
) -> Tiny:
    """A miniature with random weights, and the vocabulary that is shipped with the tiny MSDM."""
    tokenizer = ClipTokenizer.from_folder(weights.find("msdm-tiny", weights_folder) / "tokenizer")
    return Tiny(tokenizer, **PRESETS[preset] | options)


def load(folder: str | Path, weights_folder: str | None = None, dtype: torch.dtype | None = None) -> Tiny:
    """Read what `Tiny.save` wrote, its adapters folded in."""
    settings = {name: value for name, value in read_config(folder).items() if name != "system"}
    system = weights.build(Tiny, ClipTokenizer.from_folder(Path(folder) / "tokenizer"), **settings)
    system.read_parts(folder, dtype)
    system.fold()
    return system.eval()
