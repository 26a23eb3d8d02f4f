"""JSON Lines: one object per line, read line by line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from byeori.data.readers.schema import type_name
from byeori.data.readers.text import Records, lines_of, open_text, reader, with_compressed
from byeori.errors import DataError
from byeori.support.text_files import one_line

ENDINGS = with_compressed(".jsonl", ".ndjson")
# pandas writes NaN for a missing value; json.dumps writes NaN, Infinity and -Infinity, which JSON does not have.
DECODER = json.JSONDecoder(parse_constant={"NaN": None, "Infinity": math.inf, "-Infinity": -math.inf}.__getitem__)


def records(path: Path) -> Records:
    """Yield the rows of a file, one line in memory at a time.

    Raises:
        DataError: if a line is not one JSON object.
    """
    with open_text(path, newline="\n") as file:
        for number, line in enumerate(lines_of(path, file), start=1):
            if not line.strip():
                continue
            try:
                value = DECODER.decode(line)
            except (ValueError, RecursionError) as error:
                rule = "write one object per line, or name the file .json if it holds one list"
                raise DataError(f"{path} line {number} is not valid JSON ({one_line(error)}); {rule}.") from None
            yield number, as_row(path, number, value)


read = reader(records)


def as_row(path: Path, line: int, value: object) -> dict[str, Any]:
    """Return a decoded value that is an object, or raise DataError."""
    if isinstance(value, dict):
        return value
    kind = "null" if value is None else type_name(value)
    raise DataError(f'{path} line {line} is {kind}, not an object; write every row as {{"column": value, ...}}.')
