"""A training run on disk: settings, log, grids, checkpoints, and the finished system.

    runs/2026-11-24_120000-msdm/
        config.json                          every setting as resolved, versions, git commit
        log.jsonl                            one object a line
        samples/unet-step-001000.png         grids of the same prompts and seeds
        checkpoints/unet-step-001000/        model, ema, optimizer (.safetensors) and state.json, written last
        model/                               the parts whose stage is finished, as `System.save` lays them out
        state.json                           {"status": "running" | "preempted" | "done", "stages": [...]}
        README.md                            model card

A checkpoint folder appears in one rename, so every folder that is there is whole.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from nanomed.run import files
from nanomed.run.flags import UsageError
from nanomed.run.ranks import Ranks

CHECKPOINT = re.compile(r"^(?P<stage>\w+)-step-(?P<step>\d+)$")


def is_run(folder: str | Path) -> bool:
    """Whether a folder is a run's."""
    return (Path(folder) / "config.json").is_file() and (Path(folder) / "state.json").is_file()


def newest(root: str | Path, model: str = "", status: str = "") -> Path | None:
    """The newest run below `root`, of a model and with a status if these are given."""
    found = [folder for folder in Path(root).glob("*") if is_run(folder)]
    for folder in sorted(found, key=lambda folder: (folder / "config.json").stat().st_mtime, reverse=True):
        config, state = _read(folder / "config.json"), _read(folder / "state.json")
        if model in ("", config["model"]) and status in ("", state["status"]):
            return folder
    return None


def model_folder(run: str | Path) -> Path:
    """Where a run keeps its trained system."""
    folder = Path(run) / "model"
    if not (folder / "system.json").is_file():
        raise FileNotFoundError(f"{run}: no stage that can be sampled is finished yet; go on with --resume {run}")
    return folder


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


