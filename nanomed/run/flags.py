"""The command line of a script: dataclasses, one field a flag, its comment the help, its annotation the range.

    @dataclass
    class Config:
        # ---- data
        batch: Annotated[int, ">= 1"] = 32  # samples at a time
        schedule: Annotated[str, "constant | cosine"] = "constant"  # of the learning rate

A range is checked before a file is opened or a folder made. It is written as ">= 1", "> 0", "0 .. 1" (both included),
"0 ..< 1" (below 1), or as words to choose from. NaN and infinity are no numbers.
"""

import argparse
import dataclasses
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar, get_args, get_origin

# What people type from diffusers, kohya and nanoGPT, and what it is called here.
ALIASES = {
    "learning_rate": "lr", "lr_scheduler": "schedule", "lr_warmup_steps": "warmup", "max_train_steps": "steps",
    "train_batch_size": "batch", "batch_size": "batch", "gradient_accumulation_steps": "accumulate",
    "mixed_precision": "precision", "max_grad_norm": "clip", "grad_clip": "clip", "adam_weight_decay": "weight_decay",
    "adam_epsilon": "eps", "output_dir": "out", "out_dir": "out", "train_data_dir": "data", "resolution": "size",
    "lora_alpha": "alpha", "network_dim": "rank", "network_alpha": "alpha", "resume_from_checkpoint": "resume",
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
    own: Callable[[str], Sequence[type]] = lambda model: (),
    description: str = "",
) -> Config:
    """Make an instance of the dataclass `cls` from command-line flags.

    Values come from the command line, else from `presets(model)`, else from the field's default. `-` and `_` are
    the same in flag names, and the names in `ALIASES` are understood. `own(model)` names dataclasses whose fields are
    flags for this model only; the instance has them as attributes, too. Its `given` lists the fields that the command
    line named.

    Raises UsageError for a value out of its range. Unknown flags end the script with a line on standard error.
    """
    words = [_normal(word) for word in (sys.argv[1:] if argv is None else argv)]
    common = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    model = _model(words, common)
    extra = own(model) if model else ()
    whole = dataclasses.make_dataclass(cls.__name__, [], bases=(*reversed(extra), cls)) if extra else cls
    fields = {field.name: field for field in dataclasses.fields(whole)}
    preset = {name: value for name, value in presets(model).items() if name in fields} if presets and model else {}

    parser = argparse.ArgumentParser(
        usage="%(prog)s [--flag VALUE ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for source in (cls, *extra):
        title = "" if source is cls else (inspect.getdoc(source) or f"options of {model}").splitlines()[0]
        _add(parser, source, title, preset)
    words = [_aliased(word, fields) for word in words]
    raw = {name: value for name, value in vars(parser.parse_args(words)).items() if value is not None}
    given = {name: _convert(name, value, fields[name].type) for name, value in raw.items()}
    config = whole(**preset | given)
    config.given = tuple(given)
    return config


def _model(words: list[str], fields: dict[str, dataclasses.Field]) -> str:
    """The model that the command line names, as far as the script has that flag."""
    if "model" not in fields:
        return ""
    for i, word in enumerate(words):
        if word == "--model" and i + 1 < len(words):
            return words[i + 1]
        if word.startswith("--model="):
            return word.partition("=")[2]
    return str(fields["model"].default)


def _add(parser: argparse.ArgumentParser, cls: Any, title: str, preset: dict[str, Any]) -> None:
    """The flags of one dataclass, in groups by its heading comments or under one title."""
    group: Any = parser.add_argument_group(title) if title else parser
    for name, (heading, said) in comments(cls).items():
        field = cls.__dataclass_fields__[name]
        if heading and not title:
            group = next((g for g in parser._action_groups if g.title == heading), None)
            group = group or parser.add_argument_group(heading)
        default = preset.get(name, field.default)
        told = [range_of(field.type)] if range_of(field.type) and "|" not in range_of(field.type) else []
        told += [] if default in ("", None) else [f"default: {default}"]
        said = f"{range_of(field.type)}; {said}" if "|" in range_of(field.type) else said
        kind = kind_of(field.type)
        options: dict[str, Any] = {"nargs": "?", "const": "true"} if kind is bool else {}
        text = said + (f" ({'; '.join(told)})" if told else "")
        group.add_argument(
            f"--{name}", type=str, default=None, metavar=_METAVAR[kind], help=text.replace("%", "%%"), **options
        )


_METAVAR = {bool: "BOOL", int: "N", float: "X", str: "TEXT"}


def range_of(annotation: Any) -> str:
    """The range that an annotation states, or ""."""
    return get_args(annotation)[1] if get_origin(annotation) is Annotated else ""


def kind_of(annotation: Any) -> type:
    """bool, int, float or str of an annotation such as `int | None` or `Annotated[int, ">= 1"]`."""
    plain = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    for kind in (bool, int, float, str):
        if plain is kind or kind in get_args(plain):
            return kind
    raise TypeError(f"a flag cannot be of type {annotation}")


def _convert(name: str, text: str, annotation: Any) -> Any:
    """A flag's text as a value; UsageError with the flag, the text and the range."""
    kind, limits = kind_of(annotation), range_of(annotation)
    if kind is bool:
        if text.lower() in ("true", "1", "yes", "on"):
            return True
        if text.lower() in ("false", "0", "no", "off"):
            return False
        raise UsageError(f"--{name} {text}: say true or false")
    if kind is str:
        if limits and text not in limits.split(" | "):
            raise UsageError(f"--{name} {text}: choose {', '.join(limits.split(' | '))}")
        return text
    try:
        value = kind(text.replace("_", "") if kind is int else text)
    except ValueError:
        raise UsageError(f"--{name} {text}: not {'a whole number' if kind is int else 'a number'}") from None
    if not math.isfinite(value):
        raise UsageError(f"--{name} {text}: not a number")
    if not within(value, limits):
        raise UsageError(f"--{name} {text}: out of range, which is {limits}")
    return value


def within(value: float, limits: str) -> bool:
    """Whether a number lies in a range as written in an annotation; "" is every number."""
    if not limits:
        return True
    if match := re.fullmatch(r"(>=|>) (\S+)", limits):
        return value >= float(match[2]) if match[1] == ">=" else value > float(match[2])
    if match := re.fullmatch(r"(\S+) (\.\.<?) (\S+)", limits):
        low, high = float(match[1]), float(match[3])
        return low <= value <= high if match[2] == ".." else low <= value < high
    raise ValueError(f"{limits!r} is no range")


def _normal(word: str) -> str:
    """A flag with underscores for hyphens."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _aliased(word: str, fields: dict[str, Any]) -> str:
    name, equals, value = word[2:].partition("=")
    if not word.startswith("--") or name in fields or ALIASES.get(name) not in fields:
        return word
    return f"--{ALIASES[name]}{equals}{value}"


def comments(cls: type) -> dict[str, tuple[str, str]]:
    """Every field's heading (the last `# ---- heading` above it) and its help: the trailing comment, with comment lines
    directly below that continue it. The fields of a dataclass above come behind."""
    found: dict[str, tuple[str, str]] = {}
    for above in cls.__mro__:
        if dataclasses.is_dataclass(above):
            found = found | {name: said for name, said in _comments(above).items() if name not in found}
    return found


def _comments(cls: type) -> dict[str, tuple[str, str]]:
    found, last, heading = {}, None, ""
    for line in inspect.getsource(cls).splitlines():
        if match := re.match(r"\s+# -+ (.*)$", line):
            heading, last = match[1], None
        elif match := re.match(r"\s+(\w+)\s*:.*?#\s*(.*)$", line):
            last = match[1]
            found[last] = heading, match[2]
        elif last and (match := re.match(r"\s+#\s*(.*)$", line)):
            found[last] = heading, f"{found[last][1]} {match[1]}"
        else:
            last = None
    return found


def main(run: Callable[[], int | None]) -> None:
    """Run a script. A user's mistake becomes one line on standard error and an exit code: 2 the command line,
    3 data, 4 weights; 1 is a training that diverged, 75 means asked to stop, state saved. Anything else is a bug and
    keeps its traceback."""
    codes = {"UsageError": 2, "DataError": 3, "WeightsError": 4, "FloatingPointError": 1}
    code: int | None
    try:
        code = run() or 0
    except (ValueError, OSError, FloatingPointError) as error:
        code = next((codes[c.__name__] for c in type(error).__mro__ if c.__name__ in codes), None)
        if code is None:
            raise
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
    if "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
        sys.modules["torch"].distributed.destroy_process_group()
    sys.exit(code)
