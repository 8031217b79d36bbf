"""LLaVA-NeXT (Liu et al. 2024): CLIP's patches, projected, in place of `<image>` in the text of a language model.

Three layouts of the published files come to the names of the second, that of `-hf`:

| files                          | language model                     | image tower                 | projector               |
|--------------------------------|------------------------------------|-----------------------------|-------------------------|
| `lmms-lab` (Med-Art's)         | `model.layers`, `lm_head`          | `model.vision_tower.vision_tower.vision_model` | `model.mm_projector.{0,2}` |
| `-hf`, Llama 3 and Mistral     | `language_model.{model,lm_head}`   | `vision_tower.vision_model` | `multi_modal_projector.linear_{1,2}` |
| as transformers saves them now | the same                           | `vision_tower`              | the same                |

What else the layout decides is in tiles.py. The tower's last layer and `post_layernorm` are in the files and unused.
"""  # noqa: E501

import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from nanomed import weights
from nanomed.captions.networks.decoder import Decoder, DecoderConfig
from nanomed.captions.networks.tiles import Tiles
from nanomed.text.clip_vision import ClipVision, ClipVisionConfig
from nanomed.weights import WeightsError

RENAMED = (  # the first that matches; names of `lmms-lab`, and of a module of transformers, to those of `-hf`
    (r"model\.vision_tower\.vision_tower\.", "vision_tower."),
    (r"model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"model\.language_model\.", "language_model.model."),
    (r"model\.(vision_tower|multi_modal_projector|image_newline)", r"\1"),
    (r"model\.", "language_model.model."),
    (r"lm_head\.", "language_model.lm_head."),
)
TILES_AT_A_TIME = 16  # that the tower looks at


@dataclass(frozen=True)
class LlavaConfig:
    """The shapes of a LLaVA-NeXT, and where the image stands in the text."""

    text: DecoderConfig
    vision: ClipVisionConfig = ClipVisionConfig(image_size=336)
    image_token: int | None = None  # None: not in the vocabulary; the text is cut at `<image>` (LLaVA's own code)
    layer: int = -2  # of the tower's states, 0 being its input

    @classmethod
    def from_settings(cls, said: dict, what: str, shapes: dict[str, torch.Size] | None = None) -> "LlavaConfig":
        """Of a published configuration in any layout. LLaVA's own says of the tower no more than whose it is
        (`mm_vision_tower`); then `shapes`, those of the tensors, tell. Raises WeightsError."""
        if "text_config" in said and said.get("model_type") == "llava_next":
            known = dict(vision_feature_select_strategy="default", projector_hidden_act="gelu",
                         multimodal_projector_bias=True)  # fmt: skip
            layer, token = said.get("vision_feature_layer", -2), said.get("image_token_index", 32000)
            text = {"model_type": "llama", **said["text_config"]}
            # the head belongs to the whole model, whatever the text's own part says
            text["tie_word_embeddings"] = said.get("tie_word_embeddings", False)
        else:
            known = dict(mm_vision_select_feature="patch", mm_projector_type="mlp2x_gelu", image_aspect_ratio="anyres",
                         mm_patch_merge_type="spatial_unpad", mm_use_im_start_end=False)  # fmt: skip
            layer, token = said.get("mm_vision_select_layer", -2), None
            text = {**said, **said.get("text_config", {})}
            text["model_type"] = text.get("model_type", "llama").removeprefix("llava_")
        for name, value in known.items():
            if said.get(name, value) != value:
                raise WeightsError(f"{what}: {name} is {said[name]!r}, which is not known here: {value!r} is")
        vision = cls.tower(said, what, shapes or {})
        if not isinstance(layer, int) or not -vision.num_hidden_layers <= layer + 1 <= vision.num_hidden_layers:
            raise WeightsError(f"{what}: the tower of {vision.num_hidden_layers} layers has no states {layer!r}")
        return cls(DecoderConfig.from_settings(text, what), vision, token, layer)

    @staticmethod
    def tower(said: dict, what: str, shapes: dict[str, torch.Size]) -> ClipVisionConfig:
        """The shape of the tower: as `vision_config` says it, else as `shapes` tell, else that of CLIP-L/336."""
        stated = said.get("vision_config", {})
        if (kind := stated.get("model_type", "clip_vision_model")) != "clip_vision_model":
            raise WeightsError(f"{what}: an image tower {kind!r} is not known here")
        if stated:
            names = {name: stated[name] for name in vars(ClipVisionConfig()) if stated.get(name) is not None}
            return ClipVisionConfig(**{"image_size": 336} | names)
        parts = {name.split("vision_model.")[-1]: tuple(shape) for name, shape in shapes.items() if "vision" in name}
        if "embeddings.patch_embedding.weight" not in parts:
            return LlavaConfig.vision
        width, channels, patch, _ = parts["embeddings.patch_embedding.weight"]
        places, _ = parts["embeddings.position_embedding.weight"]
        layers = {name.split("layers.")[1].split(".")[0] for name in parts if "layers." in name}
        inner = parts["encoder.layers.0.mlp.fc1.weight"][0]
        return ClipVisionConfig(width, inner, len(layers), max(width // 64, 1), round((places - 1) ** 0.5) * patch,
                                patch, channels)  # fmt: skip  # heads of 64, as in all of CLIP


class Projector(nn.Module):
    """From the tower's width to the language model's: Linear -> GELU -> Linear."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.linear_1 = nn.Linear(width, out)
        self.linear_2 = nn.Linear(out, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


class LlavaNext(nn.Module):
    """`llava.see(images)` gives their tokens; `llava.language_model` reads them amid those of a text."""

    def __init__(self, config: LlavaConfig, tiles: Tiles):
        super().__init__()
        self.config, self.tiles = config, tiles
        self.vision_tower = ClipVision(config.vision, projection=False)
        self.multi_modal_projector = Projector(config.vision.hidden_size, config.text.hidden_size)
        self.image_newline = nn.Parameter(torch.empty(config.text.hidden_size))
        self.language_model = Decoder(config.text)
        nn.init.normal_(self.image_newline, std=config.text.hidden_size**-0.5)

    @property
    def writer(self) -> Decoder:
        """The language model, under the name that memory.py and models.py ask for."""
        return self.language_model

    @property
    def most_tokens(self) -> int:
        """The places that an image takes in the text at most."""
        return max(self.tiles.tokens(size) for pair in self.tiles.grids for size in (pair, pair[::-1]))

    def look(self, pixels: Tensor) -> Tensor:
        """Tiles (N, 3, side, side) -> the tower's patches as the language model reads them (N, patches, D)."""
        tower = self.vision_tower.vision_model
        states = tower.pre_layrnorm(tower.embeddings(pixels))  # (N, 1 + patches, width)
        count = self.config.layer + (len(tower.encoder.layers) + 1 if self.config.layer < 0 else 0)
        for layer in tower.encoder.layers[:count]:
            states = layer(states)
        return self.multi_modal_projector(states[:, 1:])  # without the class token

    def see(self, images: list[Image.Image]) -> list[Tensor]:
        """RGB images -> their tokens, (L, D) each: the whole image's patches, then those of the tiles line by line over
        the canvas, without border, a newline behind each line."""
        cut = [self.tiles.cut(image) for image in images]
        pixels = torch.cat(cut).to(self.image_newline)
        patches = torch.cat([self.look(part) for part in pixels.split(TILES_AT_A_TIME)])
        seen = []
        for image, states in zip(images, patches.split([len(part) for part in cut])):
            columns, rows, left, above = self.tiles.kept(image.size)
            side = self.tiles.side // self.tiles.patch
            x = states[1:].unflatten(1, (side, side)).unflatten(0, (rows, columns))  # (rows, columns, side, side, D)
            x = x.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # (rows * side, columns * side, D)
            x = x[above : len(x) - above, left : x.shape[1] - left]
            x = torch.cat([x, self.image_newline.expand(len(x), 1, -1)], dim=1)
            seen.append(torch.cat([states[0], x.flatten(0, 1)]))
        return seen


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of any layout under the names of LlavaNext. Anything else stays, for `weights.load` to judge."""

    def name_of(name: str) -> str:
        for pattern, new in RENAMED:
            if re.match(pattern, name):
                name = re.sub(f"^{pattern}", new, name)
                break
        return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)

    return {name_of(name): tensor for name, tensor in tensors.items()}


def sketch(path: str | Path, shapes: dict[str, torch.Size] | None = None) -> LlavaNext:
    """The network of a folder, as its files describe it, on the meta device; `shapes` as in `LlavaConfig`. Raises
    WeightsError."""
    said = weights.settings(path, "a LLaVA-NeXT")
    config = LlavaConfig.from_settings(said, str(path), shapes)
    own = said.get("model_type") != "llava_next"
    tiles = Tiles.of(path, said, config.vision.image_size, config.vision.patch_size, wide=own)
    return weights.build(LlavaNext, config, tiles)


def load_llava(path: str | Path, dtype: torch.dtype | None = None) -> LlavaNext:
    """The model of a folder in any of the layouts (one file or shards), in evaluation mode. Raises WeightsError.

    Files of LLaVA's own layout may leave the tower out; then it is read from the repository that they name.
    """
    path = Path(path)
    said = weights.settings(path, "a LLaVA-NeXT")
    tensors = renamed(weights.read(path, "model", dtype=dtype))
    if said.get("model_type") != "llava_next" and not any(name.startswith("vision_tower.") for name in tensors):
        tower = weights.find(said.get("mm_vision_tower", "openai/clip-vit-large-patch14-336"), path.parent.parent)
        found = weights.read(tower, "model", prefix="vision_model.", dtype=dtype)
        tensors |= {f"vision_tower.{name}": tensor for name, tensor in found.items()}
    network = sketch(path, {name: tensor.shape for name, tensor in tensors.items()})
    optional = ("language_model.lm_head.weight",) if network.config.text.tie_word_embeddings else ()
    return weights.load(network, tensors, optional).eval()
