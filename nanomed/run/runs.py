"""A training run on disk: settings, log, grids, checkpoints, and the finished system.

    runs/2026-11-24_120000-msdm/
        config.json                          every setting as resolved, versions, git commit
        log.jsonl                            one object a line
        samples/unet-step-001000.png         grids of the same prompts and seeds
        checkpoints/unet-step-001000/        model, ema, optimizer (.safetensors) and state.json, written last
        model/                               the parts whose stage is finished, as `System.save` lays them out
        state.json                           {"status": "running" | "preempted" | "done", "stages": [...], "plan"}
        report.html                          its page: curves, grids, pace (training/page.py)
        README.md                            model card

A checkpoint folder appears in one rename, so every folder that is there is whole.
"""

import itertools
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from nanomed.run import files
from nanomed.run.flags import UsageError
from nanomed.run.progress import say, working
from nanomed.run.ranks import Ranks

CHECKPOINT = re.compile(r"^(?P<stage>\w+)-step-(?P<step>\d+)$")


# Settings that decide which numbers come next; a model's own may be absent. MADE decide what the weights are, too.
MADE = ("model", "rank", "adapter", "text_adapter", "lora")
CONTENTS = ("data", "captions", "paraphrases")  # where the contents lie, whose hash is compared
DECISIVE = (*MADE, "seed", "batch", "accumulate", "alpha", "released", "size", "valid", "views", "augment", "flips",
            *CONTENTS, "range", "strategy", "long_prompts", "join", "places", "places_first", "dropout",
            "buckets")  # fmt: skip
KEPT = ("world", "given")  # how the run began, and all the flags that were ever given
LATER = {"buckets": False, "range": "", "flips": True}  # settings that older runs do not name, and what they were
PASSING = ("resume", "resume_anyway", "out", "dry_run")  # flags of a command, and not of the run


def is_run(folder: str | Path) -> bool:
    """Whether a folder is a run's."""
    return (Path(folder) / "config.json").is_file() and (Path(folder) / "state.json").is_file()


def find(name: str, root: str | Path, model: str = "") -> Path:
    """The run that --resume names: a folder, or "latest", the newest below `root`, of a model if one is given."""
    if name != "latest":
        if not is_run(name):
            raise UsageError(f"--resume {name}: not a run folder")
        return Path(name)
    found = newest(root, model)
    if found is None:
        raise UsageError(f"--resume latest: no run {f'of {model} ' if model else ''}in {root}")
    return found


def settings(folder: str | Path) -> dict:
    """What config.json says of a run."""
    found = _read(Path(folder) / "config.json")
    if "model" not in found:
        raise UsageError(f"{Path(folder) / 'config.json'} is damaged: it names no model")
    for name, kind in {"model": str, "given": list, "world": int, "recipes": dict}.items():
        if not isinstance(found.get(name, kind()), kind):
            raise UsageError(f"{Path(folder) / 'config.json'} is damaged: {name} is {json.dumps(found[name])}")
    return found


def stages_of(folder: str | Path) -> list[str]:
    """The stages that a run has finished."""
    if not is_run(folder):
        raise UsageError(f"{folder}: not a run folder")
    stages = _read(Path(folder) / "state.json").get("stages", [])
    if not isinstance(stages, list) or not all(isinstance(stage, str) for stage in stages):
        raise UsageError(f"{Path(folder) / 'state.json'} is damaged: stages is {json.dumps(stages)}")
    return stages


def newest(root: str | Path, model: str = "", status: str = "") -> Path | None:
    """The newest run below `root`, of a model and with a status if these are given."""
    found = [folder for folder in Path(root).glob("*") if is_run(folder)]
    for folder in sorted(found, key=lambda folder: (folder / "config.json").stat().st_mtime, reverse=True):
        try:
            config, state = _read(folder / "config.json"), _read(folder / "state.json")
        except UsageError:  # damaged: it is not one to go on with
            continue
        if model in ("", config.get("model")) and status in ("", state.get("status")):
            return folder
    return None


def model_folder(run: str | Path) -> Path:
    """Where a run keeps its trained system."""
    folder = Path(run) / "model"
    if not (folder / "system.json").is_file():
        raise UsageError(f"{run}: no stage that can be sampled is finished yet; go on with train.py --resume {run}")
    return folder


