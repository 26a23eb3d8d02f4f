"""Parquet, a batch of rows at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from byeori.data.readers import arrow
from byeori.data.readers.text import BATCH_ROWS, FileRows, check_decoded, check_unique

ENDINGS = (".parquet",)


def read(path: Path) -> FileRows:
    """Return the rows of a file; columns of types that datasets does not know are not read.

    Raises:
        DataError: if it has two columns of one name, or a part of it would take far more memory than its size.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    schema, about = file.schema_arrow, file.metadata
    check_unique(path, schema.names)
    check_decoded(path, max((about.row_group(at).total_byte_size for at in range(about.num_row_groups)), default=0))
    left_out = arrow.unreadable(schema)
    names = [name for name in schema.names if name not in left_out]
    kept = pa.schema([schema.field(name) for name in names], schema.metadata)
    return replace(arrow.plain(kept, file.iter_batches(BATCH_ROWS, columns=names)), left_out=left_out)
