"""Ovis 1.6 and Ovis 2 (Lu et al. 2024): each patch of an image is a distribution over a visual vocabulary, and what the
language model reads is the mean embedding of that vocabulary under it.

What the published sources say, and where they differ:

|                 | Ovis 1.6 (Gemma 2)            | Ovis 2 (Qwen 2.5)              | Ovis 2 as transformers has it (`-hf`)  |
|-----------------|-------------------------------|--------------------------------|----------------------------------------|
| `model_type`    | ovis; `llm_config`, `visual_tokenizer_config` | the same       | ovis2; `text_config`, `vision_config`  |
| tower           | SigLIP so400m/14, 384 pixels  | AIMv2/14, 448 pixels           | the same                               |
| state that is read | after the last layer, before `post_layernorm` | after the last layer, before `post_trunk_norm` | after that norm |
| merged          | `hidden_stride` squared patches side by side, the grid filled up with zeros to the right and below | the same | the same |
| distribution    | softmax(LayerNorm(Linear)) over all of the vocabulary but its last five | the same | the same    |
| last five       | embeddings of signs: start, overview ends, next column, next row, end | the same | the same      |
| grid of tiles   | rows x columns <= 9, the fewest that cover > 90%, the best-covering of these; none: the best-covering | the same | <= `max_patches`, and the pair taken for columns x rows |
| a tile          | its part of the image, fitted with its aspect kept, zeros around it after normalisation | the same | the image stretched to the grid, and cut |
| overview        | the whole image first, where there are several tiles | the same | the same, stretched              |
| signs           | start, overview, sign, tiles with signs between, end; one tile: start, tile, sign, end | the same | the same |
| scale           | Gemma multiplies all that it reads by sqrt(width), what is seen too | none | none          |
| conversation    | `<bos>`, Gemma's, no system   | Qwen's, "You are a helpful assistant." | the same                       |
| text            | cut at `<image>`, tokenized without marks | the same           | the same                               |

(Gemma 2 in transformers scaled its whole input then; now its embedding does, which would leave out what is seen.)
A tile covers what is left of its area when it is shrunk until its longer side is that of the tower.
The published code of Ovis 2 asks AIMv2 for its hidden states, the last of which has not passed the trunk's norm;
transformers' conversion applies the norm. The same weights so give two answers, and the layout decides.
"""  # noqa: E501

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from nanomed import weights
from nanomed.captions.networks.decoder import Decoder, DecoderConfig
from nanomed.captions.networks.tiles import Narrow, described, normalised
from nanomed.captions.networks.towers import Aimv2, Siglip, TowerConfig
from nanomed.text.clip_vision import MEAN, STD
from nanomed.weights import WeightsError

SIGNS = 5  # start, overview ends, next column, next row, end
RENAMED = (  # names of transformers' layout to the published ones, each applied where it matches
    (r"^model\.language_model\.", "llm.model."),
    (r"^lm_head\.", "llm.lm_head."),
    (r"^model\.visual_embeddings_table\.", "vte."),
    (r"^model\.vision_tower\.head_linear\.", "visual_tokenizer.head.0."),
    (r"^model\.vision_tower\.head_norm\.", "visual_tokenizer.head.1."),
    (r"^model\.vision_tower\.transformer\.", "visual_tokenizer.backbone."),
    (r"backbone\.embeddings\.patch_embedding\.", "backbone.preprocessor.patchifier.proj."),
    (r"backbone\.embeddings\.rms_norm\.", "backbone.preprocessor.patchifier.norm."),
    (r"backbone\.embeddings\.position_embedding\.weight", "backbone.preprocessor.pos_embed"),
    (r"backbone\.rms_norm\.", "backbone.trunk.post_trunk_norm."),
    (r"backbone\.encoder\.layers\.(\d+)\.rms_norm([12])\.", r"backbone.trunk.blocks.\1.norm_\2."),
    (r"backbone\.encoder\.layers\.(\d+)\.attention\.out_proj\.", r"backbone.trunk.blocks.\1.attn.proj."),
    (r"backbone\.encoder\.layers\.(\d+)\.attention\.", r"backbone.trunk.blocks.\1.attn."),
    (r"backbone\.encoder\.layers\.(\d+)\.ffn\.gate_proj\.", r"backbone.trunk.blocks.\1.mlp.fc1."),
    (r"backbone\.encoder\.layers\.(\d+)\.ffn\.down_proj\.", r"backbone.trunk.blocks.\1.mlp.fc2."),
    (r"backbone\.encoder\.layers\.(\d+)\.ffn\.up_proj\.", r"backbone.trunk.blocks.\1.mlp.fc3."),
)
UNREAD = tuple(f"visual_tokenizer.backbone.vision_model.{name}.*" for name in ("post_layernorm", "head"))
TILES_AT_A_TIME = 16  # that the tower looks at


