"""Where a published repository lies: a path, a folder of weights, or the Hugging Face cache. Nothing is fetched."""

import os
import re
from pathlib import Path

from nanomed.weights.header import WeightsNotFound
from nanomed.weights.published import SHIPPED, catalogue


def find(name: str | Path, weights: str | Path | None = None) -> Path:
    """The folder (or file) of a repository: a path that exists, a folder of weights, or the Hugging Face cache.

    name      a path, or a repository such as "openai/clip-vit-large-patch14"
    weights   a folder that holds `org/name` or `name`; looked at before ./weights and the checkout's weights/

    Raises WeightsNotFound, a FileNotFoundError, with the places looked at and the command that downloads it.
    """
    if Path(name).exists():
        return Path(name)
    name = str(name)
    places = []
    for root in dict.fromkeys([*([Path(weights)] if weights else []), Path("weights"), SHIPPED]):
        places += [root / name, root / name.rsplit("/", 1)[-1]]
    for place in places:
        if place.exists():
            return place
    cached = hub_cache() / f"models--{name.replace('/', '--')}"
    if snapshot := _snapshot(cached):
        return snapshot
    looked = ", ".join(str(place) for place in dict.fromkeys([*places, cached]))
    download = next((entry.download for entry in catalogue() if entry.repo == name), None)
    if not download and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        download = f"hf download {name} --local-dir weights/{name}"
    raise WeightsNotFound(f"{name} was not found at {looked}" + (f"; get it with: {download}" if download else ""))


def hub_cache() -> Path:
    """Where `hf download` keeps repositories: $HF_HUB_CACHE, $HF_HOME/hub or ~/.cache/huggingface/hub."""
    if folder := os.environ.get("HF_HUB_CACHE"):
        return Path(folder)
    return Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface") / "hub"


def _snapshot(cached: Path) -> Path | None:
    """The snapshot that `main` names, else the newest one."""
    reference = cached / "refs" / "main"
    if reference.is_file():
        commit = reference.read_text(encoding="utf-8").strip()
        if re.fullmatch(r"[0-9a-f]{4,64}", commit) and (cached / "snapshots" / commit).is_dir():
            return cached / "snapshots" / commit
    if (cached / "snapshots").is_dir():
        return max(cached.joinpath("snapshots").iterdir(), key=lambda path: path.stat().st_mtime, default=None)
    return None
