"""A text file as one document: one row with the column `text`, for `--text_column text`."""

from __future__ import annotations

from pathlib import Path

from byeori.data.readers.text import Records, open_text, reader, with_compressed
from byeori.errors import DataError

ENDINGS = with_compressed(".txt", ".md")
COLUMN = "text"


def records(path: Path) -> Records:
    """Yield the whole text of a file.

    Raises:
        DataError: if it holds nothing but spaces.
    """
    with open_text(path, newline="") as file:
        text = file.read()
    if not text.strip():
        raise DataError(f"{path} is empty but for spaces; leave it out.")
    yield 1, {COLUMN: text}


read = reader(records)
