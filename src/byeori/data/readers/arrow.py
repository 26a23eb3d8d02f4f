"""Arrow: a stream or a file of record batches, memory-mapped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing it takes a tenth of a second, which `byeori --help` must not
    import pyarrow as pa

ENDINGS = (".arrow",)


def read(path: Path) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Return the schema of a file and its rows in batches."""
    import pyarrow as pa

    try:
        stream = pa.ipc.open_stream(pa.memory_map(str(path)))
        return plain(stream.schema, iter(stream))
    except pa.ArrowInvalid:
        file = pa.ipc.open_file(pa.memory_map(str(path)))
        return plain(file.schema, map(file.get_batch, range(file.num_record_batches)))


def plain(schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Replace dictionaries, which pandas makes of categories and `datasets` does not know, by their values."""
    import pyarrow as pa

    fields = [
        field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field for field in schema
    ]
    schema = pa.schema(fields, schema.metadata)
    return schema, (batch.cast(schema) for batch in batches)
