"""What every system is: parts with published names, stages that train some of them, and four verbs."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from nanomed import weights
from nanomed.adapters import formats, lora
from nanomed.diffusion.process import Cond
from nanomed.run import files
from nanomed.run.flags import UsageError


class System(nn.Module):
    """A text-to-image system. Its parts are plain attributes (`vae`, `unet`, `text_encoder`, ...).

    stages    name of a stage -> the parts it trains, in the order of the paper
    size      the side of its images in pixels
    dropout   the share of training prompts replaced by ""
    jitter    whether the random crops that it trains on have their colours changed, too
    pad       whether images that are not square get a black border, in place of being cropped
    adapters  part -> the layers of it that an adapter takes hold of (lora.py's `targets`)
    in_order  whether a stage builds on what the ones before it have trained
    base      the published repository that the weights below its adapters come from, if they do
    """

    stages: dict[str, tuple[str, ...]]
    size: int
    dropout: float = 0.0
    jitter: bool = True
    pad: bool = False
    adapters: dict[str, tuple[str, ...]] = {}
    in_order: bool = True
    base: str = ""

    def encode_text(self, prompts: list[str]) -> Cond:
        """Prompts to the conditions of the denoiser, batch first."""
        raise NotImplementedError

    def forward(self, batch: dict, stage: str, step: int) -> dict[str, Tensor]:
        """The training loss of a stage: {"loss": scalar, and whatever is worth a column in the log}."""
        raise NotImplementedError

    def sample(self, prompts: list[str], noise, steps: int | None = None, guidance: float | None = None, **options):
        """Images (B, 3, H, W) in [0, 1]; every random number comes from `noise`, in drawing order."""
        raise NotImplementedError

    def frozen(self, stage: str) -> dict[str, tuple[str, Callable]]:
        """What may be computed once in a stage: {"image": (part, images -> fields), "text": (part, prompts -> fields)}.

        The fields are entries of a training batch that `forward` takes in place of "image" or "prompt". A part that
        trains is never here.
        """
        return {}

    def uses_text(self, stage: str) -> bool:
        """Whether a stage trains on (image, prompt) pairs and can be sampled; an autoencoder's sees images alone."""
        return stage != "vae"

    def example(self, stage: str, batch: int, device: torch.device) -> dict:
        """A training batch of random numbers in the right shapes, for dry runs and benchmarks."""
        raise NotImplementedError

    def load_optional(self, stage: str, folder: str | None) -> str:
        """Look for files that a stage can use and can do without; returns a line that says what is left out, or ""."""
        return ""

    def offload(self, part: str) -> None:
        """Called when all that a frozen part makes of the data's texts is on disk; a large one may leave the device."""

    def memory(self, stage: str, batch: int) -> dict[str, float]:
        """What a stage needs on a device in GB, part by part and "in all", where a system can tell without trying."""
        return {}

    def finish(self, stage: str, image_batches) -> dict[str, float]:
        """Called once when a stage has ended, with batches of training images; returns what it measured."""
        return {}

    def resume(self, stage: str, folder: str | Path) -> None:
        """Take over what a finished stage left in `folder`: the parts it trained and what `finish` measured."""
        self.read_parts(folder, parts=self.stages[stage])

    def adapt(self, stage: str, rank: int, alpha: float | None = None, kind: str = "lora") -> None:
        """Put a fresh adapter on every part of a stage; from now on `trainable` means the adapters of these parts."""
        for part in self.stages[stage]:
            if part not in self.adapters:
                raise UsageError(f"--rank {rank}: the {part} of stage {stage} has no layers named for adapters")
            lora.inject(self.get_submodule(part), rank, alpha, self.adapters[part], kind)

    def trainable(self, stage: str) -> dict[str, nn.Parameter]:
        """Freeze everything but the stage's parts, or the adapters on them; return by name what trains."""
        self.requires_grad_(False).eval()
        for part in self.stages[stage]:
            module = self.get_submodule(part).train()
            for param in lora.parameters(module) if lora.adapted(module) else module.parameters():
                param.requires_grad_(True)
        named = {f"{part}.{name}": p for part in self.stages[stage] for name, p in
                 self.get_submodule(part).named_parameters()}  # fmt: skip
        return {name: param for name, param in named.items() if param.requires_grad}

    def fold(self) -> None:
        """Take all adapters into the weights for good: nothing to pay for them when drawing."""
        for part in self.adapters:
            if lora.adapted(self.get_submodule(part)):
                lora.fold(self.get_submodule(part))

    # -------------------------------------------------------------------------------------------------- folders

    def config(self) -> dict:
        """Everything but the weights, as JSON: what the constructor takes."""
        raise NotImplementedError

    def saved_parts(self) -> dict[str, str]:
        """Part -> the stem of its file. A frozen part that has its own published file is not saved again."""
        raise NotImplementedError

    def adapter_folder(self, part: str) -> str:
        """Where the adapter of a part lies in a saved system, as a PEFT folder."""
        return f"{part}_lora"

    def save(self, folder: str | Path, parts: Iterable[str] = ()) -> None:
        """Write `system.json` and one folder for each of the given parts, or all, as published systems are laid out:
        its weights, or its adapter alone where it has one. `system.json` comes last."""
        folder = Path(folder)
        for part, module in self.named_children():
            if parts and part not in parts:
                continue
            if lora.adapted(module):
                formats.save_peft(folder / self.adapter_folder(part), module, self.base)
            elif part in self.saved_parts():
                path = folder / part / f"{self.saved_parts()[part]}.safetensors"
                files.write_tensors(path, dict(module.state_dict()))
        files.write_json(folder / "system.json", self.config())

    def read_parts(self, folder: str | Path, dtype: torch.dtype | None = None, parts: Iterable[str] = ()) -> None:
        """Load the given parts, or all, from where `save` wrote them, strictly; adapters come on top."""
        folder = Path(folder)
        for part, module in list(self.named_children()):
            if parts and part not in parts:
                continue
            stem, adapter = self.saved_parts().get(part), folder / self.adapter_folder(part)
            adapted = part in self.adapters and (adapter / "adapter_config.json").is_file()
            if stem and ((folder / part / f"{stem}.safetensors").is_file() or not adapted):
                weights.load(module, weights.read(folder / part, stem=stem, dtype=dtype))
            if adapted:
                formats.load_peft(adapter, module)


def read_config(folder: str | Path) -> dict:
    """The `system.json` of a saved system."""
    path = Path(folder) / "system.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: this is not a folder that train.py has saved a system in")
    return json.loads(path.read_text(encoding="utf-8"))
