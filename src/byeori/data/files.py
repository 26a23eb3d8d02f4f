"""One local file -> rows: jsonl, json, csv, tsv, parquet or Arrow, streamed into an Arrow file in datasets' cache."""

from __future__ import annotations

import gzip
import hashlib
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byeori.data.arrow_schema import schema_of
from byeori.data.text_records import TEXT_ENDINGS, check_names, ending, records
from byeori.errors import DataError
from byeori.support.text_files import not_utf8, one_line

if TYPE_CHECKING:  # importing them takes a second, which `byeori --help` must not
    import pyarrow as pa
    from datasets import Dataset

ENDINGS = (*TEXT_ENDINGS, *(ending + ".gz" for ending in TEXT_ENDINGS), ".parquet", ".arrow")
_BATCH = 1000
_CACHE_VERSION = b"2"  # to be raised when the same file is read into other rows than before


def load_file(path: Path) -> Dataset:
    import datasets

    if ending(path) not in ENDINGS:
        raise DataError(f"{path} has an ending that is not known; known endings are {', '.join(ENDINGS)}.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; give a file with at least one row.")
    with reading(path):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        digest.update(ending(path).encode() + _CACHE_VERSION)
        cached = Path(datasets.config.HF_DATASETS_CACHE) / "byeori" / f"{digest.hexdigest()}.arrow"
        if not cached.exists():
            _write(path, cached)
        return datasets.Dataset.from_file(str(cached))


def _write(path: Path, cached: Path) -> None:
    """Write the rows of `path` as an Arrow stream; processes that do so at once each rename a whole file."""
    import datasets
    import pyarrow as pa

    schema, batches = _batches(path)
    check_names(path, schema.names)
    for field in schema:
        try:
            datasets.Features.from_arrow_schema(pa.schema([field]))
        except ValueError:  # types that datasets does not know
            kind = one_line(str(field.type))
            raise DataError(
                f"{path}: the column {field.name!r} has the type {kind}, which cannot be read; drop the column."
            ) from None
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent) as folder:
        written = Path(folder, cached.name)
        with pa.OSFile(str(written), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        written.replace(cached)


def _batches(path: Path) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """The schema of a file's rows, and the rows a batch at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if ending(path) == ".parquet":
        file = pq.ParquetFile(path)
        schema, batches = file.schema_arrow, file.iter_batches(_BATCH)
    elif ending(path) == ".arrow":
        try:
            reader = pa.ipc.open_stream(pa.memory_map(str(path)))
            schema, batches = reader.schema, iter(reader)
        except pa.ArrowInvalid:
            whole = pa.ipc.open_file(pa.memory_map(str(path)))
            schema, batches = whole.schema, map(whole.get_batch, range(whole.num_record_batches))
    else:
        schema = schema_of(path, records(path))
        return schema, _text_batches(path, schema)
    # pandas' categories are dictionaries in Arrow, which datasets does not know
    plain = [f.with_type(f.type.value_type) if pa.types.is_dictionary(f.type) else f for f in schema]
    schema = pa.schema(plain, schema.metadata)
    return schema, (batch.cast(schema) for batch in batches)


def _text_batches(path: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    rows: list[dict[str, Any]] = []
    for _, row in records(path):
        rows.append(row)
        if len(rows) == _BATCH:
            yield pa.RecordBatch.from_pylist(rows, schema)
            rows = []
    if rows:
        yield pa.RecordBatch.from_pylist(rows, schema)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into one sentence."""
    import pyarrow as pa

    try:
        yield
    except UnicodeDecodeError:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as lines:
            raise DataError(not_utf8(path, lines)) from None
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise DataError(f"{path} is not a whole gzip file; copy or compress it again.") from None
    except (ValueError, OverflowError, pa.ArrowException) as error:
        kind = path.suffix.lower().removeprefix(".") or "datasets folder"
        raise DataError(f"{path} is damaged or not {kind} ({one_line(error)}); write it again.") from None
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise DataError(f"{path} cannot be read or copied to datasets' cache: {reason}; check both.") from None
