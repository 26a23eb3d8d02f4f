"""The type of every column of a file of text: text, true/false, a number, a fraction, or JSON for everything else.

Lists, objects and columns of mixed types are stored as JSON and read back as they were (data/json_values.py): Arrow's
own lists and objects have one type each and would fill objects up with each other's keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byeori.errors import DataError

if TYPE_CHECKING:  # importing it takes half a second, which `byeori --help` must not
    from datasets import Features

_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON lets one half of a pair through, Arrow's text cannot hold it
_INT, _WIDE, _FLOAT, _JSON = "a number", "a whole number of more than 53 bits", "a fraction", "JSON"
_TYPES = {"text": "string", "true/false": "bool", _INT: "int64", _WIDE: "int64", _FLOAT: "float64", None: "null"}
_NAMES: dict[type, str] = {
    str: "text",
    bool: "true/false",
    int: _INT,
    float: _FLOAT,
    list: "a list",
    dict: "an object",
}


def type_name(value: object) -> str:
    """Return what a message calls the type of a value that is not null."""
    return _NAMES[type(value)]


def features_of(path: Path, rows: Iterable[tuple[int, dict[str, Any]]]) -> Features:
    """Find the type of every column from all rows: the first thousand may hold nothing but nulls.

    Raises:
        DataError: if no row has a column.
    """
    from datasets import Features, Value

    from byeori.data.json_values import JsonValue

    columns: dict[str, str | None] = {}
    for _, row in rows:
        for name, value in row.items():
            known = columns.setdefault(name, None)
            if value is not None and known != _JSON:
                kind = _kind(value)
                columns[name] = kind if known in (None, kind) else _joined(known, kind)
    if not columns:
        raise DataError(f"{path} has no rows; give a file with at least one row that has a column.")
    types = {name: JsonValue() if kind == _JSON else Value(_TYPES[kind]) for name, kind in columns.items()}
    return Features(types)


def _kind(value: object) -> str:
    """Return the kind of column that can hold a value which is not null."""
    if isinstance(value, str):
        return _JSON if not value.isascii() and _SURROGATE.search(value) else "text"
    if isinstance(value, bool):
        return "true/false"
    if isinstance(value, float):
        return _FLOAT
    if isinstance(value, int):
        # no float64 holds a wide one exactly, so that it cannot stand in one column with fractions
        return _INT if -(2**53) <= value <= 2**53 else _WIDE if -(2**63) <= value < 2**63 else _JSON
    return _JSON


def _joined(known: str | None, kind: str) -> str:
    """Return the kind of column that holds two kinds of values."""
    pair = {known, kind}
    return _FLOAT if pair == {_INT, _FLOAT} else _WIDE if pair == {_INT, _WIDE} else _JSON
