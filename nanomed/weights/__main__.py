"""What there is to download, what is here, and whether it is sound.

    python -m nanomed.weights list      what there is, for which system, and what is here
    python -m nanomed.weights check     the headers of all files that are here, or of the paths given
    python -m nanomed.weights verify    their SHA-256 against what the download recorded
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from nanomed.run import files, flags
from nanomed.weights.header import WeightsError, WeightsNotFound, check_header
from nanomed.weights.places import find
from nanomed.weights.published import catalogue, digests
from nanomed.weights.tensors import kept_inside, read_pickle


@dataclass
class Config:
    """Flags of `list`, `check` and `verify`."""

    verb: Annotated[str, "list | check | verify"] = ""  # what to do
    names: tuple[str, ...] = ()  # repositories or paths; none: all of the catalogue that is here
    weights: str = ""  # a folder of weights, besides weights/ and the Hugging Face cache


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    args = flags.parse(Config, arguments, description=__doc__, words=("verb", "names"))
    say = sys.stdout.write
    here: dict[str, Path] = {}
    for name in args.names or [item.repo for item in catalogue()]:
        try:
            here[name] = find(name, args.weights)
        except WeightsNotFound as error:
            if args.names:
                say(f"{error}\n")
                return 4
    if args.verb == "list":
        for item in catalogue():
            if not args.names or item.repo in args.names:
                place = here.get(item.repo)
                say(f"{item.repo}\n    {item.use}; {item.licence}; {item.gigabytes} GB\n")
                say(f"    here: {place}\n" if place else f"    {item.download}\n")
        return 0
    bad = 0
    for name in [name for name in args.names if not digests(here[name])]:
        say(f"{name}: no file of weights\n")
        bad += 1
    for path, digest in {path: digest for folder in here.values() for path, digest in digests(folder).items()}.items():
        try:
            if args.verb == "verify":
                actual = files.sha256(path)
                if digest and not actual.startswith(digest):
                    raise WeightsError(f"{path}: SHA-256 {actual}, but {digest} was to be downloaded: fetch it again")
                say(f"{path}: {'as downloaded' if digest else 'nothing recorded to compare with'}, SHA-256 {actual}\n")
            elif path.suffix == ".safetensors":
                header = check_header(kept_inside(path))
                count = sum(math.prod(tensor.shape) for tensor in header.values())
                say(f"{path}: sound, {len(header)} tensors, {count:,} values\n")
            else:
                say(f"{path}: a pickle, {len(read_pickle(path))} tensors\n")
        except WeightsError as error:
            bad += 1
            say(f"{error}\n")
    if not here:
        say("no published weights are here: `python -m nanomed.weights list` says what to download\n")
    return 4 if bad else 0


if __name__ == "__main__":
    flags.main(main)
