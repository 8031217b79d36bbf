"""Features of images, computed once: every metric of a network reads the same pass, a second evaluation makes none.

What a network makes of a set of images is kept on disk under the hashes of the images, the fingerprint of the network
and the protocol. Any other image, weight, resize or line of code is another entry, so nothing goes stale; an entry
whose checksum does not hold is never read, but computed again and named. Under torchrun the ranks share the images.
"""

import functools
import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanomed import metrics as metrics_wing
from nanomed.run.cache import SHARD, Cache
from nanomed.run.ranks import ALONE, Ranks
from nanomed.text import clip, clip_vision


@dataclass(frozen=True)
class Extractor:
    """A feature network under a protocol."""

    name: str  # of the network and its layer, such as "Inception pool3"
    protocol: str  # how images were brought to the network
    network: str  # fingerprint of its weights
    columns: Callable[[Iterable[np.ndarray]], dict[str, Tensor]]  # uint8 images (H, W, 3) -> {column: (N, ...)}


class Store:
    """Where features are kept.

    folder        the cache on disk
    ranks         share the images; the folder must be common to them, and waiting for each other is all they do here
    passes        images that went through each network so far, on this rank: {name: count}
    notes         one line for every entry that was damaged and computed again
    """

    def __init__(self, folder: str | Path, ranks: Ranks = ALONE) -> None:
        self.folder, self.ranks = Path(folder), ranks
        self.passes: Counter[str] = Counter()
        self.notes: list[str] = []

    def read(
        self, extractor: Extractor, hashes: Sequence[str], image: Callable[[int], np.ndarray], name: str = "images"
    ) -> dict[str, Tensor]:
        """{column: (N, ...)} of N images on the CPU: from the cache where it is there and whole, else computed.

        hashes   one for each image, of everything that decides its pixels
        image    row -> uint8 (H, W, 3); called on threads, and only for what is not in the cache
        name     what a message calls this set
        """
        key = [extractor.name, extractor.protocol, extractor.network, _version(), list(hashes)]
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        folder = self.folder / f"{cached_as(extractor)}-{digest[:16]}"
        there = {int(path.stem): path for path in folder.glob("*/*.safetensors")}

        def make(rows: list[int]) -> dict[str, Tensor]:
            if rows[0] in there:
                again = f"{there[rows[0]]}: damaged or unfinished; {len(rows)} images of {name} are computed again"
                self.notes.append(again)
            self.passes[extractor.name] += len(rows)
            return extractor.columns(ahead(image, rows))

        columns = Cache(folder, self.ranks).read(key, len(hashes), make, SHARD)
        return {name: torch.cat([shard[name] for shard in columns.shards]) for name in columns.shards[0]}


def ahead(image: Callable[[int], np.ndarray], rows: Sequence[int], most: int = 64) -> Iterator[np.ndarray]:
    """image(row) for every row, in order, decoded on threads at most `most` images ahead of the network."""
    waiting: deque = deque()
    with ThreadPoolExecutor(8) as pool:
        try:
            for row in rows:
                waiting.append(pool.submit(image, row))
                if len(waiting) == most:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@functools.cache
def _version() -> str:
    """Changes when the code between pixels and features does, so that no cache outlives a correction."""
    metrics, here = Path(metrics_wing.__file__).parent, Path(__file__).parent
    makers = [*metrics.glob("networks/*.py"), here / "extractors.py", Path(clip_vision.__file__), Path(clip.__file__)]
    makers += [metrics / name for name in ("features.py", "frd.py", "radiomics.py", "clef.py")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(makers))).hexdigest()[:16]


def cached_as(extractor: Extractor) -> str:
    """How the folders of an extractor's features begin."""
    return f"{_slug(extractor.name)}-{_slug(extractor.protocol)}"


def _slug(text: str) -> str:
    """Text as a part of a file name."""
    return "".join(c if c.isalnum() else "-" for c in text.lower()).strip("-")
