"""What a long run has done so far: OUT.jsonl, first its settings, then one line a record, appended whole under a lock.

A run that was killed at any moment goes on without a lost or a doubled record, and any number of processes may write.
"""

import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from nanomed.data.table import DataError
from nanomed.run import files
from nanomed.run.flags import UsageError
from nanomed.run.ranks import Ranks


class Journal:
    """Records are dicts; `key` names the field by which they are told apart, and the first of a kind stays."""

    def __init__(self, out: str | Path, settings: dict, key: str):
        self.out, self.key = Path(out), key
        self.path = self.out.with_name(self.out.name + ".jsonl")
        self.read, self.lines = 0, 0  # bytes and lines that this process has looked at
        self.known: dict[str, dict] = {}  # the records in them
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with self._locked() as file:
            first = _whole(file, 0).splitlines()[:1]
            if not first:
                if self.out.exists():
                    raise UsageError(f"{self.out} was not written by this command; choose another --out or remove it")
                file.write(_line(settings))
                return
        before = _read(first[0], self.path, 1)
        if before != settings:
            names = [name for name in settings.keys() | before.keys() if settings.get(name) != before.get(name)]
            raise UsageError(f"{self.path} holds what was made with other settings ({', '.join(sorted(names))}); "
                             f"choose another --out or remove it")  # fmt: skip

    def append(self, record: dict) -> None:
        """Write a record's line, unless another process has."""
        with self._locked() as file:
            self._look(file)
            if record[self.key] not in self.known:
                file.write(_line(record))
                file.flush()
                os.fsync(file.fileno())
                self._look(file)

    def records(self) -> dict[str, dict]:
        """All that is done, by key, in the order in which it was written."""
        with self._locked() as file:
            self._look(file)
        return dict(self.known)

    def open(self, names: Sequence[str], ranks: Ranks, size: int) -> Iterator[list[str]]:
        """Batches of the names that are still to be done: this process's share of them, and then, so that none waits
        long for another, those that others have not finished. Two may then do the same one; the first to write counts.
        """
        done = self.records()
        mine = [name for name in ranks.share(names) if name not in done]
        for start in range(0, len(mine), size):
            yield mine[start : start + size]
        draw = random.Random(ranks.rank)
        while ranks.world > 1 and (rest := [name for name in names if name not in self.records()]):
            yield draw.sample(rest, min(size, len(rest)))

    def _look(self, file) -> None:
        """Read what has come since the last time. Lines are never changed, so the others need not be read again."""
        new = _whole(file, self.read)
        for line in new.splitlines():
            self.lines += 1
            if self.lines > 1:
                record = _read(line, self.path, self.lines)
                self.known.setdefault(record[self.key], record)
        self.read += len(new)

    def _locked(self):
        file = open(self.path, "a+b")
        files.lock(file)
        return file


def _line(value: dict) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()


def _whole(file, start: int) -> bytes:
    """The lines of a journal from a byte on; half of one, which a killed process left at the end, is cut off."""
    file.seek(start)
    content = file.read()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        file.truncate(start + end)
    return content[:end]


def _read(line: bytes, path: Path, number: int) -> dict:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}:{number}: damaged ({error}); remove the line") from error
