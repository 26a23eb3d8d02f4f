"""One module for each kind of file, with its `ENDINGS` and `read(path)` -> FileRows (readers/text.py).

To add a kind, write a module here and add it to the line below.
"""

from __future__ import annotations

from pathlib import Path

from byeori.data.readers import arrow, csv, document, json, jsonl, parquet, workbook
from byeori.data.readers.text import COMPRESSED

_KINDS = (jsonl, json, csv, workbook, parquet, arrow, document)
READERS = {ending: kind.read for kind in _KINDS for ending in kind.ENDINGS}
DOCUMENTS = document.ENDINGS


def ending(path: Path) -> str:
    """Return the last suffix in lower case, or the last two of a compressed file: ".csv", ".csv.gz"."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return "".join(suffixes[-2:] if suffixes[-1:] and suffixes[-1] in COMPRESSED else suffixes[-1:])
