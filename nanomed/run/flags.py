"""The command line of a script: dataclasses, one field a flag, its comment the help, its annotation the range.

    @dataclass
    class Config:
        # ---- data
        batch: Annotated[int, ">= 1"] = 32  # samples at a time
        schedule: Annotated[str, "constant | cosine"] = "constant"  # of the learning rate

A range is checked before a file is opened or a folder made. It is written as ">= 1", "> 0", "0 .. 1" (both included),
"0 ..< 2^63" (below it), as words to choose from, or, of a place, as "a folder to write" or "a file to write". NaN and
infinity are no numbers, and digits are 0 to 9.
"""

import argparse
import dataclasses
import errno
import inspect
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_origin

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


class Parser(argparse.ArgumentParser):
    """argparse, whose complaints are UsageErrors: one line, and no usage above it."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help lists all flags)")


def parse(
    cls: type[Config],
    argv: Sequence[str] | None = None,
    presets: Callable[[str], dict[str, Any]] | None = None,
    own: Callable[[str], Sequence[type]] = lambda model: (),
    description: str = "",
    words: Sequence[str] = (),
    before: Mapping[str, Any] | None = None,
    below: Callable[[str], str] = lambda model: "",
) -> Config:
    """Make an instance of the dataclass `cls` from command-line flags.

    Values come from the command line, else from `before` (settings of a run to go on with), else from
    `presets(model)`, else from the field's default. `-` and `_` are the same in flag names, and the names in `ALIASES`
    are understood. `own(model)` names dataclasses whose fields are flags for this model only; the instance has them as
    attributes, too. Fields named in `words` are said without a flag, in this order; one of type `tuple[str, ...]` takes
    all that come. What `below(model)` says ends the help. The instance's `given` lists the fields that the command line
    named.

    Raises UsageError for a value out of its range, and for flags that there are not.
    """
    argv = sys.argv[1:] if argv is None else argv
    before = before or {}
    common = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    model = said("model", argv) or str(before.get("model", common["model"].default)) if "model" in common else ""
    extra = own(model) if model else ()
    whole = dataclasses.make_dataclass(cls.__name__, [], bases=(*reversed(extra), cls)) if extra else cls
    fields = {field.name: field for field in dataclasses.fields(whole)}
    preset = {name: value for name, value in presets(model).items() if name in fields} if presets and model else {}
    known = preset | {name: _kept(name, value, fields[name].type) for name, value in before.items() if name in fields}

    parser = Parser(
        prog=program(),
        usage=" ".join(["%(prog)s", *(name.upper() for name in words), "[--flag VALUE ...]"]),
        description=description,
        epilog=below(model) if model else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for source in (cls, *extra):
        title = "" if source is cls else (inspect.getdoc(source) or f"options of {model}").splitlines()[0]
        _add(parser, source, title, known, words)
    raw = {name: value for name, value in vars(parser.parse_args(_joined(argv, fields))).items() if value is not None}
    labels = {name: name if name in words else f"--{name}" for name in raw}
    given = {name: converted(labels[name], value, fields[name].type) for name, value in raw.items()}
    config = whole(**known | given)
    config.given = tuple(given)
    return config


def said(flag: str, argv: Sequence[str] | None = None) -> str:
    """What a command line gives a flag, under any of its names; "" where it does not name it. The last one counts."""
    found = ""
    words = [_named(word) for word in (sys.argv[1:] if argv is None else argv)]
    for word, after in zip(words, [*words[1:], ""]):
        name, equals, value = word[2:].partition("=")
        if word.startswith("--") and ALIASES.get(name, name) == flag:
            found = value if equals else "" if after.startswith("--") else after
    return found


def _add(parser: argparse.ArgumentParser, cls: Any, title: str, known: dict[str, Any], words: Sequence[str]) -> None:
    """The flags of one dataclass, in groups by its heading comments or under one title."""
    group: Any = parser.add_argument_group(title) if title else parser
    for name, (heading, told) in comments(cls).items():
        field = cls.__dataclass_fields__[name]
        if heading and not title:
            group = next((g for g in parser._action_groups if g.title == heading), None)
            group = group or parser.add_argument_group(heading)
        default, limits = known.get(name, field.default), range_of(field.type)
        more = [limits] if limits and "|" not in limits else []
        more += [] if default in ("", None, ()) else [f"default: {default}"]
        told = f"{limits.lstrip(' |')}; {told}" if "|" in limits else told
        text = (told + (f" ({'; '.join(more)})" if more else "")).replace("%", "%%")
        kind = kind_of(field.type)
        if name in words:
            count = {"nargs": "*"} if kind is tuple else {}
            parser.add_argument(name, help=text, default=None, **count)  # type: ignore[arg-type]
            continue
        options: dict[str, Any] = {"nargs": "?", "const": "true"} if kind is bool else {}
        group.add_argument(f"--{name}", type=str, default=None, metavar=_METAVAR[kind], help=text, **options)


_METAVAR = {bool: "BOOL", int: "N", float: "X", str: "TEXT"}


def range_of(annotation: Any) -> str:
    """The range that an annotation states, or ""."""
    return get_args(annotation)[1] if get_origin(annotation) is Annotated else ""


def kind_of(annotation: Any) -> type:
    """bool, int, float, str or tuple of an annotation such as `int | None` or `Annotated[int, ">= 1"]`."""
    plain = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    if get_origin(plain) is tuple:
        return tuple
    for kind in (bool, int, float, str):
        if plain is kind or kind in get_args(plain):
            return kind
    raise TypeError(f"a flag cannot be of type {annotation}")


def _kept(name: str, value: Any, annotation: Any) -> Any:
    """A setting of a run to go on with, in whose file somebody may have written; UsageError for what no flag gives."""
    kind, limits = kind_of(annotation), range_of(annotation)
    kinds: Any = {float: (int, float), tuple: (list, tuple)}.get(kind, kind)
    number = kind in (int, float)
    if value is not None and (not isinstance(value, kinds) or number and isinstance(value, bool)):
        raise UsageError(f"{name} is {json.dumps(value)} in the run's config.json: not {_NAMES[kind]}")
    if number and value is not None and not (abs(value) < math.inf and within(value, limits)):
        raise UsageError(f"{name} is {json.dumps(value)} in the run's config.json: out of range, which is {limits}")
    return value


_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", tuple: "a list"}
NUMBER = {int: r"[+-]?[0-9][0-9_]*", float: r"[+-]?([0-9][0-9_]*\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"}


def converted(label: str, text: Any, annotation: Any) -> Any:
    """A flag's text as a value; UsageError with the flag, the text and the range."""
    kind, limits = kind_of(annotation), range_of(annotation)
    if kind is tuple:
        return tuple(text)
    shown = f"{label} {text if len(text) <= 80 else text[:77] + '...'}"
    if kind is bool:
        if text.lower() in ("true", "1", "yes", "on"):
            return True
        if text.lower() in ("false", "0", "no", "off"):
            return False
        raise UsageError(f"{shown}: say true or false")
    if kind is str:
        if limits.endswith(" to write"):
            check_place(shown, text, folder=limits == "a folder to write")
        elif limits and text not in limits.split(" | "):
            raise UsageError(f"{shown}: choose {', '.join(filter(None, limits.split(' | ')))}")
        return text
    number = f"{'a whole' if kind is int else 'a'} number"
    wanted = f"not {number}{f' in the range {limits}' if limits else ''}"
    if not re.fullmatch(NUMBER[kind], text) or len(text) > 300:
        raise UsageError(f"{shown}: {wanted}")
    value = kind(text.replace("_", ""))
    if kind is float and not math.isfinite(value):
        raise UsageError(f"{shown}: {wanted}")
    if not within(value, limits):
        raise UsageError(f"{shown}: out of range, which is {limits}")
    return value


