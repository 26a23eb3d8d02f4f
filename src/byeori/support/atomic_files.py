"""Files and folders that appear whole or not at all, and disk errors in one sentence.

Everything is written under a hidden temporary name (`.NAME.PID-RANDOM.tmp`) in the folder where it will stand, flushed
to the disk and renamed, so that neither a crash nor a full disk leaves half of it under its own name.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from byeori.errors import ByeoriError, CheckpointError

_FULL = (errno.ENOSPC, errno.EDQUOT)
os.umask(_UMASK := os.umask(0o077))


# ---- errors ------------------------------------------------------------------------------------------------------


@contextmanager
def disk_errors(
    what: object,
    *,
    advice: str | Callable[[bool], str] = "what was finished before is kept",
    error: type[ByeoriError] = CheckpointError,
) -> Iterator[None]:
    """Turn a disk error of the body into one sentence.

    what: what is being written. advice: the end of the sentence, or a function that makes it; the function is called
    after the failure, with True if the disk is full. error: the class to raise.

    Raises:
        ByeoriError: of that class, if the disk is full, read-only or fails.
    """
    try:
        yield
    except Exception as failure:
        cause = _disk_error(failure)
        if cause is None:
            raise
        full = getattr(cause, "errno", None) in _FULL or "No space left" in str(cause)
        end = advice if isinstance(advice, str) else advice(full)
        reason = "" if full else f" ({getattr(cause, 'strerror', None) or cause})"
        text = f"{'the disk is full: ' if full else ''}{what} could not be written{reason}{end and f'; {end}'}"
        raise error(text) from None


def _disk_error(failure: BaseException) -> BaseException | None:
    """The disk error behind an exception, or None.

    safetensors and tokenizers, written in Rust, raise their own classes with `os error` in the text; datasets raises
    something else while it handles the real error.
    """
    cause: BaseException | None = failure
    while cause is not None and not isinstance(cause, ByeoriError):
        if isinstance(cause, OSError) or "os error" in str(cause) or type(cause).__name__ == "SafetensorError":
            return cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


# ---- writing -----------------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> None:
    """Write a text file, which appears whole.

    Raises:
        CheckpointError: if the disk is full or read-only.
    """
    with disk_errors(path):
        if path.exists() and not path.is_file():  # /dev/stdout, a pipe
            path.write_text(text, encoding="utf-8")
            return
        with new_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path for the body to write; it becomes `path` at the end, unless the body fails.

    The file that was there before stays until then. Several processes may write the same file at once.
    """
    path = path.resolve()  # a link stays a link
    temporary = _temporary(path)
    try:
        yield temporary
        flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder for the body to fill; it becomes `folder` at the end, unless the body fails.

    The folder that was there before stays until then. A body that removes or renames the temporary folder leaves
    everything as it was. What processes that were killed had written goes first.
    """
    folder = folder.resolve()  # a link stays a link
    recover(folder)
    temporary = _temporary(folder)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if temporary.is_dir():
            _flush_tree(temporary)
            _put_in_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def files_into(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder for the body to fill; at the end its files move into `folder`, one by one.

    Each file appears whole; other files in `folder` stay. If the body fails, nothing moves.
    """
    temporary = _temporary(folder / "final")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
            flush(path)
            target = folder / path.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
        flush(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder; the copy appears whole."""
    with new_folder(target) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder; under its own name it is whole until it is gone."""
    hidden = _temporary(folder, ".gone")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def sweep(parent: Path, name: str = "*") -> None:
    """Delete what killed processes were still writing into `parent`. name: of the file or folder, or a pattern."""
    for path in parent.glob(f".{name}.tmp" if name == "*" else f".{name}.*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def recover(folder: Path) -> None:
    """Delete what processes that are dead left of writing a folder, and put back what one of them had moved away.

    A model that was half written stays on the disk otherwise, as large as it is.
    """
    folder = folder.resolve()
    leftover = re.compile(rf"\.{re.escape(folder.name)}\.(\d+)-\w+(\.old|\.gone)?\.tmp")
    paths = folder.parent.iterdir() if folder.parent.is_dir() else ()
    for path, match in [(path, leftover.fullmatch(path.name)) for path in paths]:
        if match is None or _is_alive(int(match[1])):
            continue
        if match[2] == ".old" and not folder.exists():
            path.rename(folder)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _temporary(path: Path, mark: str = "") -> Path:
    # random, so that nobody who can write into the folder has left a link under this name
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{mark}.tmp")


def _put_in_place(temporary: Path, folder: Path) -> None:
    former = _temporary(folder, ".old")
    shutil.rmtree(former, ignore_errors=True)
    if folder.exists() and _exchange(temporary, folder):
        former = temporary
    else:
        if folder.exists():
            folder.rename(former)  # killed here, `recover` puts it back
        temporary.rename(folder)
    flush(folder.parent)
    shutil.rmtree(former, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names at once, so that neither is ever missing; return False where the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), swap) == 0)


# ---- the disk ----------------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def note_hash(path: Path) -> None:
    """Write a file's hash beside it, as `is_as_noted` expects it."""
    write(path.with_name(f"{path.name}.sha256"), sha256(path))


def is_as_noted(path: Path) -> bool:
    """Return whether a file has the content that it had when its hash was noted."""
    try:
        return path.with_name(f"{path.name}.sha256").read_text(encoding="ascii") == sha256(path)
    except (OSError, ValueError):
        return False


def flush(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk.

    A file that only its owner may read, as safetensors writes them, is then as readable as others that he makes.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if os.fstat(descriptor).st_mode == stat.S_IFREG | 0o600:
            os.fchmod(descriptor, 0o666 & ~_UMASK)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_tree(folder: Path) -> None:
    """Files first, then the folders that name them."""
    paths = sorted(folder.rglob("*"), key=Path.is_dir)
    for path in [*paths, folder]:
        flush(path)