def _read(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"{path} is damaged: no JSON object")
    return found


def compared(folder: Path, before: dict, config: dict, anyway: bool) -> tuple[dict, list[str]]:
    """({setting: [old, new]} of all that differ, those of them that decide which numbers come next) of a run to go on
    with. Raises UsageError, which names all of the latter, unless they may differ `anyway`."""
    before = {name: value for name, value in LATER.items() if name in config} | before
    known = {name: value for name, value in config.items() if name in before and name not in (*PASSING, *KEPT)}
    changed = {name: [before[name], value] for name, value in known.items() if before[name] != value}
    decisive = [name for name in DECISIVE if name in changed]
    if "contents" in before:
        moved = [name for name in decisive if name in CONTENTS]
        decisive = [name for name in decisive if name not in CONTENTS]
        if "contents" in changed and not {"size", "valid", "range", "seed", "strategy"} & {*decisive}:
            decisive += moved or ["data"]
    if refused := [name for name in decisive if not anyway or name in MADE]:
        told = ", ".join(_difference(name, changed) for name in refused)
        rest = "" if {*refused} & {*MADE} else ", or say --resume_anyway"
        raise UsageError(f"--resume {folder}: {told}; it could not go on exactly. Give the old values{rest}")
    return changed, decisive


class Run:
    """One run folder. Only rank 0 writes; every rank reads."""

    def __init__(self, folder: Path, ranks: Ranks, tensorboard: bool = False):
        self.folder, self.ranks = Path(folder), ranks
        self.state = {"status": "", "stages": []} | _read(self.folder / "state.json")
        self.board = _writer()(str(self.folder / "tensorboard")) if tensorboard and ranks.first else None

    @classmethod
    def create(cls, root: str | Path, config: dict, ranks: Ranks) -> "Run":
        """A fresh folder under `root`, named by time and model; all ranks get the same one."""
        if config.get("tensorboard"):
            _writer()
        name = time.strftime("%Y-%m-%d_%H%M%S") + f"-{config['model']}"
        folder = ranks.agree(_new_folder(Path(root), name) if ranks.first else Path())
        if ranks.first:
            files.write_json(folder / "config.json", config | {"environment": environment()})
            files.write_json(folder / "state.json", {"status": "running", "stages": []})
        ranks.barrier()
        return cls(folder, ranks, config.get("tensorboard", False))

    @classmethod
    def resume(cls, folder: str | Path, config: dict, ranks: Ranks, anyway: bool = False) -> "Run":
        """Go on with a run under `config`, whose changes are written down.

        Settings that decide which numbers come next must be the same, or `anyway` be said. Another number of processes
        is no change (`Ranks.divided`), nor is another place of the same images and prompts.
        """
        folder = Path(folder)
        before = settings(folder)
        changed, decisive = compared(folder, before, config, anyway)
        if config.get("tensorboard"):
            _writer()
        if ranks.first:
            files.sweep(folder)
        ranks.barrier()
        run = cls(folder, ranks, config.get("tensorboard", False))
        run.update(status="running")
        if changed or set(config.get("given", ())) != set(before.get("given", ())):
            run._change(before, config, changed, decisive)
        return run

    def _change(self, before: dict, config: dict, changed: dict, anyway: list[str]) -> None:
        """Write changed settings into config.json, and what they were before and where they changed."""
        stage, step = self.position()
        now = {name: value for name, value in config.items() if name not in (*PASSING, "world")}
        if changed:
            note = {"stage": stage, "step": step, "changed": changed} | ({"anyway": anyway} if anyway else {})
            now["changes"] = [*before.get("changes", []), note]
            self.log(**note)
        told = ", ".join(_difference(name, changed) for name in changed if name != "contents")
        self.say(f"changed: {told}" if told else "")
        if anyway:
            self.say(f"going on anyway ({', '.join(anyway)}): from here on the numbers are not an undisturbed run's")
        if self.ranks.first:
            files.write_json(self.folder / "config.json", before | now)
        self.ranks.barrier()

    def position(self) -> tuple[str, int]:
        """The stage and the step of the newest checkpoint; ("", 0) where there is none."""
        found = list((self.folder / "checkpoints").glob("[!.]*-step-*/state.json"))
        if not found:
            return "", 0
        last = CHECKPOINT.match(max(found, key=lambda path: path.stat().st_mtime).parent.name)
        return last["stage"], int(last["step"])

    def made(self, stage: str) -> int:
        """The steps of a stage's newest checkpoint, 0 where there is none."""
        found = self.checkpoints(stage)
        return int(CHECKPOINT.match(found[-1].name)["step"]) if found else 0

    def reopen(self, stage: str) -> None:
        """Take a finished stage up again. What was drawn at the end of the run is put aside."""
        if self.ranks.first and (self.folder / "test").is_dir():
            os.replace(self.folder / "test", self.folder / f"test-before-{stage}-step-{self.made(stage):06d}")
        self.ranks.barrier()
        self.update(stages=[other for other in self.state["stages"] if other != stage])

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

    def preempted(self, received: str) -> None:
        """Write down, and say, that a signal has stopped the run, which can go on."""
        self.update(status="preempted")
        self.say(f"{received}: state saved; go on with --resume {shlex.quote(str(self.folder))}")

    def say(self, line: str) -> None:
        """A line for the terminal, of one process."""
        if line and self.ranks.first:
            say(line, sys.stdout)

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
            with working(f"saving {folder.name}"), files.atomic(folder) as temporary:
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
        sums = {"state.json": ""} if not isinstance(state.get("sha256"), dict) else state["sha256"]
        with working(f"reading {folder.name}"):
            for name, digest in sums.items():
                if not (folder / name).is_file() or files.sha256(folder / name) != digest:
                    raise UsageError(
                        f"{folder / name} is damaged: remove the folder {folder} to go on from the one before"
                    )
        with torch.no_grad():
            for name, tensor in load_file(folder / "model.safetensors").items():
                params[name].copy_(tensor)
            if descent.average:  # one that is new begins at the weights
                averaged = folder / "ema.safetensors"
                for name, tensor in load_file(averaged if averaged.is_file() else folder / "model.safetensors").items():
                    descent.average.average[name].copy_(tensor)
        for key, value in load_file(folder / "optimizer.safetensors").items():
            name, entry = key.rsplit("/", 1)
            if value.shape == params[name].shape and entry != "step":  # moments lie in memory as their parameter does
                value = torch.empty_like(params[name]).copy_(value)
            optimizer.state[params[name]][entry] = value.to(params[name].device, copy=True)  # of no file to be removed
        descent.load(state)
        best = state.get("best") and state["best"]["step"]
        if best and not (self.folder / "checkpoints" / f"{stage}-step-{best:06d}").is_dir():
            self.say(f"stage {stage}: the best checkpoint, step {best:,}, is gone; it is chosen anew from here on")
            state["best"] = {"step": state["step"], "score": None, "by": state["best"].get("by")}
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


