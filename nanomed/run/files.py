"""Files that are whole or absent.

Everything nanomed writes goes to a temporary name in the same folder, is flushed to the disk and only then renamed,
so a reader (or a restart after `kill -9`) sees the old file, the new file, or none, and never half of one.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from nanomed.run.flags import UsageError
from nanomed.run.progress import Progress

WINDOWS = os.name == "nt"
LARGE = 256 << 20  # bytes that may take a second
_TEMPORARY = re.compile(r"^\..+\.(\d+)\.tmp$")  # .name.<pid>.tmp


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Give a temporary path to write to; on leaving, flush it to disk and rename it to `path`.

    If the body raises, the temporary file is removed and `path` stays as it was. Works for folders too: then the
    files in it are flushed one by one and the folder takes the final name in one rename, which must be free.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _remove(temporary)
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")) if temporary.is_dir() else [temporary]:
            if file.is_file():
                _sync(file)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException as error:
        _remove(temporary)
        if isinstance(error, OSError) and error.errno is not None:  # the name that its reader knows
            told = str(path) if error.filename is None else os.fsdecode(error.filename)
            error.filename = told.replace(str(temporary), str(path))
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically, with the newlines it has."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def write_json(path: str | Path, value: object) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are refused: they are not JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_tensors(path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically; `metadata` is added to `{"format": "pt"}`."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with atomic(path) as temporary:
        try:
            save_file(tensors, temporary, {"format": "pt"} | (metadata or {}))
        except SafetensorError as error:  # which hides the number of the system's error in its words
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) if number else error from None


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """Float images (..., 3, H, W) in [0, 1] to uint8 (..., H, W, 3) on the CPU, rounded to nearest."""
    return (images * 255).round().to(torch.uint8).movedim(-3, -1).contiguous().cpu()


def write_png(path: str | Path, image: torch.Tensor) -> None:
    """A uint8 image (H, W, 3) as an 8-bit RGB PNG, atomically; no metadata."""
    from PIL import Image

    with atomic(path) as temporary:
        Image.fromarray(image.numpy()).save(temporary, format="PNG")


MARK = ".nanomed.json"  # beside what nanomed made where a user says: {name: SHA-256}


def expect_own(*paths: str | Path) -> None:
    """Refuse to write over what is not, to the byte, what `mark_own` has seen: nothing is written over that somebody
    else made, or has changed since. Raises UsageError."""
    for path in map(Path, paths):
        if path.is_dir() or path.is_file() and _marks(path.parent).get(path.name) != sha256(path):
            raise UsageError(f"{path} is there already, and not as nanomed made it: choose another --out or remove it")


def mark_own(*paths: str | Path) -> None:
    """Write down that these files are nanomed's, so that it may write over them."""
    for path in map(Path, paths):
        write_json(path.parent / MARK, _marks(path.parent) | {path.name: sha256(path)})


def _marks(folder: Path) -> dict[str, str]:
    try:
        marks = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return marks if isinstance(marks, dict) else {}


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, as hex; of a large one it tells how far it is."""
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        if size < LARGE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        with Progress(size >> 20, f"hashing {os.fspath(path)}", "MB") as bar:
            while block := file.read(16 << 20):
                digest.update(block)
                bar.update(len(block) >> 20)
        return digest.hexdigest()


def sweep(folder: str | Path) -> None:
    """Remove temporary files and folders below `folder` whose writer no longer lives."""
    for path in Path(folder).rglob(".*.tmp"):
        match = _TEMPORARY.match(path.name)
        if match and not _alive(int(match.group(1))):
            _remove(path)


def lock(file: IO[bytes], wait: bool = True) -> bool:
    """Hold an open file for this process alone, until it is closed or the process dies. Where another holds it: wait,
    or else return False."""
    try:
        import fcntl
    except ImportError:  # Windows: a byte far behind the end stands for the file
        import msvcrt

        place = os.lseek(file.fileno(), 0, os.SEEK_CUR)
        os.lseek(file.fileno(), 1 << 40, os.SEEK_SET)
        try:
            while True:
                try:
                    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
                    return True
                except OSError:
                    if not wait:
                        return False
                    time.sleep(0.05)
        finally:
            os.lseek(file.fileno(), place, os.SEEK_SET)
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _alive(pid: int) -> bool:
    if WINDOWS:  # where signal 0 is Ctrl-C
        return _alive_on_windows(pid)
    try:
        os.kill(pid, signal.SIG_DFL)  # signal 0 asks only whether the process exists
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _alive_on_windows(pid: int) -> bool:
    kernel = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined]
    handle = kernel.OpenProcess(0x1000, False, pid)  # to ask for little
    if handle:
        kernel.CloseHandle(handle)
    return bool(handle) or ctypes.get_last_error() == 5  # type: ignore[attr-defined]  # somebody else's


def _sync(path: Path) -> None:
    """Flush a file, or a folder's names, to disk. Windows opens no folder, and flushes only what can be written."""
    if WINDOWS and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        for child in path.iterdir():
            _remove(child)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
