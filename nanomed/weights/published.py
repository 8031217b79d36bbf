"""What there is to download, and whether what was downloaded is what was sent: the table of weights/README.md."""

import re
from pathlib import Path
from typing import NamedTuple

SHIPPED = Path(__file__).resolve().parents[2] / "weights"  # of the checkout


class Published(NamedTuple):
    """A repository or file that some system reads."""

    repo: str
    use: str
    licence: str
    gigabytes: float
    include: tuple[str, ...] = ()  # the files that are needed, where the repository holds more
    url: str = ""  # of a file that is not on Hugging Face

    @property
    def download(self) -> str:
        """The command that gets it."""
        if self.url:
            return f"curl -L --create-dirs -o weights/{self.repo} {self.url}"
        include = "".join(f' --include "{pattern}"' for pattern in self.include)
        return f"hf download {self.repo}{include} --local-dir weights/{self.repo}"


def catalogue() -> list[Published]:
    """The table of weights/README.md; empty where nanomed runs without its checkout."""
    readme = SHIPPED / "README.md"
    rows = []
    for line in readme.read_text(encoding="utf-8").splitlines() if readme.is_file() else []:
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if line.startswith("|") and len(cells) == 5 and re.fullmatch(r"[0-9.]+", cells[3]):
            include = cells[4].strip("`").split() if cells[4].startswith("`") else ()
            url = cells[4].strip("<>") if cells[4].startswith("<") else ""
            rows.append(Published(*cells[:3], float(cells[3]), tuple(include), url))
    return rows


def digests(folder: Path) -> dict[Path, str | None]:
    """Every weights file below `folder` with the SHA-256 that the download recorded for it, where it did.

    `hf download` names the blobs of its cache by it, and writes it beside files of a --local-dir; the PyTorch files
    of torchvision and pytorch-fid carry its first 8 digits in their names.
    """
    found: dict[Path, str | None] = {}
    paths = [folder] if folder.is_file() else sorted(folder.rglob("*"))
    for path in paths:
        if path.suffix not in (".safetensors", ".bin", ".pth") or not path.is_file():
            continue
        candidates = [path.resolve().name]
        for parent in path.parents:
            record = parent / ".cache/huggingface/download" / f"{path.relative_to(parent)}.metadata"
            if record.is_file():  # commit, hash, time
                candidates += record.read_text(encoding="utf-8").splitlines()[1:2]
        if match := re.search(r"-([0-9a-f]{8})\.pth$", path.name):
            candidates.append(match.group(1))
        found[path] = next((c for c in candidates if re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{8}", c)), None)
    return found
