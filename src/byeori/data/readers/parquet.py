"""Parquet, a batch of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from byeori.data.readers import arrow
from byeori.data.readers.text import BATCH_ROWS

if TYPE_CHECKING:  # importing it takes a tenth of a second, which `byeori --help` must not
    import pyarrow as pa

ENDINGS = (".parquet",)


def read(path: Path) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Return the schema of a file and its rows in batches."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    return arrow.plain(file.schema_arrow, file.iter_batches(BATCH_ROWS))
