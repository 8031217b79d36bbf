"""Hunyuan-DiT (Li et al. 2024): a transformer with long skips on SDXL's latents, which reads BERT's and mT5's states.

    prompt --BERT, 77 tokens; mT5, 256 tokens--> states --keys and values of all blocks--+
                                                                                         v
    noise (B, 4, 128, 128) --50 ancestral steps on v, guidance 5--> latents --VAE--> image (B, 3, 1024, 1024)

`nanomed.load("hunyuan", weights=FOLDER)` reads v1.1 or v1.2 in the layout for diffusers, as the folder's own files say;
v1.1 is told the image's size. miniatures/hunyuan.py learns from nothing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanomed import weights
from nanomed.adapters import lora
from nanomed.autoencoders.kl import AutoencoderKL, KLConfig, load_kl
from nanomed.data import buckets, grammar
from nanomed.denoisers.hunyuan import HunyuanConfig, HunyuanTransformer, load_hunyuan
from nanomed.diffusion import samplers
from nanomed.diffusion.guidance import guided
from nanomed.diffusion.process import Cond, Diffusion
from nanomed.systems.assembly import TRANSFORMERS, Found, Part
from nanomed.systems.base import Reading, System, Weighting, each_once
from nanomed.systems.sizes import cropped, standard, standards
from nanomed.text.bert import Bert, BertConfig, load_bert
from nanomed.text.t5 import T5Config, T5Encoder, load_t5
from nanomed.text.unigram import T5Tokenizer, train_unigram
from nanomed.text.wordpiece import WordPiece, train_wordpiece

PRESETS = {"hunyuan": {}}  # all in the files
RECIPES = {
    "hunyuan": {"": dict(batch=1, precision="bf16", augment=False, views=1, rank=64),  # rank and alpha are Tencent's
                "transformer": dict(steps=10_000, ema=0.0)},
}  # fmt: skip
OPTIONS = (Weighting, Reading)  # of train.py for these presets
DIFFUSION = Diffusion(0.00085, 0.018, "scaled_linear", "v", "leading", 1)  # of v1.2, where no file says it
MT5_XL = dict(vocab_size=250112, d_model=2048, d_ff=5120, num_heads=32)


class Hunyuan(System):
    """Transformer + BERT + mT5 + VAE. Trained by MSE between v and the first half of the channels (base.py).

    size   side of images; None: the transformer's own
    """

    defaults = dict(size=None, steps=50, guidance=5.0, snr_gamma=0.0)
    name = "hunyuan"
    parts = {
        "transformer": Part(lambda **c: HunyuanTransformer(HunyuanConfig(**c)), load_hunyuan),
        "text_encoder": Part(lambda **c: Bert(BertConfig(**c)), load_bert, TRANSFORMERS),
        "text_encoder_2": Part(lambda **c: T5Encoder(T5Config(**(c or MT5_XL))), load_t5, TRANSFORMERS),
        "vae": Part(lambda **c: AutoencoderKL(KLConfig(**c)), load_kl),
    }
    tokenizers = {"tokenizer": (WordPiece.from_folder, ""), "tokenizer_2": (T5Tokenizer.from_folder, "")}
    repository, denoiser = "Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers", "transformer"
    stages, adapters = {"transformer": ("transformer",)}, {"transformer": lora.ATTENTION}
    text_fields = ("bert", "bert_mask", "t5", "t5_mask")

    def __init__(self, found: Found, diffusion: Diffusion = DIFFUSION, **settings: Any):
        super().__init__(found, **settings)
        c, vae = self.transformer.config, self.vae
        wanted = (c.cross_attention_dim, c.cross_attention_dim_t5, c.in_channels)
        there = (self.text_encoder.config.hidden_size, self.text_encoder_2.config.d_model, vae.config.latent_channels)
        if wanted != there:
            raise weights.WeightsError(f"a transformer for BERT, T5 and latents of {wanted} channels, not of {there}")
        if self.shapes:
            self.stages = {"vae": ("vae",), "base": ("transformer", "text_encoder", "text_encoder_2"), **self.stages}
        self.size, self.diffusion = self.size or c.sample_size * vae.factor, diffusion
        self.unit = 1 if c.sample_size == 128 else vae.factor * c.patch_size
        self.latent_shape, self.text_shape = self.latent_size(self.size, self.size), (c.text_len, wanted[0])

    @classmethod
    def stated(cls, place: Callable[[str], Path]) -> dict:
        path = place("scheduler") / "scheduler_config.json"
        if (solver := weights.settings(path, "a scheduler").get("_class_name")) != "DDPMScheduler":
            raise weights.WeightsError(f"{path}: Hunyuan-DiT is sampled by DDPMScheduler, not by {solver}")
        return {"diffusion": Diffusion.from_json(path)}

    @classmethod
    def new_tokenizers(cls, shapes: dict[str, dict], weights_folder: str | Path | None) -> dict[str, Any]:
        words, sizes = grammar.all_prompts(), {name: shape.get("vocab_size", 0) for name, shape in shapes.items()}
        return {"tokenizer": train_wordpiece(words, sizes.get("text_encoder", 400)),
                "tokenizer_2": train_unigram(words, sizes.get("text_encoder_2", 512) - 100)}  # fmt: skip

    def bucket_shapes(self) -> tuple[tuple[int, int], ...]:
        if (self.unit, self.size) == (1, 1024):  # those of the published training
            return standards(self.size)
        return buckets.shapes(self.size, self.vae.factor * self.transformer.config.patch_size)

    @each_once
    def encode_text(self, prompts: list[str]) -> Cond:
        """Of both readers the states, at padding too (T5's are pooled), and where there is text: {"bert": (B, 77, D),
        "bert_mask": bool (B, 77), "t5": (B, 256, E), "t5_mask": bool (B, 256)}. Each distinct prompt is read once."""
        lengths = {"": self.transformer.config.text_len, "_2": self.transformer.config.text_len_t5}
        made: list[Tensor] = []
        for which, length in lengths.items():
            ids, mask = getattr(self, f"tokenizer{which}")(prompts, length=length)
            device = self.weight(f"text_encoder{which}").device
            made += [self.get_submodule(f"text_encoder{which}")(ids.to(device), mask.to(device)), mask]
        return dict(zip(self.text_fields, made))

    def read(self, text: Cond, height: int, width: int) -> Cond:
        states = {name: text[name] if name.endswith("mask") else text[name].to(self.dtype) for name in self.text_fields}
        if self.transformer.config.use_style_cond_and_image_meta_size:  # v1.1, in the published pipeline's precision
            states["sizes"] = self.transformer.sizes_of(height, width, len(states["t5"])).to(self.dtype)
        return self.transformer.read_text(**states)

    def example(self, stage: str, batch: int, device: torch.device) -> dict:
        made, c = super().example(stage, batch, device), self.transformer.config
        if "prompt_embeds" in made:
            made["bert"], made["bert_mask"] = made.pop("prompt_embeds"), made.pop("attention_mask")
            made["t5"] = torch.randn(batch, c.text_len_t5, c.cross_attention_dim_t5, device=device)
            made["t5_mask"] = made["t5"][..., 0] < 9
        return made

    def sample(self, prompts: list[str], noise: samplers.Noise, steps: int | None = None, guidance: float | None = None,
               negative_prompts: list[str] | None = None, height: int | None = None, width: int | None = None,
               binning: bool = True) -> Tensor:  # fmt: skip
        """Draw one image for each prompt: (B, 3, height, width) in [0, 1]. `noise.randn` is asked for the initial
        latents and once a step. With `binning`, other sizes than `size` are drawn at the nearest one of the published
        training, and scaled and cropped."""
        height, width = drawn = height or self.size, width or self.size
        if binning and drawn != (self.size, self.size) and self.transformer.config.sample_size == 128:
            drawn = standard(height, width)
        x = noise.randn(*self.latent_size(*drawn))
        cond, null = self.conditions(prompts, negative_prompts, *drawn)
        denoise = self.noise_of(guided(self.transformer, cond, null, self.guidance if guidance is None else guidance))
        x = samplers.ddpm(denoise, self.diffusion, x.to(self.device), steps or self.steps, noise)
        return self.to_unit(cropped(self.decode(x), height, width))
