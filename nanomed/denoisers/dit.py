"""DiT (Peebles & Xie 2023): a transformer on patches of latents, conditioned on a class. Med-Art's baseline is S/8.

    dit = DiT(DiTConfig.named("S/8", num_classes=8))
    out = dit(x, t, labels)                     # (B, 8, H, W): epsilon, then where its variance lies in its range
    null = dit.null(len(x))                     # the label of no class, for guidance

Parameter names are those of facebookresearch/DiT and fast-DiT. Time and class enter through every LayerNorm and gate
(adaLN-Zero, section 3.2). Their files also hold the table of positions, which is computed here.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanomed import weights
from nanomed.layers.blocks import sinusoid
from nanomed.layers.devices import wide
from nanomed.weights import WeightsError

SIZES = {  # depth, width, heads (table 1); any with patches of 2, 4 or 8
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
# The published sampler guides only the first 3 of the 4 latent channels (a habit from pixels, kept "for exact
# reproducibility"); the fourth and the variance are then those of the class. Give one of the two to `guided`.
PUBLISHED_GUIDED_CHANNELS = 3


@dataclass(frozen=True)
class DiTConfig:
    """The shape of the network, in the words of the published code; the defaults are those of DiT-S/8 at 512 pixels."""

    depth: int = 12
    hidden_size: int = 384
    num_heads: int = 6
    patch_size: int = 8
    in_channels: int = 4
    num_classes: int = 1000
    input_size: int = 64  # side of the latents that it is trained on
    learn_sigma: bool = True

    @classmethod
    def named(cls, name: str, **settings) -> "DiTConfig":
        """A member of the family: "S/8", "XL/2", ... with any other field by its name."""
        size, _, patch = name.removeprefix("DiT-").partition("/")
        if size not in SIZES or patch not in ("2", "4", "8"):
            raise ValueError(f"DiT {name!r} is not one of {', '.join(SIZES)} with /2, /4 or /8")
        depth, width, heads = SIZES[size]
        return cls(depth, width, heads, int(patch), **settings)

    @classmethod
    def from_json(cls, path: str | Path) -> "DiTConfig":
        """Read a `config.json`, or the one in a folder. What it leaves unsaid is the default."""
        stated = weights.settings(path, "a DiT")
        if stated.get("mlp_ratio", 4) != 4 or stated.get("class_dropout_prob", 0.1) == 0:
            raise WeightsError(f"{path}: a DiT here has an mlp_ratio of 4, and a null class (class_dropout_prob > 0)")
        return weights.configured(cls, path, "a DiT")

    @classmethod
    def of(cls, tensors: dict[str, Tensor], where: str) -> "DiTConfig":
        """The shape that the tensors of a file have, for the checkpoints that come without settings."""
        try:
            width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
            out = tensors["final_layer.linear.weight"].shape[0] // patch**2
            classes = tensors["y_embedder.embedding_table.weight"].shape[0] - 1
            side = round(tensors["pos_embed"].shape[1] ** 0.5) * patch if "pos_embed" in tensors else cls.input_size
            depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
            heads = {width: heads for _, width, heads in SIZES.values()}[width]
        except (KeyError, ValueError, IndexError) as error:
            raise WeightsError(f"{where}: not a DiT of the family ({type(error).__name__}: {error})") from error
        return cls(depth, width, heads, patch, channels, classes, side, learn_sigma=out == 2 * channels)

    @property
    def out_channels(self) -> int:
        """Those of the prediction, and as many of its variance where it is learned."""
        return self.in_channels * (2 if self.learn_sigma else 1)


# ------------------------------------------------------------------------------------------------------------- inputs


def positions(rows: int, columns: int, dim: int, device=None) -> Tensor:
    """Where a patch is: (1, rows * columns, dim) float32. The first half of the channels tells the column.

    Each half is [sin(p w), cos(p w)] with w_k = 10000^(-k / (dim/4)), in float64 as in the published code.
    """
    quarter = dim // 4
    w = 10000 ** -(torch.arange(quarter, dtype=torch.float64, device=wide(device)) / quarter)

    def along(count: int) -> Tensor:
        angles = torch.arange(count, dtype=torch.float64, device=wide(device))[:, None] * w
        return torch.cat([angles.sin(), angles.cos()], dim=-1).float().to(device=device)  # (count, dim/2)

    column = along(columns).expand(rows, -1, -1)
    row = along(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([column, row], dim=-1).flatten(0, 1)[None]


class PatchEmbed(nn.Module):
    """Patches of the latents to tokens: (B, C, H, W) to (B, N, D)."""

    def __init__(self, c: DiTConfig):
        super().__init__()
        self.proj = nn.Conv2d(c.in_channels, c.hidden_size, c.patch_size, stride=c.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


class TimestepEmbedder(nn.Module):
    """Sinusoids of the timestep through two layers."""

    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:  # int64 (B,) -> (B, D)
        return self.mlp(sinusoid(t, 256).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """A row for each class, and a last one for none."""

    def __init__(self, classes: int, dim: int):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, dim)

    def forward(self, labels: Tensor) -> Tensor:  # int64 (B,) -> (B, D)
        return self.embedding_table(labels)


# ------------------------------------------------------------------------------------------------------------- blocks


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LN(x) (1 + scale) + shift, with x (B, N, D) and shift and scale (B, 1, D)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class Attention(nn.Module):
    """Among all patches."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, D / heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Four times as wide inside, with the approximate GELU."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """x + gate_a attn(LN_a(x)), then x + gate_m mlp(LN_m(x)); shifts, scales and gates come from time and class."""

    def __init__(self, c: DiTConfig):
        super().__init__()
        self.attn = Attention(c.hidden_size, c.num_heads)
        self.mlp = MLP(c.hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(c.hidden_size, 6 * c.hidden_size))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """x (B, N, D), cond (B, D)."""
        six = self.adaLN_modulation(cond)[:, None].chunk(6, dim=-1)  # (B, 1, D) each
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = six
        x = torch.addcmul(x, gate_a, self.attn(modulated(x, shift_a, scale_a)))
        return torch.addcmul(x, gate_m, self.mlp(modulated(x, shift_m, scale_m)))