class Run:
    """One run folder. Only rank 0 writes; every rank reads."""

    def __init__(self, folder: Path, ranks: Ranks, tensorboard: bool = False):
        self.folder, self.ranks = Path(folder), ranks
        self.state = _read(self.folder / "state.json")
        self.board = _tensorboard(self.folder) if tensorboard and ranks.first else None

    @classmethod
    def create(cls, root: str | Path, config: dict, ranks: Ranks) -> "Run":
        """A fresh folder under `root`, named by time and model; all ranks get the same one."""
        folder = Path(root) / ranks.agree(time.strftime("%Y-%m-%d_%H%M%S") + f"-{config['model']}")
        if ranks.first:
            while folder.exists():
                raise UsageError(f"{folder} exists already; start again in a second, or say --out")
            files.write_json(folder / "config.json", config | {"environment": environment()})
            files.write_json(folder / "state.json", {"status": "running", "stages": []})
        ranks.barrier()
        return cls(folder, ranks, config.get("tensorboard", False))

    @classmethod
    def resume(cls, folder: str | Path, config: dict, ranks: Ranks) -> "Run":
        """Go on with a run. Settings that decide which numbers come next must be the same."""
        folder = Path(folder)
        if not is_run(folder):
            raise UsageError(f"--resume {folder}: not a run folder")
        before = _read(folder / "config.json")
        decisive = (
            *("model", "seed", "batch", "accumulate", "world", "rank", "alpha", "adapter", "lora"),
            *("released", "text_adapter"),
            *("data", "size", "valid", "views", "augment", "captions", "paraphrases", "strategy"),
            *("join", "long_prompts"),
            *("places", "places_first", "dropout"),
        )
        for name in decisive:
            if name in config and name in before and before[name] != config[name]:  # a model's own flags may be absent
                raise UsageError(
                    f"--resume {folder}: {name} was {before.get(name)} and is {config.get(name)} now; it could not "
                    f"go on exactly. Give the old value"
                    + (f" (torchrun --nproc-per-node {before[name]})" if name == "world" else "")
                )
        if ranks.first:
            files.sweep(folder)
        ranks.barrier()
        run = cls(folder, ranks, config.get("tensorboard", False))
        run.update(status="running")
        return run

    def begin_with(self, base: str | Path, stage: str, adapters: list[str]) -> None:
        """Take over the parts that another run has trained, but for the adapters (their folders) of the stage to come:
        that one is trained anew, on the same weights as there."""
        if not is_run(base):
            raise UsageError(f"--base {base}: not a run folder")
        done = _read(Path(base) / "state.json")["stages"]
        if self.ranks.first:
            shutil.copytree(model_folder(base), self.folder / "model")
            for file in [file for name in adapters for file in (self.folder / "model" / name).glob("adapter_*")]:
                file.unlink()
        self.ranks.barrier()
        below = [stage] if stage in done else []
        self.update(base=str(base), below=below, stages=[other for other in done if other != stage])

    # ------------------------------------------------------------------------------------------------- progress

    def update(self, **values) -> None:
        """Change entries of state.json."""
        self.state |= values
        if self.ranks.first:
            files.write_json(self.folder / "state.json", self.state)

    def say(self, line: str) -> None:
        """A line for the terminal, of one process."""
        if line and self.ranks.first:
            tqdm.write(line)

    def log(self, **values) -> None:
        """Append one line to log.jsonl."""
        if self.ranks.first:
            with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        if self.board:
            for name, value in values.items():
                if isinstance(value, float | int) and name != "step":
                    self.board.add_scalar(f"{values['stage']}/{name}", value, values["step"])

    # ---------------------------------------------------------------------------------------------- checkpoints

    def checkpoints(self, stage: str) -> list[Path]:
        """The whole checkpoints of a stage, oldest first."""
        found = []
        for folder in (self.folder / "checkpoints").glob(f"{stage}-step-*"):
            if CHECKPOINT.match(folder.name) and (folder / "state.json").is_file():
                found.append(folder)
        return sorted(found, key=lambda folder: int(CHECKPOINT.match(folder.name)["step"]))

    def save(self, stage: str, step: int, descent, state: dict) -> Path:
        """Write a checkpoint: temporary folder, flushed, renamed; state.json in it is written last.

        descent   the weights in training with all of their state (training/optimizer.py)
        """
        folder = self.folder / "checkpoints" / f"{stage}-step-{step:06d}"
        if self.ranks.first and not folder.exists():
            names = {param: name for name, param in descent.params.items()}
            moments = {
                f"{names[param]}/{key}": value
                for param, values in descent.optimizer.state.items()
                for key, value in values.items()
            }
            with files.atomic(folder) as temporary:
                files.write_tensors(temporary / "model.safetensors", dict(descent.params))
                files.write_tensors(temporary / "optimizer.safetensors", moments)
                if descent.average:
                    files.write_tensors(temporary / "ema.safetensors", descent.average.average)
                sums = {path.name: files.sha256(path) for path in sorted(temporary.glob("*.safetensors"))}
                state = state | descent.state() | {"step": step, "sha256": sums}
                files.write_json(temporary / "state.json", state)
        self.ranks.barrier()
        return folder

    def restore(self, stage: str, descent) -> dict | None:
        """Load the newest whole checkpoint of a stage into the weights in training; its state, or None."""
        found = self.checkpoints(stage)
        if not found:
            return None
        folder, params, optimizer = found[-1], descent.params, descent.optimizer
        state = _read(folder / "state.json")
        for name, digest in state["sha256"].items():
            if files.sha256(folder / name) != digest:
                raise ValueError(f"{folder / name} is damaged: remove the folder {folder} to go on from the one before")
        with torch.no_grad():
            for name, tensor in load_file(folder / "model.safetensors").items():
                params[name].copy_(tensor)
            if descent.average:
                for name, tensor in load_file(folder / "ema.safetensors").items():
                    descent.average.average[name].copy_(tensor)
        for key, value in load_file(folder / "optimizer.safetensors").items():
            name, entry = key.rsplit("/", 1)
            if value.shape == params[name].shape and entry != "step":  # moments lie in memory as their parameter does
                value = torch.empty_like(params[name]).copy_(value)
            optimizer.state[params[name]][entry] = value.to(params[name].device)
        descent.load(state)
        return state

    def prune(self, stage: str, keep: int, best: int | None) -> None:
        """Remove all checkpoints of a stage but the last `keep` and the best one."""
        if self.ranks.first:
            for folder in self.checkpoints(stage)[: -max(keep, 1)]:
                if int(CHECKPOINT.match(folder.name)["step"]) != best:
                    grave = folder.with_name(
                        f".{folder.name}.{os.getpid()}.tmp"
                    )  # a half-removed folder is no checkpoint
                    os.replace(folder, grave)
                    shutil.rmtree(grave)

    def weights_of(self, stage: str, step: int) -> dict[str, torch.Tensor]:
        """The averaged weights of a checkpoint, or the raw ones where there is no average."""
        folder = self.folder / "checkpoints" / f"{stage}-step-{step:06d}"
        averaged = folder / "ema.safetensors"
        return load_file(averaged if averaged.is_file() else folder / "model.safetensors")

    def take_best(self, stage: str, step: int, params: dict[str, torch.Tensor]) -> None:
        """Make the weights of a checkpoint those of the network."""
        with torch.no_grad():
            for name, tensor in self.weights_of(stage, step).items():
                params[name].copy_(tensor)

    def finish(self, results: dict) -> None:
        """Write the model card, and that the run is done."""
        if self.ranks.first:
            config = _read(self.folder / "config.json")
            files.write_text(self.folder / "README.md", model_card(config, results))
        self.update(status="done")


def _tensorboard(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("--tensorboard: TensorBoard is not installed; pip install tensorboard") from None
    return SummaryWriter(str(folder / "tensorboard"))


def environment() -> dict:
    """Versions and the git commit, for config.json."""
    import numpy

    root = Path(__file__).resolve().parents[1]
    git = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "cuda": torch.version.cuda,
        "git": git.stdout.strip() or None,
    }


def model_card(config: dict, results: dict) -> str:
    """README.md of a run: what it is, how it was made, what it is not for."""
    numbers = "\n".join(f"- {name}: {value}" for name, value in results.items()) or "- not evaluated"
    return f"""---
library_name: nanomed
pipeline_tag: text-to-image
tags: [medical, diffusion]
---
# {config["model"]} trained on {config["data"]}

**For research. Not for diagnosis.** The images are synthetic; they may still resemble training images. Check with
`python evaluate.py` before sharing any.

Draw from it: `python sample.py --model RUN --prompts prompts.csv`

## Training
Every setting is in `config.json`, the curve in `log.jsonl`. Seed {config["seed"]}, batch {config.get("batch")} on
{config.get("world", 1)} process(es).

## Results
{numbers}
"""
