"""A miniature of Kandinsky 2.2 that needs no published weights: it learns the toy world from nothing, then is adapted.

A stage "vae" comes before the prior and the decoder and trains MoVQ, by the mean absolute error of reconstructions. The
two towers of its CLIP stay as they are drawn, so image embeddings are random features: they tell boxes and instruments
apart as well as trained ones would, and what text says of them is the prior's to learn. (Five minutes of contrastive
training on sentences that most images share left them less: one direction held 95% of the variance.)

It departs from the big one where minutes on a CPU ask for it: 32 x 32 pixels, latents and embeddings of unit deviation,
a clamp at 3, and a decoder that predicts v, which learns what the embedding says in a tenth of the steps.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanomed import weights
from nanomed.systems import kandinsky2
from nanomed.systems.assembly import Found
from nanomed.systems.base import Reading
from nanomed.systems.kandinsky2 import SCHEDULES, Kandinsky2
from nanomed.systems.miniatures import TEST_PROMPTS
from nanomed.text.tokenizers import ClipTokenizer

PRESETS = {
    "kandinsky2-tiny": dict(
        size=32, steps=25, prior_steps=10, guidance=2.0, prior_guidance=2.0, dropout=0.1,
        text_encoder=dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                          max_position_embeddings=64, hidden_act="gelu", projection_dim=64),
        image_encoder=dict(hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
                           image_size=32, patch_size=8, hidden_act="gelu", projection_dim=64),
        prior=dict(num_attention_heads=4, attention_head_dim=32, num_layers=3, embedding_dim=64, num_embeddings=64),
        unet=dict(block_out_channels=(64, 96, 128), layers_per_block=1, cross_attention_dim=64,
                  attention_head_dim=32, encoder_hid_dim=64),
        movq=dict(block_out_channels=(32, 32, 64), layers_per_block=1, num_vq_embeddings=1),
    ),
}  # fmt: skip
RECIPES = {
    "kandinsky2-tiny": {
        "": dict(data="toy:2000", batch=32, schedule="cosine", warmup=20, clip=1.0,
                 test_prompts=TEST_PROMPTS),
        "vae": dict(steps=300, batch=16, lr=2e-3, ema=0.0, save_every=150),
        # the prior is judged by its loss, for there is no decoder yet
        "prior": dict(steps=600, lr=1e-3, ema=0.99, save_every=300, views=4, join=3, score_images=0),
        "decoder": dict(steps=600, lr=2e-3, ema=0.99, save_every=300, views=4),
    },
}  # fmt: skip
DECODER_SCHEDULE = replace(SCHEDULES[1], prediction="v", clip=3.0)
SPREAD = 5.0  # times CLIP's initial deviation of 0.02: the image tower attends to something, rather than to everything
TOWERS = ("text_encoder", "image_encoder")
OPTIONS = (*kandinsky2.OPTIONS, Reading)


class Kandinsky2Tiny(Kandinsky2):
    """Kandinsky 2.2 in small, all its parts fresh."""

    name = "kandinsky2-tiny"
    stages = {"vae": ("movq",), **Kandinsky2.stages}

    def __init__(self, found: Found, **settings: Any):
        super().__init__(found, (SCHEDULES[0], DECODER_SCHEDULE), **settings)
        for param in self.image_encoder.parameters():
            param.detach().mul_(SPREAD if param.dim() > 1 else 1.0)

    @classmethod
    def new_tokenizers(cls, shapes: dict[str, dict], weights_folder: str | Path | None) -> dict[str, Any]:
        """The vocabulary that is shipped with the tiny MSDM."""
        return {"tokenizer": ClipTokenizer.from_folder(weights.find("msdm-tiny", weights_folder) / "tokenizer")}

    @classmethod
    def complete(cls, shapes: dict[str, dict], tokenizers: dict[str, Any], settings: dict) -> dict[str, dict]:
        text = shapes["text_encoder"] | {"vocab_size": len(tokenizers["tokenizer"])}
        return shapes | {"text_encoder": text}

    @classmethod
    def understood(cls, settings: dict) -> dict:
        """Version 0.1 wrote the shapes under `networks`."""
        return settings | settings.pop("networks", {})

    def forward(self, batch: dict, stage: str, step: int) -> dict[str, Tensor]:
        if stage == "vae":
            return {"loss": F.l1_loss(self.reconstruct(batch["image"]), batch["image"])}
        return super().forward(batch, stage, step)

    def finish(self, stage: str, image_batches: Iterable[Tensor]) -> dict[str, float]:
        """After the autoencoder: bring latents and embeddings to unit deviation, and the embeddings' mean to zero, by
        the weights themselves. That changes no reconstruction."""
        if stage != "vae":
            return {}
        seen = [(self.movq.encode(images), self.image_encoder.embed(images)) for images in image_batches]
        latents, embeds = (torch.cat(made) for made in zip(*seen))
        deviation = latents.std()
        self.movq.divide_latents(deviation)
        projection, bias = (
            self.image_encoder.visual_projection.weight,
            self.image_encoder.vision_model.post_layernorm.bias,
        )
        projection.div_(embeds.std(0)[:, None])
        bias.sub_(torch.linalg.pinv(projection) @ (embeds.mean(0) / embeds.std(0)))  # it has no bias of its own
        return {"latent_std": deviation.item()}

    def save(self, folder: str | Path, parts: Iterable[str] = ()) -> None:
        super().save(folder, [*parts, *TOWERS] if parts else ())

    def resume(self, stage: str, folder: str | Path) -> None:
        self.read_parts(folder, parts=[*self.stages[stage], *TOWERS])
