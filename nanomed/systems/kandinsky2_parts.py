"""Where the parts of Kandinsky 2.2 come from: the two published repositories, or the shapes of these alone.

kandinsky-2-2-prior/     prior/ text_encoder/ image_encoder/ tokenizer/ scheduler/
kandinsky-2-2-decoder/   unet/ movq/ scheduler/
"""

from collections.abc import Callable
from inspect import signature
from mmap import mmap
from pathlib import Path

import torch
from torch import nn

from nanomed import weights
from nanomed.autoencoders.movq import MoVQ
from nanomed.denoisers.kandinsky2 import DecoderUNet, PriorTransformer
from nanomed.diffusion.process import Diffusion
from nanomed.text.clip import ClipText, ClipTextConfig
from nanomed.text.clip_vision import ClipVision, ClipVisionConfig
from nanomed.text.tokenizers import ClipTokenizer
from nanomed.weights import WeightsError

PRIOR, DECODER = "kandinsky-community/kandinsky-2-2-prior", "kandinsky-community/kandinsky-2-2-decoder"
PARTS = {"prior": "diffusion_pytorch_model", "unet": "diffusion_pytorch_model", "movq": "diffusion_pytorch_model",
         "text_encoder": "model", "image_encoder": "model"}  # fmt: skip  # part -> the stem of its file
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "prior": PriorTransformer,
    "unet": DecoderUNet,
    "movq": MoVQ,
    "text_encoder": lambda **config: ClipText(ClipTextConfig(**config), projection=True),
    "image_encoder": lambda **config: ClipVision(ClipVisionConfig(**config)),
}
BIG_G = {  # OpenCLIP's; the other networks are the published ones by default
    "text_encoder": dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
                         hidden_act="gelu", projection_dim=1280),
    "image_encoder": dict(hidden_size=1664, intermediate_size=8192, num_hidden_layers=48, num_attention_heads=16,
                          hidden_act="gelu", projection_dim=1280),
}  # fmt: skip
# What a config.json may say besides shapes. With another value it would be another network, of the very same names.
KNOWN = {
    "prior": dict(norm_in_type=None, embedding_proj_norm_type=None, encoder_hid_proj_type="linear",
                  added_emb_type="prd", time_embed_act_fn="silu"),
    "unet": dict(resnet_time_scale_shift="scale_shift", encoder_hid_dim_type="image_proj", act_fn="silu",
                 addition_embed_type="image", mid_block_type="UNetMidBlock2DSimpleCrossAttn", flip_sin_to_cos=True,
                 freq_shift=0, time_embedding_type="positional", class_embed_type=None),
    "movq": dict(norm_type="spatial", act_fn="silu", lookup_from_codebook=False),
}  # fmt: skip
# Their noise where no file says it: a squared cosine and x_0 within 10, a line and x_0 within 1.
SCHEDULES = (
    Diffusion(schedule="squaredcos", prediction="sample", spacing="unclip", clip=10.0),
    Diffusion(0.00085, 0.012, spacing="leading", offset=1, clip=1.0),
)
Parts = tuple[ClipTokenizer | None, dict[str, nn.Module], tuple[Diffusion, Diffusion]]


def published(weights_folder: str | None, dtype: torch.dtype) -> Parts:
    """Tokenizer, parts and schedules of the repositories in `weights_folder` or wherever they are found.

    Raises WeightsError where a file is missing, damaged, or of another system.
    """
    of_prior, of_decoder = (weights.find(name, weights_folder) for name in (PRIOR, DECODER))
    parts = {name: _read(name, (of_decoder if name in ("unet", "movq") else of_prior) / name, dtype) for name in PARTS}
    schedules = Diffusion.from_json(of_prior / "scheduler"), Diffusion.from_json(of_decoder / "scheduler")
    return ClipTokenizer.from_folder(of_prior / "tokenizer"), parts, schedules


def _read(name: str, folder: Path, dtype: torch.dtype) -> nn.Module:
    if name == "text_encoder":
        module = weights.build(ClipText, ClipTextConfig.from_json(folder), projection=True)
    elif name == "image_encoder":
        module = weights.build(ClipVision, ClipVisionConfig.from_json(folder))
    else:
        module = weights.build(NETWORKS[name], **_settings(folder, NETWORKS[name], KNOWN[name]))
    return weights.load(module, weights.read(folder, PARTS[name], dtype=dtype))


def _settings(folder: Path, make: Callable, known: dict) -> dict:
    """What a folder's `config.json` says about the arguments of `make`."""
    stated = weights.settings(folder, f"a {make.__name__}")
    for name, value in known.items():
        if stated.get(name, value) != value:
            raise WeightsError(f"{folder}: {name} is {stated[name]!r}, where Kandinsky 2.2 has {value!r}")
    return {name: stated[name] for name in signature(make).parameters if name in stated}


def zeros(dtype: torch.dtype) -> Parts:
    """The published shapes without a file, their weights zeros that take no memory until they are written to: pages
    of the system that nobody has touched."""
    width = torch.empty((), dtype=dtype).element_size()

    def zero(shape: torch.Size) -> torch.Tensor:
        return torch.frombuffer(mmap(-1, shape.numel() * width), dtype=dtype).view(shape)

    parts = {}
    for name, make in NETWORKS.items():
        module = weights.build(make, **BIG_G.get(name, {}))
        weights.load(module, {k: zero(v.shape) for k, v in module.state_dict().items()})
        parts[name] = module
    return None, parts, SCHEDULES
