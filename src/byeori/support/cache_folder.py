"""The folder for everything that is made once: kernels, the embedded model, reference log-probs."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def cache_folder() -> Path:
    """Return $BYEORI_CACHE, or ~/.cache/byeori."""
    return Path(os.environ.get("BYEORI_CACHE", Path.home() / ".cache" / "byeori"))


def private_folder(name: str) -> Path | None:
    """Return a folder inside the cache for files that are executed, or None if others may write into it.

    It is made with mode 0700, and is not accepted as a link, of another owner, or writable for others: whoever shares
    the cache could otherwise leave code there.

    Raises:
        OSError: if it cannot be made.
    """
    folder = cache_folder() / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder if is_private(folder) else None


def is_private(path: Path) -> bool:
    """Return whether a file or folder is no link, and only this user can write to it."""
    status = path.lstat()
    return not stat.S_ISLNK(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022
