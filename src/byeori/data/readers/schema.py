"""The type of every column of a text file, from the values of all its rows."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byeori.errors import DataError

if TYPE_CHECKING:  # importing it takes a tenth of a second, which `byeori --help` must not
    import pyarrow as pa

_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON lets one half of a pair through, Arrow cannot hold it
_WIDE = "a whole number of more than 53 bits"  # no float64 holds it exactly
_NAMES: dict[type, str] = {
    str: "text",
    bool: "true/false",
    int: "a number",
    float: "a fraction",
    list: "a list",
    dict: "an object",
}


def type_name(value: object) -> str:
    """Return what a message calls the type of a value that is not null."""
    return _NAMES[type(value)]


def schema_of(path: Path, rows: Iterable[tuple[int, dict[str, Any]]]) -> pa.Schema:
    """Find the type of every column from all rows: the first thousand may hold nothing but nulls.

    Raises:
        DataError: if no row has a column, or no type holds all values of one.
    """
    import pyarrow as pa

    columns: dict[str, Any] = {}
    for line, row in rows:
        for name, value in row.items():
            try:
                columns[name] = _merge(columns.get(name), value)
            except DataError as error:
                raise DataError(f"{path} line {line}: column {name!r} {error}.") from None
    if not columns:
        raise DataError(f"{path} has no rows; give a file with at least one row that has a column.")
    scalars = {
        "text": pa.string(),
        "true/false": pa.bool_(),
        "a number": pa.int64(),
        _WIDE: pa.int64(),
        "a fraction": pa.float64(),
    }

    def arrow(kind: Any) -> pa.DataType:
        if isinstance(kind, dict):
            return pa.struct([(name, arrow(inner)) for name, inner in kind.items()])
        return pa.list_(arrow(kind[0])) if isinstance(kind, list) else scalars.get(kind, pa.null())

    return pa.schema([(name, arrow(kind)) for name, kind in columns.items()])


def _merge(known: Any, value: object) -> Any:
    """Return the type that holds both earlier values and this one: None, a name, [type of items] or {name: type}.

    The types of an object's fields are added in place: a copy for every row would take time quadratic in their number.

    Raises:
        DataError: with the end of the sentence "column x ...", if there is no such type.
    """
    if value is None:
        return known
    if isinstance(value, dict) and (known is None or isinstance(known, dict)):
        fields = {} if known is None else known
        for name, inner in value.items():
            fields[name] = _merge(fields.get(name), inner)
        return fields
    if isinstance(value, list) and (known is None or isinstance(known, list)):
        return [functools.reduce(_merge, value, known[0] if known else None)]
    kind = type_name(value)
    if isinstance(value, str) and not value.isascii() and _SURROGATE.search(value):
        raise DataError("holds half of a surrogate pair (\\ud800 to \\udfff), which is not a character; remove it")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise DataError("holds a number of more than 64 bits; write it as text")
    if isinstance(value, int) and not -(2**53) <= value <= 2**53:
        kind = _WIDE
    if not isinstance(value, (dict, list)):
        if known in (None, kind):
            return kind
        for pair, joined in ((("a number", "a fraction"), "a fraction"), (("a number", _WIDE), _WIDE)):
            if known in pair and kind in pair:
                return joined
    before = type_name(known) if isinstance(known, (dict, list)) else known
    raise DataError(f"is {kind} here but {before} before; give all its values one type, or leave the column out")
