"""What the text formats (jsonl, json, csv, tsv) share: gzip, encodings, and rows to batches of Arrow."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from byeori.data.readers.schema import schema_of
from byeori.errors import DataError

if TYPE_CHECKING:  # importing it takes a tenth of a second, which `byeori --help` must not
    import pyarrow as pa

Records = Iterator[tuple[int, dict[str, Any]]]
"""(1-based line where the row begins, row), one by one."""

BATCH_ROWS = 1000


def with_gzip(*endings: str) -> tuple[str, ...]:
    """Return the endings, and each once more with .gz."""
    return (*endings, *(ending + ".gz" for ending in endings))


def reader(records: Callable[[Path], Records]) -> Callable[[Path], tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """Make a `read` function of a format's `records`, which are gone through twice: for their types, then for rows."""

    def read(path: Path) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        schema = schema_of(path, records(path))
        return schema, _batches(records(path), schema)

    return read


def _batches(records: Records, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    rows = (row for _, row in records)
    while batch := list(islice(rows, BATCH_ROWS)):
        yield pa.RecordBatch.from_pylist(batch, schema)


def open_text(path: Path, newline: str) -> IO[str]:
    """Open a text file, plain or gzip; utf-8-sig drops the mark that Excel and Windows put first."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline=newline)
    return path.open(encoding="utf-8-sig", newline=newline)


def check_unique(path: Path | str, columns: list[str]) -> None:
    """Raise DataError if two columns have the same name."""
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise DataError(f"{path} has the column {twice[0]!r} twice; rename one of them.")
