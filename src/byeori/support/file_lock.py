"""A lock file: one process at a time. The lock goes with its process, in whatever way that ends."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # some network file systems


class Held(Exception):
    """Another process holds the lock. The message says which one: `process 123 on host`."""


@contextmanager
def locked(path: Path, *, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold a lock while the body runs; its file is deleted afterwards. Where a file system has no locks, do without.

    waiting: called with the holder before waiting for it; without it a held lock is an error.

    Raises:
        Held: if another process holds the lock. OSError: if its file cannot be made.
    """
    file = _take(path, waiting)
    try:
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def holder(path: Path) -> str | None:
    """Return which process holds a lock, or None."""
    try:
        with path.open("r+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return None
    except BlockingIOError:
        return _written(path)
    except OSError:
        return None


def _take(path: Path, waiting: Callable[[str], None] | None) -> IO[str]:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is None:
                file.close()
                raise Held(_written(path)) from None
            waiting(_written(path))
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.close()
                raise
        # the holder before may have deleted the file that was opened here
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()


def _written(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")[:200] or "another process"
    except OSError:
        return "another process"
