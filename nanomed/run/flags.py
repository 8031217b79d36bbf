"""The command line of a script: a dataclass, one field a flag, its comment the help."""

import dataclasses
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

# What people type from diffusers, kohya and nanoGPT, and what it is called here.
ALIASES = {
    "learning_rate": "lr", "lr_scheduler": "schedule", "lr_warmup_steps": "warmup", "max_train_steps": "steps",
    "train_batch_size": "batch", "batch_size": "batch", "gradient_accumulation_steps": "accumulate",
    "mixed_precision": "precision", "max_grad_norm": "clip", "grad_clip": "clip", "adam_weight_decay": "weight_decay",
    "output_dir": "out", "out_dir": "out", "train_data_dir": "data", "resolution": "size", "lora_alpha": "alpha",
    "network_dim": "rank", "network_alpha": "alpha", "resume_from_checkpoint": "resume",
    "checkpointing_steps": "save_every", "checkpoints_total_limit": "keep", "validation_steps": "save_every",
    "validation_prompts": "grid_prompts", "ema_decay": "ema", "num_inference_steps": "steps",
    "guidance_scale": "guidance", "cfg_scale": "guidance", "pretrained_model_name_or_path": "weights",
}  # fmt: skip

Config = TypeVar("Config")


class UsageError(ValueError):
    """A command line that cannot be run; one line says why."""


def parse(
    cls: type[Config],
    argv: Sequence[str] | None = None,
    presets: Callable[[str], dict[str, Any]] | None = None,
    description: str = "",
) -> Config:
    """Make an instance of the dataclass `cls` from command-line flags: one field a flag, its comment the help.

    Values come from the command line, else from `presets(model)`, else from the field's default. `-` and `_` are
    the same in flag names, the names in `ALIASES` are understood, and unknown flags are errors. The fields that the
    command line named are listed in the instance's `given`.
    """
    import argparse

    fields = {field.name: field for field in dataclasses.fields(cls)}
    comments = _comments(cls)
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    shown = (lambda name: None) if presets is None else (lambda name: presets(fields["model"].default).get(name))
    for name, field in fields.items():
        default = shown(name) if shown(name) is not None else field.default
        help_text = comments.get(name, "") + ("" if default in ("", None) else f" (default: {default})")
        kind = _kind(field.type)
        options = {"nargs": "?", "const": "true"} if kind is bool else {}
        parser.add_argument(
            f"--{name}", type=str, default=None, metavar=_METAVAR[kind], help=help_text.replace("%", "%%"), **options
        )

    words = [_normal(word, fields) for word in (sys.argv[1:] if argv is None else argv)]
    raw = {name: value for name, value in vars(parser.parse_args(words)).items() if value is not None}
    given = {name: _convert(name, value, _kind(fields[name].type)) for name, value in raw.items()}
    preset = presets(given.get("model", fields["model"].default)) if presets else {}
    config = cls(**preset | given)
    config.given = tuple(given)
    return config


_METAVAR = {bool: "BOOL", int: "N", float: "X", str: "TEXT"}


def _kind(annotation: Any) -> type:
    """bool, int, float or str of an annotation such as `int | None`."""
    for kind in (bool, int, float, str):
        if annotation is kind or re.search(rf"\b{kind.__name__}\b", str(annotation)):
            return kind
    raise TypeError(f"a flag cannot be of type {annotation}")


def _convert(name: str, text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() in ("true", "1", "yes", "on"):
            return True
        if text.lower() in ("false", "0", "no", "off"):
            return False
        raise UsageError(f"--{name} {text}: say true or false")
    try:
        return kind(text.replace("_", "") if kind is int else text)
    except ValueError:
        raise UsageError(f"--{name} {text}: not {'a whole number' if kind is int else 'a number'}") from None


def _normal(word: str, fields: dict[str, Any]) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    name = name.replace("-", "_")
    if name not in fields and ALIASES.get(name) in fields:
        name = ALIASES[name]
    return f"--{name}{equals}{value}"


def _comments(cls: type) -> dict[str, str]:
    """The trailing comment of every field, and comment lines directly below that continue it."""
    comments, last = {}, None
    for line in inspect.getsource(cls).splitlines():
        if match := re.match(r"\s+(\w+)\s*:.*?#\s*(.*)$", line):
            last, text = match.groups()
            comments[last] = text
        elif last and (match := re.match(r"\s+#\s*(.*)$", line)):
            comments[last] += " " + match.group(1)
        else:
            last = None
    return comments


def main(run: Callable[[], int | None]) -> None:
    """Run a script. A user's mistake becomes one line on standard error and an exit code: 2 the command line,
    3 data, 4 weights; 1 is a training that diverged, 75 means asked to stop, state saved. Anything else is a bug and
    keeps its traceback."""
    codes = {"UsageError": 2, "DataError": 3, "WeightsError": 4, "FloatingPointError": 1}
    try:
        code = run() or 0
    except (ValueError, OSError, FloatingPointError) as error:
        code = next((codes[c.__name__] for c in type(error).__mro__ if c.__name__ in codes), None)
        if code is None:
            raise
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)
