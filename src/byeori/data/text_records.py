"""Rows of one text file, jsonl, json, csv or tsv, in constant memory, and the sentence for what is wrong with them."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from byeori.data.arrow_schema import kind_of
from byeori.errors import DataError
from byeori.support.text_files import one_line

TEXT_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_SPACE = re.compile(r"[ \t\r\n]+")
# NaN is what pandas has for a missing value, and what json.dumps writes for it.
_DECODER = json.JSONDecoder(parse_constant={"NaN": None, "Infinity": math.inf, "-Infinity": -math.inf}.__getitem__)
_SEPARATOR = re.compile(r'"?sep=(.)"?\s*')  # Excel's first line


def ending(path: Path) -> str:
    """The last suffix in lower case, the last two with gzip (".csv" of "A.CSV", ".csv.gz" of "b.csv.gz")."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return "".join(suffixes[-2:] if suffixes[-1:] == [".gz"] else suffixes[-1:])


def records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(1-based line where it begins, row) for every row of a text file, in constant memory."""
    kind = ending(path).removesuffix(".gz")
    if kind in (".csv", ".tsv"):
        return _csv_records(path, "," if kind == ".csv" else "\t")
    return _json_records(path) if kind == ".json" and not _holds_json_lines(path) else _json_lines(path)


def _csv_records(path: Path, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses documents over 128 KiB
    names: list[str] = []
    with open_text(path, newline="") as file:
        first = next(file, "")
        told = _SEPARATOR.fullmatch(first)
        line = 2 if told else 1
        # strict: otherwise a quote that is never closed swallows the rest of the file as one value
        reader = csv.reader(
            file if told else itertools.chain([first], file), delimiter=told[1] if told else delimiter, strict=True
        )
        try:
            for fields in reader:
                if fields and not names:
                    # pandas writes its index under an empty name and reads it back under this one
                    names = [name.strip() or f"Unnamed: {place}" for place, name in enumerate(fields)]
                    check_names(path, names)
                    _check_delimiter(path, names, reader.dialect.delimiter)
                elif fields and len(fields) != len(names):
                    raise DataError(
                        f"{path} line {line} does not fit the header: {len(fields)} instead of {len(names)} "
                        "fields; put a value with a separator or a line break in it in double quotes."
                    )
                elif fields:
                    yield line, dict(zip(names, fields, strict=True))
                line = reader.line_num + (2 if told else 1)
        except csv.Error as error:
            remedy = "close every double quote, and write one inside a quoted value as two"
            raise DataError(f"{path} line {line}: {one_line(error)}; {remedy}.") from None


def _check_delimiter(path: Path, names: list[str], delimiter: str) -> None:
    """See whether the only column is not several, which something else separates.

    Raises:
        DataError: it looks so.
    """
    others = [other for other in (";", "\t", ",", "|") if other != delimiter and other in names[0]]
    if len(names) == 1 and others:
        raise DataError(
            f"{path} has one column, {names[0]!r}, which looks like several with {others[0]!r} between them; put "
            f"{delimiter!r} there, or write sep={others[0]} as the first line of the file."
        )


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open_text(path, newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = _DECODER.decode(line)
            except (ValueError, RecursionError) as error:
                rule = "a line must be one object, a file that is one list must end in .json"
                raise DataError(f"{path} line {number} is not valid JSON ({one_line(error)}); {rule}.") from None
            yield number, _object(path, number, value)


def _object(path: Path, line: int, value: object) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    kind = "null" if value is None else kind_of(value)
    raise DataError(f'{path} line {line} is {kind}, not an object; write every row as {{"column": value, ...}}.')


def _holds_json_lines(path: Path) -> bool:
    """Whether a .json file is in fact jsonl: its first line is a whole object, and another line follows."""
    with open_text(path, newline="\n") as lines:
        try:
            first = _DECODER.decode(lines.readline(1 << 24))
        except (ValueError, RecursionError):
            return False
        return isinstance(first, dict) and any(line.strip() for line in lines)


def _json_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a list of objects, or of an object with one list, without holding the list; or objects that are rows."""
    with open_text(path, newline="\n") as file:
        window = _Window(path, file)
        if window.next_is("["):
            yield from window.items()
        elif window.next_is("{"):
            yield from _json_object(window)
        else:
            raise DataError(f"{path} is neither a list of objects nor an object with one list; write it as one.")
        if window.peek():
            remedy = "remove what follows, or write one object a line in a file that ends in .jsonl"
            raise DataError(f"{path} line {window.line} goes on after the end of the JSON; {remedy}.")


