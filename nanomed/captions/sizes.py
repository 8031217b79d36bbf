"""What a captioner needs on a card, by arithmetic on shapes: nothing is downloaded, loaded or run.

    python -m nanomed.captions vsg folder:DIR --model ovis --dry_run

The captioners that are called by name have their published shapes here; of a folder, `config.json` says them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from nanomed import weights
from nanomed.captions.memory import Int8Linear, tensors_of, to_int8, writer_of
from nanomed.captions.models import family
from nanomed.captions.networks.decoder import DecoderConfig
from nanomed.captions.networks.llava import LlavaConfig, LlavaNext
from nanomed.captions.networks.ovis import Ovis, OvisConfig, Partition
from nanomed.captions.networks.tiles import Tiles
from nanomed.captions.networks.towers import SIGLIP, TowerConfig

QUESTION = 200  # tokens of a question about an image, at most
CARDS = (8, 12, 16, 24, 32, 40, 48, 80)  # gigabytes
MISTRAL = DecoderConfig("mistral", vocab_size=32064, rope_theta=1e6)
GEMMA2 = DecoderConfig("gemma2", 256000, 3584, 14336, 42, 16, 8, 256, "gelu_pytorch_tanh", 1e-6, 1e4, True, 4096, 256,
                       50.0, 30.0)  # fmt: skip  # 9B
QWEN2 = DecoderConfig("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, "silu", 1e-6, 1e6)  # 2.5, 7B
HUGE = TowerConfig(hidden_size=1536, intermediate_size=4096, num_attention_heads=12)  # AIMv2-huge/14
KNOWN: dict[str, Callable[[], nn.Module]] = {
    "llava-llama3": lambda: LlavaNext(LlavaConfig(DecoderConfig()), Tiles(wide=True)),
    "llava-mistral": lambda: LlavaNext(LlavaConfig(MISTRAL, image_token=32000), Tiles()),
    "ovis": lambda: Ovis(OvisConfig(GEMMA2, SIGLIP), Partition(SIGLIP.image_size)),
    "ovis2": lambda: Ovis(OvisConfig(QWEN2, HUGE), Partition()),
}


def sketch(model: str, folder: str = "") -> nn.Module:
    """The network of a captioner, on the meta device: one that is known by name, or that of a folder.

    Raises WeightsError, WeightsNotFound.
    """
    if model in KNOWN:
        return weights.build(KNOWN[model])
    path = weights.find(folder or model)
    return family(weights.settings(path, "a language model"))[0](path)


@dataclass(frozen=True)
class Needs:
    """Gigabytes (1e9 bytes) on each device: weights, keys and values, the largest of a pass, and CUDA itself."""

    weights: float
    cache: float
    passing: float
    cuda: float = 1.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.cache + self.passing + self.cuda

    @property
    def card(self) -> str:
        """The smallest card that holds it."""
        return next((f"{size} GB" for size in CARDS if size >= self.total), "none")

    @classmethod
    def of(
        cls, network: nn.Module, batch: int, prompt: int, new: int, place: str = "device", world: int = 1
    ) -> "Needs":
        """Of a network, which may be on the meta device, for `batch` prompts of `prompt` tokens and `new` new ones.

        place   device; cpu: two layers at a time; share: one whole layer and 1 / `world` of all
        """
        writer = writer_of(network)
        c, layers = writer.config, writer.model.layers
        inside = sum(_bytes(layer) for layer in layers)
        one = max(_bytes(layer) for layer in layers)
        there = {"device": inside, "cpu": 2 * one, "share": inside / world + one}[place]
        size = writer.model.embed_tokens.weight.element_size()
        cache = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * size * batch * (prompt + new)
        passing = batch * prompt * (3 * c.intermediate_size + 4 * c.hidden_size) * size
        if c.attn_logit_softcapping is not None:  # all scores at once, capped and as probabilities
            passing = max(passing, batch * c.num_attention_heads * prompt**2 * (2 * size + 4))
        passing += 3 * batch * c.vocab_size * 4 + _widest(network) * size  # logits in float32; an int8 matrix unpacked
        return cls((_bytes(network) - inside + there) / 1e9, cache / 1e9, passing / 1e9)


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for _, _, tensor in tensors_of(module))


def _widest(network: nn.Module) -> int:
    """Elements of the largest matrix in whole numbers; 0 where there is none."""
    return max((m.weight.numel() for m in network.modules() if isinstance(m, Int8Linear)), default=0)


@dataclass(frozen=True)
class Job:
    """What is to be done: so many images, some at a time, with up to `new` tokens written about each."""

    images: int
    batch: int = 4
    new: int = 150
    world: int = 2  # processes that share


def report(name: str, network: nn.Module, dtype: torch.dtype, job: Job) -> str:
    """The table of a dry run: every place of the weights, whole and in whole numbers. `network` is changed by it."""
    prompt = QUESTION + network.most_tokens if hasattr(network, "most_tokens") else QUESTION
    network = network.to(dtype)
    count = sum(parameter.numel() for parameter in network.parameters())
    lines = [
        f"{name}: {count / 1e9:.1f} billion weights; {job.images:,} images, {job.batch} at a time, each of up to "
        f"{prompt:,} tokens with its question, and {job.new:,} written", "",
        f"{'GB on a device':28s}{'weights':>9s}{'cache':>9s}{'a pass':>9s}{'all':>9s}   card",
    ]  # fmt: skip

    def row(said: str, place: str) -> None:
        needs = Needs.of(network, job.batch, prompt, job.new, place, job.world)
        numbers = "".join(f"{x:9.1f}" for x in (needs.weights, needs.cache, needs.passing, needs.total))
        lines.append(f"{said:28s}{numbers}   {needs.card}")

    row("--place device", "device")
    row("--place cpu", "cpu")
    row(f"--place share, {job.world} processes", "share")
    to_int8(writer_of(network))
    row("--place device --int8", "device")
    row("--place cpu --int8", "cpu")
    return "\n".join(lines)
