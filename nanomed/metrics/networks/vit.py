"""ViT-B/16 (Dosovitskiy et al. 2021): the features of KFD and HFD, and the classifier of the downstream test.

KFD and HFD of Med-Art are Frechet distances between the class tokens of two public ViT classifiers, of Kvasir v2 and
of HAM10000. The paper does not name the layer; here it is the class token after the last LayerNorm, (N, 768), which is
what the classifier itself reads. Names are those of the published checkpoints.

    network = vit.load(weights.find("mmuratarat/kvasir-v2-classifier"))
    features = vit.classifier_features(network, images)
    distance = scores.frechet_distance(features, reference)
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from nanomed import weights
from nanomed.weights import WeightsError

KVASIR = "mmuratarat/kvasir-v2-classifier"  # KFD
SKIN = "Anwarkh1/Skin_Cancer-Image_Classification"  # HFD; the paper misspells it
BACKBONE = "google/vit-base-patch16-224-in21k"  # where both, and the downstream classifiers, start from
PICKLE = "pytorch_model.bin"
TIMM = (  # parts of names in files of timm and of torch.hub, and what they are called here; `qkv` is three in one
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("blocks.", "encoder.layer."),
    (".attn.proj.", ".attention.output.dense."),
    (".attn.qkv.", ".attention.attention.qkv."),
)


@dataclass(frozen=True)
class VitConfig:
    """The shape of a ViT; the defaults are those of ViT-B/16."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"  # the exact one, with erf
    layer_norm_eps: float = 1e-12
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    qkv_bias: bool = True
    labels: tuple[str, ...] = ()  # `id2label`, in order; empty for a network without a classifier

    @classmethod
    def from_json(cls, path: str | Path) -> "VitConfig":
        """Read a published `config.json`, or that of a folder. Raises WeightsError."""
        stated = weights.settings(path, "a ViT")
        try:
            if stated.get("model_type", "vit") != "vit":
                raise ValueError(f"model_type {stated['model_type']!r}")
            named = {int(number): str(label) for number, label in stated.get("id2label", {}).items()}
            if sorted(named) != list(range(len(named))):
                raise ValueError("id2label does not count from 0")
        except (ValueError, AttributeError, TypeError) as error:
            raise WeightsError(f"{path}: not the configuration of a ViT ({error})") from error
        return weights.configured(cls, path, "a ViT", labels=tuple(named[number] for number in range(len(named))))


