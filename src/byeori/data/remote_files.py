"""Files behind a URL of fsspec (s3://, gs://, https://, hf://, ...) -> copies in datasets' cache, and their paths."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from byeori.data import places
from byeori.errors import ByeoriError, DataError
from byeori.support.atomic_files import new_file
from byeori.support.console import say
from byeori.support.hub import human_size
from byeori.support.text_files import one_line, redacted


def fetch(url: str, split: str, notes: list[str]) -> dict[str, Path]:
    """Return name -> copy of every file that a URL stands for: a file, a glob, or a folder of files.

    A file that has not changed there is not copied again.

    Raises:
        DataError: if there is none, or it cannot be read.
    """
    import fsspec

    if "://***@" in url:
        raise DataError(f"{url}: passwords are not saved with a run; give the whole address.")
    with _reading(url):
        system, root = fsspec.core.url_to_fs(url)
        system.invalidate_cache()  # it may have listed the place before the files changed
        if glob.has_magic(root):
            found = [path for path in sorted(map(str, system.glob(root))) if system.isfile(path)]
        elif system.isdir(root):
            inside = {Path(path): str(path) for path in sorted(system.ls(root, detail=False)) if system.isfile(path)}
            found = [inside[path] for path in places.files_of_split(list(inside), redacted(url), split, notes)]
        else:
            found = [root]
        if not found:
            raise DataError(f"no file matches {url}; check the address and the pattern.")
        return {redacted(system.unstrip_protocol(path)): _copy(system, path) for path in found}


def _copy(system: Any, path: str) -> Path:
    """Return the copy of a file; its name in the cache depends on what the place says of its version."""
    import datasets

    about = system.info(path)
    version = hashlib.blake2b(f"{system.unstrip_protocol(path)} {sorted(about.items())}".encode(), digest_size=16)
    name = Path(urlsplit(path).path if "://" in path else path).name  # of an address, without ?download=true
    copy = Path(datasets.config.HF_DATASETS_CACHE) / "byeori" / "remote" / version.hexdigest() / name
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        if (size := about.get("size") or 0) > 1 << 24:
            say(f"Downloading {system.unstrip_protocol(path)}, {human_size(size)}")
        with new_file(copy) as temporary:
            system.get_file(path, str(temporary))
    return copy


@contextmanager
def _reading(url: str) -> Iterator[None]:
    try:
        yield
    except ByeoriError:
        raise
    except ImportError as error:  # fsspec says which package the protocol needs
        raise DataError(f"{url} cannot be opened ({one_line(error)}); install that package with pip.") from None
    except Exception as error:  # whatever a client of a storage service can raise
        # fsspec raises FileNotFoundError for whatever a web server answers, and for a certificate nobody knows
        cause = (error.__cause__ or error) if isinstance(error, FileNotFoundError) else error
        if isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) == 404:
            raise DataError(f"there is no file {url}; check the address, and that you may read it.") from None
        reason = one_line(redacted(str(cause)) or type(cause).__name__)
        raise DataError(f"{url} cannot be read: {reason}; check the address and your credentials.") from None