def within(value: float, limits: str) -> bool:
    """Whether a number lies in a range as written in an annotation; "" is every number."""
    if not limits:
        return True

    def number(text: str) -> float:
        base, power, exponent = text.partition("^")
        return int(base) ** int(exponent) if power else float(base)

    if match := re.fullmatch(r"(>=|>) (\S+)", limits):
        return value >= number(match[2]) if match[1] == ">=" else value > number(match[2])
    if match := re.fullmatch(r"(\S+) (\.\.<?) (\S+)", limits):
        low, high = number(match[1]), number(match[3])
        return low <= value <= high if match[2] == ".." else low <= value < high
    raise ValueError(f"{limits!r} is no range")


def check_place(shown: str, text: str, folder: bool) -> None:
    """Whether a file or folder could be written there; nothing is. A flag's value is asked about when it is read, and
    by its command a default, for which long work would be lost at its end. Raises UsageError, beginning with `shown`.
    """
    if not text.strip():
        raise UsageError(f"{shown}: say a {'folder' if folder else 'file'} to write")
    try:
        path = Path(text)
        if path.exists() and not (path.is_dir() if folder else path.is_file()):
            kind = "a folder" if path.is_dir() else "no folder" if folder else "no plain file"
            raise UsageError(f"{shown}: that is {kind}")
        there = path if folder else path.parent
        while not there.exists() and there != there.parent:
            there = there.parent
        if not there.is_dir():
            raise UsageError(f"{shown}: {there} is no folder")
        if any(len(os.fsencode(part)) > 255 - 15 for part in path.parts):  # temporary names are longer
            raise UsageError(f"{shown}: too long a name")
        if not _takes_files(there):
            raise UsageError(f"{shown}: {there} cannot be written to")
    except (OSError, ValueError) as error:  # a name that no file can have
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{shown}: {getattr(error, 'strerror', None) or error}") from None