class FinalLayer(nn.Module):
    """Modulated norm, and each token to a patch's output."""

    def __init__(self, c: DiTConfig):
        super().__init__()
        self.linear = nn.Linear(c.hidden_size, c.patch_size**2 * c.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(c.hidden_size, 2 * c.hidden_size))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:  # (B, N, D) -> (B, N, p p C)
        shift, scale = self.adaLN_modulation(cond)[:, None].chunk(2, dim=-1)
        return self.linear(modulated(x, shift, scale))


class DiT(nn.Module):
    """Predict epsilon, and with `learn_sigma` its variance, from noisy latents, a timestep and a class.

    checkpointing   an attribute to set: blocks forget their activations and compute them again in the backward pass
    """

    def __init__(self, config: DiTConfig = DiTConfig()):
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(config.hidden_size)
        self.y_embedder = LabelEmbedder(config.num_classes, config.hidden_size)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.final_layer = FinalLayer(config)
        self.initialise()

    def null(self, rows: int) -> Tensor:
        """int64 (rows,): the label of no class. (The published sample.py says 1000, which is ImageNet's.)"""
        return torch.full((rows,), self.config.num_classes, device=self.final_layer.linear.weight.device)

    def relabel(self, classes: int) -> None:
        """Fresh embeddings for another number of classes."""
        self.config = replace(self.config, num_classes=classes)
        old, self.y_embedder = self.y_embedder, LabelEmbedder(classes, self.config.hidden_size)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        self.y_embedder.to(old.embedding_table.weight)

    def dropped(self, labels: Tensor, drop: Tensor) -> Tensor:
        """labels int64 (B,) with the null label where `drop` bool (B,): for guidance, a tenth of them in training."""
        return labels.masked_fill(drop, self.config.num_classes)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """x (B, C, H, W) with sides that the patch divides, t int64 (B,), labels int64 (B,) in [0, num_classes], the
        last being the null class. Returns (B, 2 C, H, W), or (B, C, H, W) without a learned variance."""
        p = self.config.patch_size
        rows, columns = x.shape[2] // p, x.shape[3] // p
        if x.shape[2] % p or x.shape[3] % p:
            raise ValueError(f"latents of {x.shape[2]} x {x.shape[3]} are not made of patches of {p} x {p}")
        h = self.x_embedder(x)  # (B, N, D)
        h = h + positions(rows, columns, h.shape[-1], h.device).to(h.dtype)
        cond = self.t_embedder(t) + self.y_embedder(labels)  # (B, D)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, cond, use_reentrant=False)
            else:
                h = block(h, cond)
        h = self.final_layer(h, cond).unflatten(2, (p, p, -1)).unflatten(1, (rows, columns))  # (B, H/p, W/p, p, p, C)
        return h.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, H, W)

    def initialise(self) -> None:
        """The published start (section 3.2): every block is the identity and the output zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.config.hidden_size, -1))
        for table in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(table.weight, std=0.02)
        modulations = [part.adaLN_modulation[1] for part in (*self.blocks, self.final_layer)]
        for layer in (*modulations, self.final_layer.linear):
            nn.init.zeros_(layer.weight)


# ----------------------------------------------------------------------------------------------------------- the files

OPTIONAL = ("pos_embed",)  # (1, N, D), fixed


def load_dit(path: str | Path, dtype: torch.dtype | None = None) -> DiT:
    """A DiT in evaluation mode, of a folder with `config.json` and its weights, or of a `.pt` file: one of the
    published DiT-XL/2, or a fast-DiT checkpoint, of which the moving average ("ema") is taken.

    dtype   convert to it while reading; None keeps the file's

    Raises WeightsError where a file is missing, damaged or of another network.
    """
    path = Path(path)
    if path.suffix == ".pt":
        tensors = _checkpoint(path, dtype)
        config = DiTConfig.of(tensors, str(path))
    else:
        config, tensors = DiTConfig.from_json(path), weights.read(path, dtype=dtype)
    stored = tensors.get("pos_embed")
    if stored is not None:
        side = config.input_size // config.patch_size
        expected = positions(side, side, config.hidden_size)
        if stored.shape != expected.shape or (stored.float() - expected).abs().max() > 1e-2:
            raise WeightsError(
                f"{path}: pos_embed {tuple(stored.shape)} is not the fixed one of {side} x {side} patches"
            )
    return weights.load(weights.build(DiT, config), tensors, OPTIONAL).eval()


def _checkpoint(path: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors of a `.pt` file: flat, or below "ema" beside "model", "opt" and the settings of the training."""
    if not path.is_file():
        raise weights.WeightsNotFound(f"{path} is missing")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # "args": a bag of plain values
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        tensors = {name.removeprefix("module."): tensor for name, tensor in content.get("ema", content).items()}
        return {name: t.to(dtype) if dtype and t.is_floating_point() else t for name, t in tensors.items()}
    except Exception as error:  # torch raises all sorts here
        raise WeightsError(f"{path}: not a checkpoint of tensors ({type(error).__name__})") from error
