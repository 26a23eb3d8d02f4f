"""One local file -> rows: its reader's batches, written once as an Arrow file in datasets' cache and memory-mapped."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from byeori.data.readers import READERS, ending
from byeori.data.readers.text import check_unique
from byeori.errors import DataError
from byeori.support.atomic_files import new_file
from byeori.support.text_files import not_utf8, one_line

if TYPE_CHECKING:  # importing it takes half a second, which `byeori --help` must not
    from datasets import Dataset

KNOWN_ENDINGS = f"{', '.join(name for name in READERS if not name.endswith('.gz'))} (text also as .gz)"
_CACHE_VERSION = b"2"  # increase it when the same file is read into other rows than before


def check_file(path: Path) -> None:
    """Raise DataError if a file has an unknown ending or is empty; what is in it is not read."""
    if ending(path) not in READERS:
        raise DataError(f"{path} has an unknown ending; known endings are {KNOWN_ENDINGS}.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; give a file with at least one row.")


def load_file(path: Path) -> Dataset:
    """Return the rows of a file, from the cache if a file with the same content was read before.

    Raises:
        DataError: if the file cannot be read, is damaged or holds values of different types in one column.
    """
    import datasets

    check_file(path)
    with reading(path):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        digest.update(ending(path).encode() + _CACHE_VERSION)
        cached = Path(datasets.config.HF_DATASETS_CACHE) / "byeori" / f"{digest.hexdigest()}.arrow"
        if not cached.exists():
            _write(path, cached)
        return datasets.Dataset.from_file(str(cached))


def _write(path: Path, cached: Path) -> None:
    """Write the rows of `path` as an Arrow stream, which appears whole."""
    import datasets
    import pyarrow as pa

    schema, batches = READERS[ending(path)](path)
    check_unique(path, schema.names)
    for field in schema:
        try:
            datasets.Features.from_arrow_schema(pa.schema([field]))
        except ValueError:  # types that datasets does not know
            kind = one_line(str(field.type))
            raise DataError(
                f"{path}: column {field.name!r} has the type {kind}, which is not supported; drop the column."
            ) from None
    cached.parent.mkdir(parents=True, exist_ok=True)
    with (
        new_file(cached) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as writer,
    ):
        for batch in batches:
            writer.write_batch(batch)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn any error while a file is read into one sentence.

    Raises:
        DataError: if something is wrong with the file, or with the disk that the cache is on.
    """
    import pyarrow as pa

    try:
        yield
    except UnicodeDecodeError:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as lines:
            raise DataError(not_utf8(path, lines)) from None
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise DataError(f"{path} is not a complete gzip file; copy or compress it again.") from None
    except (ValueError, OverflowError, pa.ArrowException) as error:
        kind = path.suffix.lower().removeprefix(".") or "datasets folder"
        raise DataError(f"{path} is damaged or not {kind} ({one_line(error)}); write it again.") from None
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise DataError(f"{path} cannot be read or copied to datasets' cache: {reason}; check both.") from None