class PatchEmbeddings(nn.Module):
    """Patches to tokens."""

    def __init__(self, c: VitConfig):
        super().__init__()
        self.projection = nn.Conv2d(c.num_channels, c.hidden_size, c.patch_size, c.patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.projection(pixels).flatten(2).transpose(1, 2)  # (B, N, D), row by row


class Embeddings(nn.Module):
    """Patches behind a class token, each with the position it learned."""

    def __init__(self, c: VitConfig):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, (c.image_size // c.patch_size) ** 2 + 1, c.hidden_size))
        self.patch_embeddings = PatchEmbeddings(c)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embeddings(pixels)  # (B, N, D)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.position_embeddings  # (B, 1 + N, D)


class SelfAttention(nn.Module):
    """Of every token to all, before the projection."""

    def __init__(self, c: VitConfig):
        super().__init__()
        self.heads = c.num_attention_heads
        self.query = nn.Linear(c.hidden_size, c.hidden_size, bias=c.qkv_bias)
        self.key = nn.Linear(c.hidden_size, c.hidden_size, bias=c.qkv_bias)
        self.value = nn.Linear(c.hidden_size, c.hidden_size, bias=c.qkv_bias)

    def forward(self, x: Tensor) -> Tensor:
        split = (self.heads, x.shape[-1] // self.heads)
        q, k, v = (project(x).unflatten(-1, split).transpose(1, 2) for project in (self.query, self.key, self.value))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, L, D)


class Dense(nn.Module):
    """A linear map that the published files keep one level deeper, as `dense`."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.dense = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x)


class Attention(nn.Module):
    """With the projection behind it."""

    def __init__(self, c: VitConfig):
        super().__init__()
        self.attention = SelfAttention(c)
        self.output = Dense(c.hidden_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.attention(x))


class Layer(nn.Module):
    """x + attention(LN(x)), then x + mlp(LN(x))."""

    def __init__(self, c: VitConfig):
        super().__init__()
        self.attention = Attention(c)
        self.layernorm_before = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.intermediate = Dense(c.hidden_size, c.intermediate_size)
        self.output = Dense(c.intermediate_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.layernorm_before(x))
        return x + self.output(F.gelu(self.intermediate(self.layernorm_after(x))))


class Encoder(nn.Module):
    """The layers, under the name of the published file."""

    def __init__(self, c: VitConfig):
        super().__init__()
        self.layer = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))


class Vit(nn.Module):
    """The backbone: images (B, 3, S, S) as `preprocess` makes them -> states (B, 1 + N, D) after the last LayerNorm.

    pooler   with the tanh layer that some files carry behind the class token; no number here reads it
    """

    def __init__(self, config: VitConfig, pooler: bool = False):
        super().__init__()
        if config.hidden_act != "gelu":
            raise WeightsError(f"hidden_act {config.hidden_act!r}: a ViT here has 'gelu'")
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.pooler = Dense(config.hidden_size, config.hidden_size) if pooler else None

    def forward(self, pixels: Tensor) -> Tensor:
        size = self.config.image_size
        if pixels.shape[-2:] != (size, size):
            raise ValueError(f"images of {tuple(pixels.shape[-2:])}: this ViT looks at {size} x {size}")
        x = self.embeddings(pixels)  # (B, 1 + N, D)
        for layer in self.encoder.layer:
            x = layer(x)
        return self.layernorm(x)

    def class_token(self, pixels: Tensor) -> Tensor:
        """The feature of an image, (B, D)."""
        return self(pixels)[:, 0]

    def pooled(self, pixels: Tensor) -> Tensor:
        """tanh of a linear map of the class token, (B, D); for networks with a pooler."""
        return torch.tanh(self.pooler(self.class_token(pixels)))


class VitClassifier(nn.Module):
    """Images (B, 3, S, S) -> logits (B, labels): one linear map of the class token, without a pooler."""

    def __init__(self, config: VitConfig):
        super().__init__()
        self.config = config
        self.vit = Vit(config)
        self.classifier = nn.Linear(config.hidden_size, len(config.labels))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.classifier(self.class_token(pixels))

    def class_token(self, pixels: Tensor) -> Tensor:
        """The feature of an image, (B, D)."""
        return self.vit.class_token(pixels)


def initialise(network: nn.Module, seed: int = 0) -> None:
    """The start of a ViT that learns from nothing: N(0, 0.02) cut at two deviations, zero biases; the same bits for a
    seed, whatever the global generator did before."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if "layernorm" in name:
            nn.init.constant_(parameter, float(name.endswith("weight")))
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04, generator=draw)


def load(folder: str | Path) -> Vit | VitClassifier:
    """A published ViT, ready to run: a folder with `config.json` and `model.safetensors` or `pytorch_model.bin`.

    What the file holds decides: a classifier where there is a `classifier`, with a pooler where there is one. Raises
    WeightsError for what is missing, damaged or does not fit together.
    """
    folder = Path(folder)
    config = VitConfig.from_json(folder)
    if (folder / PICKLE).is_file() and not any(folder.glob("model*.safetensors*")):
        tensors = weights.read_pickle(folder / PICKLE)
    else:
        tensors = weights.read(folder, "model")
    if "classifier.weight" in tensors:
        unnamed = tuple(f"LABEL_{number}" for number in range(len(tensors["classifier.weight"])))  # the format's own
        network = weights.build(VitClassifier, replace(config, labels=config.labels or unnamed))
    else:
        network = weights.build(Vit, config, pooler="pooler.dense.weight" in tensors)
    return weights.load(network, tensors).requires_grad_(False).eval()


def renamed(tensors: Mapping[str, Tensor], names: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Tensors by other names: the parts of names that `names` lists exchanged, a final `norm.` called `layernorm.`, and
    each `qkv` cut into query, key and value."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        name = f"layer{name}" if name.startswith("norm.") else name
        for theirs, mine in names:
            name = name.replace(theirs, mine)
        if ".qkv." in name:
            for part, values in zip(("query", "key", "value"), tensor.chunk(3)):
                found[name.replace(".qkv.", f".{part}.")] = values
        else:
            found[name] = tensor
    return found


def resized(image: np.ndarray | Image.Image, size: int = 224) -> np.ndarray:
    """An image as uint8 (size, size, 3): stretched, not cropped, by Pillow's antialiased bilinear filter."""
    image = (image if isinstance(image, Image.Image) else Image.fromarray(image)).convert("RGB")
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def normalised(pixels: Tensor) -> Tensor:
    """uint8 (..., 3, S, S) to [-1, 1]: mean and deviation of both checkpoints are 0.5."""
    return (pixels.float() / 255 - 0.5) / 0.5


def preprocess(image: np.ndarray | Image.Image, size: int = 224) -> Tensor:
    """An image as a ViT sees it, (3, size, size) in [-1, 1]."""
    return normalised(torch.from_numpy(resized(image, size).copy()).permute(2, 0, 1))


def classifier_features(network: Vit | VitClassifier, images: Iterable[np.ndarray], batch: int = 32) -> Tensor:
    """Class tokens (N, D) of uint8 images (H, W, 3) of any sizes, streamed; on the CPU whatever the network is on."""
    device, size = next(network.parameters()).device, network.config.image_size
    found = [network.class_token(x.to(device)).cpu() for x in _batches(images, size, batch)]
    return torch.cat(found) if found else torch.empty(0, network.config.hidden_size)


def _batches(images: Iterable[np.ndarray], size: int, batch: int) -> Iterator[Tensor]:
    source = iter(images)
    while chunk := list(itertools.islice(source, batch)):
        yield torch.stack([preprocess(image, size) for image in chunk])
