"""CSV and TSV: every value is text as written, empty ones too."""

from __future__ import annotations

import csv
import itertools
import re
from pathlib import Path

from byeori.data.readers.text import (
    LONGEST_LINE,
    Records,
    check_unique,
    lines_of,
    open_text,
    plain_ending,
    reader,
    with_compressed,
)
from byeori.errors import DataError
from byeori.support.text_files import one_line

ENDINGS = with_compressed(".csv", ".tsv")
_SEPARATOR = re.compile(r'"?sep=(.)"?\s*')  # Excel's first line


def records(path: Path) -> Records:
    """Yield the rows of a file.

    Raises:
        DataError: if a row does not fit the header, a quote is not closed, or something else separates the columns.
    """
    csv.field_size_limit(LONGEST_LINE)  # the default refuses documents over 128 KiB
    names: list[str] = []
    with open_text(path, newline="") as text:
        file = lines_of(path, text)
        first = next(file, "")
        named = _SEPARATOR.fullmatch(first)
        delimiter = named[1] if named else "\t" if plain_ending(path) == ".tsv" else ","
        lines, skipped = (file, 1) if named else (itertools.chain([first], file), 0)
        # strict: otherwise a quote that is never closed swallows the rest of the file as one value
        parsed = csv.reader(lines, delimiter=delimiter, strict=True)
        line = skipped + 1
        try:
            for fields in parsed:
                if fields and not names:
                    # pandas writes its index under an empty name and reads it back under this one
                    names = [name.strip() or f"Unnamed: {place}" for place, name in enumerate(fields)]
                    check_unique(path, names)
                    _check_delimiter(path, names, delimiter)
                elif fields and len(fields) != len(names):
                    raise DataError(
                        f"{path} line {line} has {len(fields)} field{'' if len(fields) == 1 else 's'} and the "
                        f"header has {len(names)}; put a value with a separator or a line break in it in double quotes."
                    )
                elif fields:
                    yield line, dict(zip(names, fields, strict=True))
                line = parsed.line_num + skipped + 1
        except csv.Error as error:
            fix = "close every double quote, and write one inside a quoted value as two"
            raise DataError(f"{path} line {line}: {one_line(error)}; {fix}.") from None


read = reader(records)


def _check_delimiter(path: Path, names: list[str], delimiter: str) -> None:
    """Raise DataError if the only column looks like several with another delimiter between them."""
    others = [other for other in (";", "\t", ",", "|") if other != delimiter and other in names[0]]
    if len(names) == 1 and others:
        raise DataError(
            f"{path} has one column, {names[0]!r}, which looks like several with {others[0]!r} between them; put "
            f"{delimiter!r} there, or write sep={others[0]} as the first line of the file."
        )
