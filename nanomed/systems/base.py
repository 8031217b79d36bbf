"""What every system is: parts with published names, stages that train some of them, and four verbs."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from nanomed import files, runtime, weights
from nanomed.diffusion import Cond


class System(nn.Module):
    """A text-to-image system. Its parts are plain attributes (`vae`, `unet`, `text_encoder`, ...).

    stages    name of a stage -> the parts it trains, in the order of the paper
    size      the side of its images in pixels
    dropout   the share of training prompts replaced by ""
    """

    stages: dict[str, tuple[str, ...]]
    size: int
    dropout: float = 0.0

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

    def finish(self, stage: str, image_batches) -> dict[str, float]:
        """Called once when a stage has ended, with batches of training images; returns what it measured."""
        return {}

    def resume(self, stage: str, folder: str | Path) -> None:
        """Take over what a finished stage left in `folder`: the parts it trained and what `finish` measured."""
        self.read_parts(folder, parts=self.stages[stage])

    def trainable(self, stage: str) -> dict[str, nn.Parameter]:
        """Freeze everything but the stage's parts; return their parameters by name."""
        self.requires_grad_(False).eval()
        for part in self.stages[stage]:
            self.get_submodule(part).requires_grad_(True).train()
        return runtime.parameters(self, self.stages[stage])

    # -------------------------------------------------------------------------------------------------- folders

    def config(self) -> dict:
        """Everything but the weights, as JSON: what the constructor takes."""
        raise NotImplementedError

    def saved_parts(self) -> dict[str, str]:
        """Part -> the stem of its file. A frozen part that has its own published file is not saved again."""
        raise NotImplementedError

    def save(self, folder: str | Path, parts: Iterable[str] = ()) -> None:
        """Write `system.json` and one folder for each of the given parts, or all, as published systems are laid out.
        `system.json` comes last."""
        folder = Path(folder)
        for part, stem in self.saved_parts().items():
            if not parts or part in parts:
                files.write_tensors(folder / part / f"{stem}.safetensors", dict(self.get_submodule(part).state_dict()))
        files.write_json(folder / "system.json", self.config())

    def read_parts(self, folder: str | Path, dtype: torch.dtype | None = None, parts: Iterable[str] = ()) -> None:
        """Load the given parts, or all, from where `save` wrote them, strictly."""
        for part, stem in self.saved_parts().items():
            if not parts or part in parts:
                tensors = weights.read(Path(folder) / part, stem=stem, dtype=dtype)
                weights.load(self.get_submodule(part), tensors)


def read_config(folder: str | Path) -> dict:
    """The `system.json` of a saved system."""
    path = Path(folder) / "system.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: this is not a folder that train.py has saved a system in")
    return json.loads(path.read_text(encoding="utf-8"))
