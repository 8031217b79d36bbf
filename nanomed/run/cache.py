"""Results that are computed once and kept on disk: what a frozen network makes of an image or of a prompt.

An entry is a folder named by the hash of everything that its content depends on (inputs, weights, settings), so a
change of any of them is another folder and nothing goes stale. It holds shards of a fixed number of rows, each with
its checksum beside it: a damaged or missing shard is computed again, alone.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from nanomed.run import files
from nanomed.run.progress import Progress
from nanomed.run.ranks import ALONE, Ranks

SHARD = 256  # rows


class Columns:
    """Named columns of tensors, row by row, memory-mapped: `columns[[3, 1]]` gives {name: (2, ...)}."""

    def __init__(self, shards: list[dict[str, Tensor]], count: int):
        self.shards, self.count = shards, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        names = self.shards[0].keys()
        return {name: torch.stack([self.shards[i // SHARD][name][i % SHARD] for i in rows]) for name in names}


class Cache:
    """Entries in a folder that all ranks see."""

    def __init__(self, folder: str | Path, ranks: Ranks = ALONE):
        self.folder, self.ranks = Path(folder), ranks

    def read(
        self,
        key: object,
        count: int,
        make: Callable[[list[int]], dict[str, Tensor]],
        chunk: int = 32,
        what: str = "",
    ) -> Columns:
        """Rows 0 .. count - 1 of `make`, from disk where they are there and whole, else computed and written.

        `key` is any JSON value that names all the inputs. `make(rows)` returns {name: (len(rows), ...)}; it is called
        with at most `chunk` rows. Ranks share the missing shards and wait for each other. `what` is made, if that is
        to be told where it takes long.
        """
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        folder = self.folder / digest[:32]
        starts = range(0, count, SHARD)
        mine = self.ranks.share(starts)
        with Progress(sum(min(SHARD, count - start) for start in mine), what, shown=bool(what)) as bar:
            for start in mine:
                path = folder / f"{start:08d}.safetensors"
                rows = list(range(start, min(start + SHARD, count)))
                if _whole(path):
                    bar.update(len(rows))
                    continue
                pieces = []
                for i in range(0, len(rows), chunk):
                    pieces.append(make(rows[i : i + chunk]))
                    bar.update(len(rows[i : i + chunk]))
                shard = {name: torch.cat([piece[name] for piece in pieces]).cpu() for name in pieces[0]}
                files.write_tensors(path, shard)
                files.write_text(path.with_suffix(".sha256"), files.sha256(path))
        self.ranks.barrier()
        return Columns([load_file(folder / f"{start:08d}.safetensors") for start in starts], count)


def _whole(path: Path) -> bool:
    mark = path.with_suffix(".sha256")
    return path.is_file() and mark.is_file() and mark.read_text(encoding="utf-8") == files.sha256(path)


class Remembered:
    """An `encode_text` that encodes every distinct prompt once: `system.encode_text = Remembered(system.encode_text)`.

    Only for weights that no longer change. Rows are kept on the device they come from.
    """

    def __init__(self, encode: Callable[[list[str]], dict[str, Tensor]], chunk: int = 32):
        self.encode, self.chunk = encode, chunk
        self.rows: dict[str, dict[str, Tensor]] = {}

    def __call__(self, prompts: list[str]) -> dict[str, Tensor]:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.rows]
        for start in range(0, len(new), self.chunk):
            piece = new[start : start + self.chunk]
            states = self.encode(piece)
            for i, prompt in enumerate(piece):
                self.rows[prompt] = {name: value[i] for name, value in states.items()}
        return {name: torch.stack([self.rows[prompt][name] for prompt in prompts]) for name in self.rows[prompts[0]]}
