"""Arrow: a stream or a file of record batches, memory-mapped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from byeori.data.readers.text import FileRows, check_unique
from byeori.support.text_files import one_line

if TYPE_CHECKING:  # importing it takes a tenth of a second, which `byeori --help` must not
    import pyarrow as pa

ENDINGS = (".arrow", ".feather")


def read(path: Path) -> FileRows:
    """Return the rows of a file.

    Raises:
        DataError: if it has two columns of one name.
    """
    import pyarrow as pa

    try:
        stream = pa.ipc.open_stream(pa.memory_map(str(path)))
        check_unique(path, stream.schema.names)
        return plain(stream.schema, iter(stream))
    except pa.ArrowInvalid:
        file = pa.ipc.open_file(pa.memory_map(str(path)))
        check_unique(path, file.schema.names)
        return plain(file.schema, map(file.get_batch, range(file.num_record_batches)))


def plain(schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> FileRows:
    """Return rows of Arrow without columns of types that datasets does not know.

    Dictionaries, which pandas makes of categories and `datasets` does not know, are replaced by their values.
    """
    import pyarrow as pa
    from datasets import Features

    left_out = unreadable(schema)
    fields = [
        field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
        for field in schema
        if field.name not in left_out
    ]
    target = pa.schema(fields, schema.metadata)
    kept = [number for number, field in enumerate(schema) if field.name not in left_out]
    rows = (batch.select(kept).cast(target) for batch in batches)
    return FileRows(features=Features.from_arrow_schema(target), batches=rows, left_out=left_out)


def unreadable(schema: pa.Schema) -> dict[str, str]:
    """Return the columns of types that datasets does not know, and those types in words."""
    import pyarrow as pa
    from datasets import Features

    out = {}
    for field in schema:
        plain_type = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        try:
            Features.from_arrow_schema(pa.schema([field.with_type(plain_type)]))
        except (ValueError, TypeError, KeyError, NotImplementedError):
            out[field.name] = f"its type {one_line(str(field.type))} is not supported"
    return out
