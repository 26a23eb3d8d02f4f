"""Workbooks: the rows of one sheet, under the names in its first row."""

from __future__ import annotations

import datetime
import zipfile
from pathlib import Path
from typing import Any

from byeori.data.readers.schema import features_of
from byeori.data.readers.text import FileRows, Records, batches_of, check_decoded, check_unique
from byeori.errors import DataError
from byeori.support.text_files import one_line

ENDINGS = (".xlsx", ".xlsm", ".xls", ".ods")


def read(path: Path, sheet: str | None = None) -> FileRows:
    """Return the rows of a sheet, by default the first that has any. An empty cell is null, a date is text (ISO 8601).

    Raises:
        DataError: if the workbook cannot be opened, or has no such sheet, or none with rows.
    """
    from python_calamine import CalamineError, CalamineWorkbook

    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as parts:
                check_decoded(path, sum(part.file_size for part in parts.infolist()))
        book = CalamineWorkbook.from_path(str(path))
        tables = {name: book.get_sheet_by_name(name).to_python() for name in book.sheet_names}
    except (CalamineError, zipfile.BadZipFile, NotImplementedError) as error:
        locked = "it may be encrypted: remove its password" if "ncrypt" in str(error) else "save it again"
        raise DataError(f"{path} is damaged or not a workbook ({one_line(error)}); {locked}.") from None
    filled = [name for name, rows in tables.items() if len(rows) > 1]
    if sheet is not None and sheet not in tables:
        raise DataError(f"{path} has no sheet {sheet!r}; set dataset_config to one of: {', '.join(tables)}.")
    if not filled and sheet is None:
        raise DataError(f"{path} has no rows; give a workbook with a row of names and at least one row below it.")
    chosen = filled[0] if sheet is None else sheet
    others = ", ".join(name for name in filled if name != chosen)
    note = f"The rows of {{path}} are those of the sheet {chosen!r}; dataset_config names another ({others})"
    rows = list(_records(path, tables[chosen]))
    features = features_of(path, rows)
    notes = (note,) if others and sheet is None else ()
    return FileRows(features=features, batches=batches_of(iter(rows), features), notes=notes)


def _records(path: Path, table: list[list[Any]]) -> Records:
    names: list[str] = []
    for number, cells in enumerate(table, start=1):
        values = [_value(cell) for cell in cells]
        if not names and any(value is not None for value in values):
            last = max(at for at, value in enumerate(values) if value is not None)
            names = [
                f"Unnamed: {at}" if value is None else str(value).strip() for at, value in enumerate(values[: last + 1])
            ]
            check_unique(path, names)
        elif any(value is not None for value in values):
            if any(value is not None for value in values[len(names) :]):
                raise DataError(f"{path} row {number} has a cell beyond the last column name; name its column.")
            yield number, dict(zip(names, values, strict=False))


def _value(cell: Any) -> Any:
    """Return a cell's value: numbers without a fraction are whole, as Excel shows them."""
    if isinstance(cell, (datetime.date, datetime.time)):
        return cell.isoformat()
    if isinstance(cell, datetime.timedelta):
        return str(cell)
    if isinstance(cell, float) and cell.is_integer() and abs(cell) < 2**53:
        return int(cell)
    return None if cell == "" else cell
