"""JSON: a list of rows, an object with one list of rows or of columns, objects that are rows, JSON Lines named .json.

The text is held in memory as a whole, its rows one at a time: the standard parser knows no line of a row.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from byeori.data.chat_columns import COLUMNS
from byeori.data.readers import jsonl
from byeori.data.readers.text import COMPRESSED, Records, lines_of, open_text, reader, too_large, with_compressed
from byeori.errors import DataError
from byeori.support.text_files import one_line

ENDINGS = with_compressed(".json")
_SPACE = re.compile(r"[ \t\r\n]*")
_ROWS = re.compile(r"[ \t\r\n]*\[[ \t\r\n]*[{\]]")
_TURNS = re.compile(r'[ \t\r\n]*\[[ \t\r\n]*(\]|\{[ \t\r\n]*"(role|from|content|value|type|name)")')
_VALUES = {*COLUMNS, "prompt", "completion", "chosen", "rejected", "tools"}  # lists of objects that are no rows
_MOST = 1 << 29  # characters of a compressed file: they are in memory at once


def records(path: Path) -> Records:
    """Yield the rows of a file.

    Raises:
        DataError: if it is not JSON, or holds no rows, two lists of them, or columns that differ in length.
    """
    if _is_json_lines(path):
        yield from jsonl.records(path)
        return
    with open_text(path, newline="\n") as file:
        text = _Text(path, file.read() if path.suffix.lower() not in COMPRESSED else file.read(_MOST))
        if file.read(1):
            raise too_large(path)
    if text.skip("["):
        yield from text.items()
    elif text.skip("{"):
        yield from _object(text)
    else:
        raise DataError(f"{path} is neither a list of objects nor an object with one list; write it as one.")
    if text.next():
        fix = "remove what follows, or write one object per line and name the file .jsonl"
        raise DataError(f"{path} line {text.line()} goes on after the end of the JSON; {fix}.")


read = reader(records)


def _is_json_lines(path: Path) -> bool:
    """Return whether a file's first line is a whole object and another line follows."""
    with open_text(path, newline="\n") as file:
        try:
            first = jsonl.DECODER.decode(file.readline(1 << 24))
        except (ValueError, RecursionError):
            return False
        return isinstance(first, dict) and any(line.strip() for line in lines_of(path, file))


def _object(text: _Text) -> Records:
    """Yield the rows of an object: those of its list, or of its columns; else it is a row itself, as those after it."""
    line, row, lists = text.line(), {}, []
    while not text.skip("}"):
        name = str(text.value())
        text.expect(":")
        if _ROWS.match(text.text, text.at) and not (name in _VALUES and _TURNS.match(text.text, text.at)):
            text.expect("[")
            lists.append(name)
            yield from text.items()
        else:
            row[name] = text.value()
        if not text.skip(","):
            text.expect("}")
            break
    if len(lists) > 1:
        raise DataError(
            f"{text.path} is an object with the lists {', '.join(lists)}; give a list of rows, or one list in it."
        )
    if not lists and (columns := _columns(text.path, row)):
        yield from ((line, dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True))
    elif not lists:
        yield line, row
        while text.next() == "{":
            yield text.line(), text.value()


def _columns(path: Path, value: dict[str, Any]) -> dict[str, list[Any]] | None:
    """Return an object of columns as lists; None for an object that is a row.

    pandas writes a table as lists (`orient="list"`), as objects with the row's number as key (its default), or with
    the names apart from the values (`split`).
    """
    if {"columns", "data"} <= set(value) <= {"columns", "index", "data"}:
        return dict(zip(value["columns"], map(list, zip(*value["data"], strict=True)), strict=True))
    columns = list(value.values())
    numbered = [list(column) for column in columns if isinstance(column, dict) and "0" in column]
    if columns and len(numbered) == len(columns) and all(keys == numbered[0] for keys in numbered):
        return {name: list(column.values()) for name, column in value.items()} if _digits(numbered[0]) else None
    turns = any(name in _VALUES and isinstance(column[0], dict) for name, column in value.items() if column)
    if not columns or turns or not all(isinstance(column, list) for column in columns):
        return None
    if len({len(column) for column in columns}) > 1:
        sizes = ", ".join(f"{name} has {len(column):,}" for name, column in value.items())
        raise DataError(f"{path} is an object of columns with different numbers of values: {sizes}; correct them.")
    return value


def _digits(keys: list[str]) -> bool:
    return all(key.isdigit() for key in keys)


class _Text:
    """The text of a file, and how far it has been read."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text, self.at = path, text, 0
        self._counted, self._line = 0, 1

    def line(self) -> int:
        """The 1-based line of the position; positions only grow, so that every line break is counted once."""
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def next(self) -> str:
        """Go to the next character that is not a space, and return it; "" at the end."""
        self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]  # it matches nothing, too
        return self.text[self.at : self.at + 1]

    def skip(self, character: str) -> bool:
        """Go past a character if it comes next."""
        found = self.next() == character
        self.at += found
        return found

    def expect(self, character: str) -> None:
        if not self.skip(character):
            raise self.invalid(f"Expecting {character!r}")

    def invalid(self, problem: str) -> DataError:
        return DataError(f"{self.path} line {self.line()} is not valid JSON ({problem}); correct it there.")

    def value(self) -> Any:
        """Decode the value that comes next and go past it."""
        self.next()
        try:
            value, self.at = jsonl.DECODER.raw_decode(self.text, self.at)
        except json.JSONDecodeError as error:
            self.at = error.pos
            raise self.invalid(error.msg) from None
        except (ValueError, RecursionError) as error:
            raise self.invalid(one_line(error)) from None
        return value

    def items(self) -> Records:
        """The rows of a list whose "[" has been read, up to and with its "]"."""
        while not self.skip("]"):
            self.next()
            line = self.line()
            yield line, jsonl.as_row(self.path, line, self.value())
            if not self.skip(","):
                self.expect("]")
                return
