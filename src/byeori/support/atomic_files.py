"""Files and folders that appear whole, and a full disk in one sentence."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from byeori.errors import CheckpointError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong while `path` is written into one sentence.

    Raises:
        CheckpointError: the disk is full or read-only.
    """
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise CheckpointError(f"{path} could not be written ({reason}); what was finished before is kept") from None


def write(path: Path, text: str) -> None:
    """Write a text file.

    Raises:
        CheckpointError: the disk is full or read-only.
    """
    with writing(path):
        path.write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    """A hash of what the file holds."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
