"""The image tower of BiomedCLIP (Zhang et al. 2023), ViT-B/16: the features of the Frechet BiomedCLIP distance.

The published file holds a whole OpenCLIP model by timm's names; read are `visual.trunk.*`, a ViT as in vit.py, and the
projection of its class token, `visual.head.proj`.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from nanomed import weights
from nanomed.metrics.networks.vit import TIMM, Vit, VitConfig, renamed
from nanomed.weights import WeightsNotFound

REPOSITORY = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
NAMES = (  # of timm's blocks, and those of vit.py
    *TIMM,
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)
CONFIG = VitConfig(layer_norm_eps=1e-6)  # timm's


class BiomedClipVision(nn.Module):
    """Images (B, 3, 224, 224) as CLIP's preprocessing makes them -> embeddings (B, 512), not normalised."""

    def __init__(self, config: VitConfig = CONFIG, width: int = 512):
        super().__init__()
        self.config = config
        self.trunk = Vit(config)
        self.proj = nn.Linear(config.hidden_size, width, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.both(pixels)[1]

    def both(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Class tokens (B, 768) after the last LayerNorm, and their embeddings (B, 512)."""
        tokens = self.trunk.class_token(pixels)
        return tokens, self.proj(tokens)


def of_open_clip(whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image tower's tensors of a whole model, by the names here."""
    trunk = {name.removeprefix("visual.trunk."): t for name, t in whole.items() if name.startswith("visual.trunk.")}
    found = {f"trunk.{name}": tensor for name, tensor in renamed(trunk, NAMES).items()}
    head = {name.replace("visual.head.", ""): t for name, t in whole.items() if name.startswith("visual.head.")}
    return found | head


def tensors(folder: str | Path) -> dict[str, Tensor]:
    """Those of the whole published model, both towers."""
    there = [Path(folder) / name for name in FILES if (Path(folder) / name).is_file()]
    if not there:
        raise WeightsNotFound(f"{folder} has no {' or '.join(FILES)}")
    return weights.read(there[0]) if there[0].suffix == ".safetensors" else weights.read_pickle(there[0])


def load(folder: str | Path, config: VitConfig = CONFIG) -> BiomedClipVision:
    """The published tower, ready to run: a folder with `open_clip_model.safetensors`, or the pickle of tensors. Raises
    WeightsError."""
    mine = {name: tensor.float() for name, tensor in of_open_clip(tensors(folder)).items()}
    width = len(mine["proj.weight"]) if "proj.weight" in mine else 512
    network = weights.build(BiomedClipVision, config, width)
    return weights.load(network, mine).requires_grad_(False).eval()