@dataclass(frozen=True)
class Partition:
    """How an image becomes tiles of `side` pixels, `most` at most besides the overview.

    stretched   as transformers has it: the grid transposed, the image stretched to all of it
    """

    side: int = 448
    most: int = 9
    stretched: bool = False
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    @classmethod
    def of(cls, folder: str | Path, side: int, stretched: bool, siglip: bool) -> "Partition":
        """As a folder's `preprocessor_config.json` or `processor_config.json` says. Raises WeightsError."""
        file, stated = described(folder)
        mean, std = ((0.5,) * 3, (0.5,) * 3) if siglip else (MEAN, STD)  # those of the two towers' own files
        try:
            mean, std = (tuple(map(float, stated.get(f"image_{n}") or d)) for n, d in (("mean", mean), ("std", std)))
            size = stated.get("crop_size") or stated.get("size") or {}
            if odd := [value for value in size.values() if value not in (side, None)]:
                raise ValueError(f"tiles of {odd[0]} pixels for a tower that looks at {side}")
            if not stretched:
                return cls(side, 9, False, mean, std)
            if not stated.get("use_covering_area_grid", True):
                raise ValueError("use_covering_area_grid false is not known here")
            most = int(stated.get("max_patches", 12)) if stated.get("crop_to_patches", True) else 1
        except (ValueError, TypeError, AttributeError) as error:
            raise WeightsError(f"{file}: {error}") from error
        return cls(side, most, True, mean, std)

    def covered(self, size: tuple[int, int], rows: int, columns: int) -> float:
        """The share of an image of `size` (width, height) that is left when its rows x columns parts are shrunk to
        tiles. The parts are of whole pixels, and the last of a row or column takes what remains."""
        (width, height), total = size, 0.0
        for above, below in _parts(height, rows):
            for left, right in _parts(width, columns):
                shorter, longer = sorted((right - left, below - above))
                total += shorter * longer if longer <= self.side else self.side * (shorter / longer * self.side)
        return total / (width * height)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the tiles of an image of `size` (width, height)."""
        pairs = [(a, b) for a in range(1, self.most + 1) for b in range(1, self.most + 1) if a * b <= self.most]
        ratio = {pair: self.covered(size, *pair) for pair in pairs}
        good = [pair for pair in pairs if ratio[pair] > 0.9]
        if good:
            best = min(good, key=lambda pair: (pair[0] * pair[1], -ratio[pair]))
        else:
            best = min(pairs, key=lambda pair: (-ratio[pair], pair[0] * pair[1]))
        return best[::-1] if self.stretched else best

    def cut(self, image: Image.Image) -> Tensor:
        """An RGB image -> float32 (1 or 1 + tiles, 3, side, side), the overview first."""
        (rows, columns), (width, height), side = self.grid(image.size), image.size, self.side
        several = rows * columns > 1
        if self.stretched:
            canvas = image.resize((side * columns, side * rows), Image.Resampling.BICUBIC)
            parts = [image.resize((side, side), Image.Resampling.BICUBIC)] if several else []
            parts += [canvas.crop((x, y, x + side, y + side)) for y in range(0, side * rows, side)
                      for x in range(0, side * columns, side)]  # fmt: skip
            return torch.stack([normalised(part, self.mean, self.std) for part in parts])
        parts = [image] if several else []
        parts += [image.crop((left, above, right, below)) for above, below in _parts(height, rows)
                  for left, right in _parts(width, columns)]  # fmt: skip
        return torch.stack([self.fitted(part) for part in parts])

    def fitted(self, tile: Image.Image) -> Tensor:
        """A part of an image, its longer side that of the tower, amid zeros (3, side, side)."""
        (width, height), side = tile.size, self.side
        if width >= height:
            size = side, side if width == height else int(height / width * side)
        else:
            size = int(width / height * side), side
        if not min(size):
            raise Narrow(tile.size)
        shown = normalised(tile.resize(size, Image.Resampling.BICUBIC), self.mean, self.std)
        left, above = (side - size[0]) // 2, (side - size[1]) // 2
        return F.pad(shown, (left, side - size[0] - left, above, side - size[1] - above))


def _parts(length: int, count: int) -> list[tuple[int, int]]:
    """`length` pixels in `count` parts, the last with what remains."""
    each = length // count
    return [(i * each, length if i == count - 1 else (i + 1) * each) for i in range(count)]


@dataclass(frozen=True)
class OvisConfig:
    """The shapes of an Ovis; the defaults are those of Ovis 2, its text aside."""

    text: DecoderConfig
    tower: TowerConfig = TowerConfig()
    vocabulary: int = 65536  # visual, with the five signs
    stride: int = 2
    normed: bool = False  # transformers' layout: AIMv2's last norm is applied

    @classmethod
    def from_settings(cls, said: dict, what: str) -> "OvisConfig":
        """Of a published configuration in either layout. Raises WeightsError."""
        own = "llm_config" in said
        text = dict(said.get("llm_config" if own else "text_config") or {})
        looks = dict(said.get("visual_tokenizer_config" if own else "vision_config") or {})
        if not own:
            text["tie_word_embeddings"] = said.get("tie_word_embeddings", True)
        tower = dict(looks.get("backbone_config") or {}) if own else {**looks, "model_type": "aimv2"}
        kind = tower.get("model_type")
        if text.get("model_type") not in ("gemma2", "qwen2"):
            raise WeightsError(f"{what}: a language model {text.get('model_type')!r} of an Ovis is not known here")
        if kind not in ("aimv2", "siglip_vision_model"):
            raise WeightsError(f"{what}: an image tower {kind!r} of an Ovis is not known here")
        known = dict(tokenize_function="softmax", drop_cls_token=False, num_visual_indicator_tokens=SIGNS)
        biases = dict(qkv_bias=False, use_bias=False, mlp_bias=False, hidden_act="silu", num_channels=3)
        gelu = dict(hidden_act="gelu_pytorch_tanh", num_channels=3)
        for name, value in (known | (biases if kind == "aimv2" else gelu)).items():
            stated = looks.get(name, tower.get(name, value))
            if stated != value:
                raise WeightsError(f"{what}: {name} is {stated!r}, which is not known here: {value!r} is")
        unsaid = (vars(TowerConfig()) | dict(image_size=224) if kind == "aimv2" else
                  dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                       image_size=224, patch_size=16, eps=1e-6))  # fmt: skip
        tower["eps"] = tower.get("rms_norm_eps" if kind == "aimv2" else "layer_norm_eps", unsaid["eps"])
        try:
            shape = TowerConfig(**{name: tower.get(name, unsaid.get(name)) for name in vars(TowerConfig())})
            return cls(DecoderConfig.from_settings(text, what), shape, int(looks.get("vocab_size", 16384)),
                       int(looks.get("hidden_stride", 1)), not own)  # fmt: skip
        except TypeError as error:
            raise WeightsError(f"{what}: not the configuration of an Ovis ({error})") from error


class VisualTokenizer(nn.Module):
    """`tokenizer(pixels)` gives each merged patch's distribution over the visual vocabulary without its signs."""

    def __init__(self, c: OvisConfig):
        super().__init__()
        self.stride = c.stride
        self.backbone = Aimv2(c.tower, c.normed) if c.tower.model_type == "aimv2" else Siglip(c.tower)
        entries = c.vocabulary - SIGNS
        self.head = nn.Sequential(nn.Linear(c.tower.hidden_size * c.stride**2, entries, bias=False),
                                  nn.LayerNorm(entries))  # fmt: skip

    def forward(self, pixels: Tensor) -> Tensor:
        """Tiles (N, 3, side, side) -> (N, patches, vocabulary - 5)."""
        return self.head(self.merged(self.backbone(pixels))).softmax(-1)

    def merged(self, x: Tensor) -> Tensor:
        """States (N, side^2, D) -> stride^2 neighbours side by side, (N, ceil(side / stride)^2, stride^2 D)."""
        s, side = self.stride, round(x.shape[1] ** 0.5)
        x = F.pad(x.unflatten(1, (side, side)), (0, 0, 0, -side % s, 0, -side % s))
        x = x.unflatten(2, (-1, s)).unflatten(1, (-1, s))  # (N, rows, s, columns, s, D)
        return x.transpose(2, 3).flatten(3).flatten(1, 2)


