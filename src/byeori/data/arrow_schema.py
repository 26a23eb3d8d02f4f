"""The type of every column, from the values of all rows."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byeori.errors import DataError

if TYPE_CHECKING:  # importing it takes a second, which `byeori --help` must not
    import pyarrow as pa

_HALF_PAIR = re.compile("[\ud800-\udfff]")  # JSON lets them through, Arrow cannot hold them
_WIDE = "a whole number of more than 53 bits"  # no fraction in Arrow holds it exactly
_KINDS: dict[type, str] = {
    str: "text",
    bool: "true/false",
    int: "a number",
    float: "a fraction",
    list: "a list",
    dict: "an object",
}


def kind_of(value: object) -> str:
    """What a message calls a value that is not null."""
    return _KINDS[type(value)]


def schema_of(path: Path, rows: Iterable[tuple[int, dict[str, Any]]]) -> pa.Schema:
    """The type of every column, from all rows: the first thousand may hold nothing but nulls.

    Raises:
        DataError: no row has a column, or no type holds all values of one.
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

    def arrow(kind: Any) -> pa.DataType:
        if isinstance(kind, dict):
            return pa.struct([(name, arrow(inner)) for name, inner in kind.items()])
        if isinstance(kind, list):
            return pa.list_(arrow(kind[0]))
        scalars = {
            "text": pa.string(),
            "true/false": pa.bool_(),
            "a number": pa.int64(),
            _WIDE: pa.int64(),
            "a fraction": pa.float64(),
        }
        return scalars.get(kind, pa.null())

    return pa.schema([(name, arrow(kind)) for name, kind in columns.items()])


def _merge(known: Any, value: object) -> Any:
    """The kind that holds what was seen before and `value`: None, a name in _KINDS, _WIDE, [kind] or {name: kind}.

    Kinds of objects grow in place: a copy for every row would take the square of the number of their names.
    Raises DataError with the end of the sentence "column x ..." when there is none.
    """
    if value is None:
        return known
    kind = kind_of(value)
    if isinstance(value, dict):
        if known is None or isinstance(known, dict):
            known = {} if known is None else known
            for name, inner in value.items():
                known[name] = _merge(known.get(name), inner)
            return known
    elif isinstance(value, list):
        if known is None or isinstance(known, list):
            return [functools.reduce(_merge, value, known[0] if known else None)]
    else:
        if isinstance(value, str) and not value.isascii() and _HALF_PAIR.search(value):
            raise DataError("holds half of a surrogate pair (\\ud800 to \\udfff), which is no character; remove it")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise DataError("holds a number of more than 64 bits; write it as text")
        if isinstance(value, int) and not -(2**53) <= value <= 2**53:
            kind = _WIDE
        if known in (None, kind):
            return kind
        for pair, joined in ((("a number", "a fraction"), "a fraction"), (("a number", _WIDE), _WIDE)):
            if known in pair and kind in pair:
                return joined
    before = "an object" if isinstance(known, dict) else "a list" if isinstance(known, list) else known
    raise DataError(f"is {kind} here but {before} before; give all its values one type, or leave the column out")