def _json_object(window: _Window) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of an object whose "{" has been read: those of its list; without one it is a row, as are those behind it."""
    line, row, lists = window.line, {}, []
    while not window.next_is("}"):
        name = str(window.value())
        window.expect(":")
        if window.next_is("["):
            lists.append(name)
            yield from window.items()
        else:
            row[name] = window.value()
        if not window.next_is(","):
            window.expect("}")
            break
    if len(lists) > 1:
        found = ", ".join(lists)
        raise DataError(f"{window.path} is an object with the lists {found}; give a list of rows, or one list in it.")
    if not lists:
        yield line, row
        while window.peek() == "{":
            line = window.line
            yield line, window.value()


class _Window:
    """The part of a JSON file that is being read, and the line it has come to."""

    def __init__(self, path: Path, file: IO[str]) -> None:
        self.path, self.file, self.text, self.start, self.line = path, file, "", 0, 1

    def fill(self) -> bool:
        # at least doubled, so that one long value is not scanned again for every chunk of it
        more = self.file.read(max(1 << 20, len(self.text) - self.start))
        if more:
            self.text, self.start = self.text[self.start :] + more, 0
        return bool(more)

    def spaces(self, start: int) -> int:
        """Where the spaces from `start` on end."""
        found = _SPACE.match(self.text, start)
        return found.end() if found else start

    def advance(self, end: int) -> None:
        self.line += self.text.count("\n", self.start, end)
        self.start = end

    def peek(self) -> str:
        """The next character that is not a space, "" at the end of the file."""
        while True:
            self.advance(self.spaces(self.start))
            if self.start < len(self.text) or not self.fill():
                return self.text[self.start : self.start + 1]

    def next_is(self, character: str) -> bool:
        found = self.peek() == character
        self.start += found
        return found

    def expect(self, character: str) -> None:
        if not self.next_is(character):
            raise self.broken(f"expecting {character!r}")

    def broken(self, problem: str) -> DataError:
        return DataError(f"{self.path} line {self.line} is not valid JSON ({problem}); correct it there.")

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.start)
            except json.JSONDecodeError as error:
                # near the end of the window, or in a string without an end, more may be to come
                cut = self.spaces(error.pos + 1) > len(self.text) - 16 or error.msg.startswith("Unterminated")
                if cut and self.fill():
                    continue
                self.advance(error.pos)
                raise self.broken(error.msg) from None
            except (ValueError, RecursionError) as error:
                raise self.broken(one_line(error)) from None
            if end < len(self.text) or not self.fill():  # a number at the very end may go on
                self.advance(end)
                return value

    def items(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The objects of a list whose "[" has been read, up to and with its "]"."""
        while not self.next_is("]"):
            self.peek()
            line = self.line
            yield line, _object(self.path, line, self.value())
            if not self.next_is(","):
                self.expect("]")
                return


def open_text(path: Path, newline: str) -> IO[str]:
    """The text of a file, plain or gzip; utf-8-sig takes away the mark that Excel and Windows put first."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline=newline)
    return path.open(encoding="utf-8-sig", newline=newline)


def check_names(path: Path | str, names: list[str]) -> None:
    """See whether all columns have names of their own.

    Raises:
        DataError: two have the same.
    """
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{path} has the column {twice[0]!r} twice; rename one of them.")