def _new_folder(root: Path, name: str) -> Path:
    """A folder that nobody else has made, even in this second."""
    root.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = root / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
    raise AssertionError


def _writer() -> type:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("--tensorboard: TensorBoard is not installed; pip install tensorboard") from None
    return SummaryWriter


def _difference(name: str, changed: dict) -> str:
    if name == "data" and name not in changed:
        return "the contents of --data are others than they were"
    was, now = ("nothing" if value == "" else value for value in changed[name])
    return f"{name} was {was} and is {now} now"


def environment() -> dict:
    """Versions and the git commit, for config.json."""
    import numpy

    root = Path(__file__).resolve().parents[1]
    try:
        git = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    except OSError:  # not installed
        git = ""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "cuda": torch.version.cuda,
        "git": git or None,
    }


def model_card(config: dict, results: dict) -> str:
    """README.md of a run: what it is, how it was made, what it is not for."""
    numbers = "\n".join(f"- {name}: {value}" for name, value in results.items()) or "- not evaluated"
    changes = "".join(
        f"\nFrom {change['stage']} step {change['step']:,} on: "
        + ", ".join(_difference(name, change["changed"]) for name in change["changed"] if name != "contents")
        + (" (**gone on anyway**: not the numbers of an undisturbed run)" if change.get("anyway") else "")
        + ".\n"
        for change in config.get("changes", [])
    )
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
Every setting is in `config.json` (what a stage has of its own under "recipes"), the curve in `log.jsonl`. Seed
{config["seed"]}, {config.get("world", 1)} process(es).
{changes}
## Results
{numbers}
"""
