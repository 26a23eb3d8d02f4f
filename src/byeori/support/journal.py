"""Results that are not finished, beside the file that they will become: `answers.jsonl.part`.

Every finished item is appended as a line, so that a killed process loses only what it was computing, and the same
command continues. The first line holds a hash of everything that the items depend on.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from byeori.errors import CheckpointError
from byeori.support.atomic_files import disk_errors


class Journal:
    """Finished items by name. Without a file (standard output) they are kept in memory alone."""

    def __init__(self, file: BinaryIO | None = None, items: dict[str, Any] | None = None) -> None:
        self._file = file
        self.items = items or {}

    def add(self, name: str, item: Any) -> None:
        """Keep an item, JSON data, under a name.

        Raises:
            CheckpointError: if the disk is full or fails.
        """
        self.items[name] = item
        if self._file:
            with disk_errors(self._file.name):
                self._file.write(_line({"name": name, "item": item}))
                self._file.flush()

    def part(self, prefix: str) -> Journal:
        """Return a journal of its own whose items are kept here, under names that begin with `prefix`."""
        return _Part(self, prefix)


class _Part(Journal):
    def __init__(self, whole: Journal, prefix: str) -> None:
        named = {name: item for name, item in whole.items.items() if name.startswith(prefix)}
        super().__init__(items={name.removeprefix(prefix): item for name, item in named.items()})
        self._whole, self._prefix = whole, prefix

    def add(self, name: str, item: Any) -> None:
        self.items[name] = item
        self._whole.add(f"{self._prefix}{name}", item)


def part_of(output: Path) -> Path:
    """Return where the unfinished results of a file are kept."""
    return output.with_name(output.name + ".part")


@contextmanager
def unfinished(output: Path | None, depends_on: Any, *, overwrite: str | None) -> Iterator[Journal]:
    """Yield the finished items of a file, with those of an earlier, killed run; the body writes the file at the end.

    If the body fails, the items stay for the next run; without any, nothing stays.

    depends_on: JSON data, everything that the items depend on.
    overwrite: None to delete items that depend on something else, or the flag to name in the error about them.

    Raises:
        CheckpointError: if they do, if another process is writing them, or if the disk fails.
    """
    if output is None or (output.exists() and not output.is_file()):  # /dev/stdout, a pipe
        yield Journal()
        return
    path = part_of(output)
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True, default=str).encode()).hexdigest()
    with disk_errors(path):
        file = path.open("a+b")
    with file:
        _lock(file, path)
        with disk_errors(path):
            items = _read(file, key)
            if items is None:
                if overwrite is not None:
                    raise CheckpointError(
                        f"{path} holds results of an unfinished run with another model, other rows or other settings; "
                        f"give the same ones to continue it, or {overwrite} to start anew"
                    )
                file.truncate(0)
            if not items:
                file.truncate(0)
                file.write(_line({"key": key}))
                file.flush()
        journal = Journal(file, items)
        try:
            yield journal
        except BaseException:
            if not journal.items:
                path.unlink(missing_ok=True)
            raise
        path.unlink(missing_ok=True)


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(f"another process is writing {path}; wait for it, or give another output") from None
    except OSError:  # a file system without locks
        return


def _read(file: BinaryIO, key: str) -> dict[str, Any] | None:
    """Return the items of an unfinished file, or None if they depend on something else; a torn last line is cut off."""
    file.seek(0)
    lines = file.read().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        file.truncate(sum(map(len, lines[:-1])))
        del lines[-1]
    if not lines:
        return {}
    if _parsed(lines[0]).get("key") != key:
        return None
    return {item["name"]: item["item"] for item in map(_parsed, lines[1:]) if {"name", "item"} <= set(item)}


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # zeros after a power cut
        return {}
    return value if isinstance(value, dict) else {}


def _line(item: dict[str, Any]) -> bytes:
    return json.dumps(item, ensure_ascii=False, default=str).encode() + b"\n"