class Ovis(nn.Module):
    """`ovis.see(images)` gives their tokens; `ovis.llm` reads them amid those of a text."""

    def __init__(self, config: OvisConfig, partition: Partition):
        super().__init__()
        self.config, self.partition = config, partition
        self.visual_tokenizer = VisualTokenizer(config)
        self.vte = nn.Embedding(config.vocabulary, config.text.hidden_size)
        self.llm = Decoder(config.text)

    @property
    def writer(self) -> Decoder:
        """The language model, under the name that memory.py and models.py ask for."""
        return self.llm

    @property
    def most_tokens(self) -> int:
        """The places that an image takes in the text at most: all tiles, the overview, and signs between."""
        tile = math.ceil(self.config.tower.patches / self.config.stride) ** 2
        return (1 + self.partition.most) * tile + self.partition.most + 2

    def see(self, images: list[Image.Image]) -> list[Tensor]:
        """RGB images -> their tokens, (L, D) each."""
        cut = [self.partition.cut(image) for image in images]
        pixels = torch.cat(cut).to(self.vte.weight)
        table, signs = self.vte.weight[:-SIGNS], self.vte.weight[-SIGNS:]
        looked = torch.cat([self.visual_tokenizer(part) @ table for part in pixels.split(TILES_AT_A_TIME)])
        seen = []
        for image, states in zip(images, looked.split([len(part) for part in cut])):
            rows, columns = self.partition.grid(image.size)
            parts = [signs[:1], states[0], signs[1:2]]
            for i, tile in enumerate(states[1:], 1):
                parts.append(tile)
                if i < rows * columns:
                    parts.append(signs[2:3] if i % columns else signs[3:4])
            seen.append(torch.cat([*parts, signs[4:]]))
        return seen


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of either layout under the names of Ovis; queries, keys and values in one."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for pattern, new in RENAMED:
            name = re.sub(pattern, new, name)
        found[name] = tensor[None] if name.endswith("pos_embed") and tensor.dim() == 2 else tensor
    for name in [name for name in found if name.endswith(".attn.q_proj.weight")]:
        q, k, v = (found.pop(name.replace("q_proj", f"{letter}_proj"), None) for letter in "qkv")
        if k is None or v is None:
            raise WeightsError(f"{name}: the keys or values beside it are missing")
        found[name.replace("q_proj", "qkv")] = torch.cat([q, k, v])
    return found


def sketch(path: str | Path) -> Ovis:
    """The network of a folder, as its files describe it, on the meta device. Raises WeightsError."""
    config = OvisConfig.from_settings(weights.settings(path, "an Ovis"), str(path))
    siglip = config.tower.model_type != "aimv2"
    return weights.build(Ovis, config, Partition.of(path, config.tower.image_size, config.normed, siglip))


def load_ovis(path: str | Path, dtype: torch.dtype | None = None) -> Ovis:
    """The model of a folder in either layout (one file or shards), in evaluation mode. Raises WeightsError."""
    network = sketch(path)
    optional = (*UNREAD, *["llm.lm_head.weight"][: network.config.text.tie_word_embeddings])
    return weights.load(network, renamed(weights.read(path, "model", dtype=dtype)), optional).eval()