def _takes_files(folder: Path) -> bool:
    """By a file without a name, for rights do not tell of a disk that is read-only, or of /proc."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def _named(word: str) -> str:
    """A flag with underscores for hyphens."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _joined(argv: Sequence[str], fields: dict[str, Any]) -> list[str]:
    """Words with flags under their own names, and each value joined to its flag, so that "-inf" is read as a value."""
    words, found = [_named(word) for word in argv], []
    while words:
        word = words.pop(0)
        name, equals, value = word[2:].partition("=")
        if word.startswith("--") and name not in fields and ALIASES.get(name) in fields:
            name = ALIASES[name]
            word = f"--{name}{equals}{value}"
        if word.startswith("--") and name in fields and not equals and words and not words[0].startswith("--"):
            word = f"--{name}={words.pop(0)}"
        found.append(word)
    return found


def comments(cls: type) -> dict[str, tuple[str, str]]:
    """Every field's heading (the last `# ---- heading` above it) and its help: the trailing comment, with comment lines
    directly below that continue it. The fields of a dataclass above come behind."""
    found: dict[str, tuple[str, str]] = {}
    for above in cls.__mro__:
        if dataclasses.is_dataclass(above):
            found = found | {name: said for name, said in _comments(above).items() if name not in found}
    return found


@cache
def _comments(cls: type) -> dict[str, tuple[str, str]]:
    found, last, heading = {}, None, ""
    for line in _source(cls).splitlines():
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


def _source(cls: type) -> str:
    """The text of a class. Under `python -m cProfile train.py` the script is run in the profiler's own module, where
    `inspect` does not find it."""
    try:
        return inspect.getsource(cls)
    except OSError:
        script = Path(sys.argv[0]).read_text(encoding="utf-8")
        found = re.search(rf"^class {cls.__name__}\b.*?(?=^\S|\Z)", script, re.M | re.S)
        if not found:
            raise
        return found[0]


CODES = {"UsageError": 2, "DataError": 3, "WeightsError": 4, "FloatingPointError": 1}
INTERRUPTED = 130  # by Ctrl-C, as shells have it
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # also said of no file by name, when a line is added to one
MACHINE = 5  # a file that cannot be read or written, or too little memory


def program() -> str:
    """The name of the running command, as one types it."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    if module is not None and module.name.startswith("nanomed"):
        return f"python -m {module.name.removesuffix('.__main__')}"
    return os.path.basename(sys.argv[0])


def main(run: Callable[[], int | None]) -> None:
    """Run a script. A user's mistake becomes one line on standard error and an exit code: 2 the command line,
    3 data, 4 weights, 5 the machine (files that cannot be read or written, memory); 1 is a training that diverged, 75
    means asked to stop, state saved. Anything else is a bug and keeps its traceback."""
    code: int | None
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # where a file gets them, Windows has a narrow alphabet
            stream.reconfigure(errors="backslashreplace")
    try:
        code = run() or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
        refuse("stopped")
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as error:
        code, line = understood(error)
        if code is None:
            raise
        refuse(line)
        if isinstance(error, BrokenPipeError):  # or what is left to write would complain again at the very end
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    group = sys.modules["torch"].distributed if "torch" in sys.modules else None
    if group and group.is_available() and group.is_initialized():
        group.destroy_process_group()
    sys.exit(code)


def understood(error: Exception) -> tuple[int | None, str]:
    """(exit code, what is wrong in one line) of an error that a user can mend; (None, ...) of a bug."""
    kinds = [c.__name__ for c in type(error).__mro__]
    code = next((CODES[kind] for kind in kinds if kind in CODES), None)
    line = str(error)
    if code is None and isinstance(error, OSError) and error.filename is not None:
        name = os.fsdecode(error.filename)
        code, line = MACHINE, f"{name if len(name) <= 300 else name[:77] + '...'}: {error.strerror}"
    elif code is None and isinstance(error, OSError) and error.errno in FULL:
        code, line = MACHINE, str(error.strerror)
    elif code is None and isinstance(error, BrokenPipeError):
        code, line = MACHINE, "nobody reads the standard output any more"
    elif code is None and ("OutOfMemoryError" in kinds or "MemoryError" in kinds or "t allocate memory" in line):
        code, line = MACHINE, "not enough memory: lower --batch or --size"
    return code, "".join(c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1] for c in line)


def refuse(line: str) -> None:
    """Say a refusal. Of the processes of torchrun the first speaks. The launcher prints a report of its own behind it
    whatever a process does; its last line is what stands in the error file, so it is the refusal again."""
    line = f"{program()}: {line}"
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    first = Path(path).parents[1] / "0" / Path(path).name if path else None  # of the first process of this machine
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
    else:  # the launcher ends all processes when it finds one ended: let that be the one that has spoken. This one ends
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # as it is told to, or the report had six lines on it
        for _ in range(200):
            if first and first.is_file():  # and unasked where the first has refused too, or it had one
                os._exit(0)
            time.sleep(0.05)
    if path:
        told = {"message": line, "extraInfo": {"py_callstack": line, "timestamp": str(int(time.time()) - 1)}}
        Path(path).write_text(json.dumps({"message": told}), encoding="utf-8")
        if os.environ.get("RANK") == "0" and os.environ.get("LOCAL_WORLD_SIZE", "1") != "1":
            time.sleep(0.3)  # for the others to leave
