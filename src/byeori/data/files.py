"""One local file -> rows: jsonl, json, csv, tsv, parquet or Arrow, streamed into an Arrow file in datasets' cache."""

from __future__ import annotations

import codecs
import csv
import functools
import gzip
import hashlib
import json
import re
import shlex
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from byeori.errors import DataError

if TYPE_CHECKING:  # importing them takes a second, which `byeori --help` must not
    import pyarrow as pa
    from datasets import Dataset

_TEXT_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
ENDINGS = (*_TEXT_ENDINGS, *(ending + ".gz" for ending in _TEXT_ENDINGS), ".parquet", ".arrow")
_HALF_PAIR = re.compile("[\ud800-\udfff]")  # json.loads lets them through, Arrow cannot hold them
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()
_BATCH = 1000
_CACHE_VERSION = b"1"  # to be raised when the same file is read into other rows than before
_KINDS: dict[type, str] = {str: "text", bool: "true/false", int: "a number", float: "a fraction"}


def ending(path: Path) -> str:
    """The last suffix in lower case, the last two with gzip (".csv" of "A.CSV", ".csv.gz" of "b.csv.gz")."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return "".join(suffixes[-2:] if suffixes[-1:] == [".gz"] else suffixes[-1:])


def load_file(path: Path) -> Dataset:
    import datasets

    if ending(path) not in ENDINGS:
        raise DataError(f"{path} has an ending that is not known; known endings are {', '.join(ENDINGS)}.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; give a file with at least one row.")
    with reading(path):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        digest.update(ending(path).encode() + _CACHE_VERSION)
        cached = Path(datasets.config.HF_DATASETS_CACHE) / "byeori" / f"{digest.hexdigest()}.arrow"
        if not cached.exists():
            _write(path, cached)
        return datasets.Dataset.from_file(str(cached))


def _write(path: Path, cached: Path) -> None:
    """Write the rows of `path` as an Arrow stream; processes that do so at once each rename a whole file."""
    import datasets
    import pyarrow as pa

    schema, batches = _batches(path)
    datasets.Features.from_arrow_schema(schema)  # raises ValueError for types that datasets does not know
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent) as folder:
        written = Path(folder, cached.name)
        with pa.OSFile(str(written), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        written.replace(cached)


def _batches(path: Path) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """The schema of a file's rows, and the rows a batch at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if ending(path) == ".parquet":
        file = pq.ParquetFile(path)
        schema, batches = file.schema_arrow, file.iter_batches(_BATCH)
    elif ending(path) == ".arrow":
        try:
            reader = pa.ipc.open_stream(pa.memory_map(str(path)))
            schema, batches = reader.schema, iter(reader)
        except pa.ArrowInvalid:
            whole = pa.ipc.open_file(pa.memory_map(str(path)))
            schema, batches = whole.schema, map(whole.get_batch, range(whole.num_record_batches))
    else:
        schema = _schema(path)
        return schema, _text_batches(path, schema)
    # pandas' categories are dictionaries in Arrow, which datasets does not know
    plain = [f.with_type(f.type.value_type) if pa.types.is_dictionary(f.type) else f for f in schema]
    schema = pa.schema(plain, schema.metadata)
    return schema, (batch.cast(schema) for batch in batches)


def _text_batches(path: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    rows: list[dict[str, Any]] = []
    for _, row in _records(path):
        rows.append(row)
        if len(rows) == _BATCH:
            yield pa.RecordBatch.from_pylist(rows, schema)
            rows = []
    if rows:
        yield pa.RecordBatch.from_pylist(rows, schema)


def _schema(path: Path) -> pa.Schema:
    """The type of every column, from all rows: the first thousand may hold nothing but nulls."""
    import pyarrow as pa

    columns: dict[str, Any] = {}
    for line, row in _records(path):
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
            "a fraction": pa.float64(),
        }
        return scalars.get(kind, pa.null())

    return pa.schema([(name, arrow(kind)) for name, kind in columns.items()])


def _merge(known: Any, value: object) -> Any:
    """The kind that holds what was seen before and `value`: None, a name in _KINDS, [kind] or {name: kind}.

    Raises DataError with the end of the sentence "column x ..." when there is none.
    """
    if value is None:
        return known
    if isinstance(value, dict):
        if known is None or isinstance(known, dict):
            return (known or {}) | {name: _merge((known or {}).get(name), inner) for name, inner in value.items()}
        kind = "an object"
    elif isinstance(value, list):
        if known is None or isinstance(known, list):
            return [functools.reduce(_merge, value, known[0] if known else None)]
        kind = "a list"
    else:
        kind = _KINDS[type(value)]
        if isinstance(value, str) and not value.isascii() and _HALF_PAIR.search(value):
            raise DataError("holds half of a surrogate pair (\\ud800 to \\udfff), which is no character; remove it")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise DataError("holds a number of more than 64 bits; write it as text")
        if known in (None, kind):
            return kind
        if (known, kind) in (("a number", "a fraction"), ("a fraction", "a number")):
            return "a fraction"
    before = "an object" if isinstance(known, dict) else "a list" if isinstance(known, list) else known
    raise DataError(f"is {kind} here but {before} in an earlier row; give all rows one type")


# --- text files: records, and the sentence for what is wrong with them ----------------------------


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(1-based line where it begins, row) for every row of a text file, in constant memory."""
    kind = ending(path).removesuffix(".gz")
    if kind in (".csv", ".tsv"):
        return _csv_records(path, "," if kind == ".csv" else "\t")
    return _json_records(path) if kind == ".json" and not _holds_json_lines(path) else _json_lines(path)


def _csv_records(path: Path, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses documents over 128 KiB
    names: list[str] = []
    line = 1
    with open_text(path, newline="") as file:
        # strict: otherwise a quote that is never closed swallows the rest of the file as one value
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            for fields in reader:
                if fields and not names:
                    # pandas writes its index under an empty name and reads it back under this one
                    names = [name or f"Unnamed: {place}" for place, name in enumerate(fields)]
                    if twice := [name for name in names if names.count(name) > 1]:
                        raise DataError(f"{path} has the column {twice[0]!r} twice; rename one of them.")
                elif fields and len(fields) != len(names):
                    raise DataError(
                        f"{path} line {line} does not fit the header: {len(fields)} instead of {len(names)} "
                        "fields; put a value with a separator or a line break in it in double quotes."
                    )
                elif fields:
                    yield line, dict(zip(names, fields, strict=True))
                line = reader.line_num + 1
        except csv.Error as error:
            remedy = "close every double quote, and write one inside a quoted value as two"
            raise DataError(f"{path} line {line}: {one_line(error)}; {remedy}.") from None


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open_text(path, newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                rule = "a line must be one object, a file that is one list must end in .json"
                raise DataError(f"{path} line {number} is not valid JSON ({one_line(error)}); {rule}.") from None
            yield number, _object(path, number, value)


def _object(path: Path, line: int, value: object) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    kind = "a list" if isinstance(value, list) else "null" if value is None else _KINDS[type(value)]
    raise DataError(f'{path} line {line} is {kind}, not an object; write every row as {{"column": value, ...}}.')


def _holds_json_lines(path: Path) -> bool:
    """Whether a .json file is in fact jsonl: its first line is a whole object, and another line follows."""
    with open_text(path, newline="\n") as lines:
        try:
            first = json.loads(lines.readline(1 << 24))
        except (ValueError, RecursionError):
            return False
        return isinstance(first, dict) and any(line.strip() for line in lines)


def _json_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a list of objects, or of an object with one list, without holding the list."""
    with open_text(path, newline="\n") as file:
        window = _Window(path, file)
        if window.next_is("["):
            yield from window.items()
        elif window.next_is("{"):
            lists: list[str] = []
            while not window.next_is("}"):
                name = str(window.value())
                window.expect(":")
                if window.next_is("["):
                    lists.append(name)
                    yield from window.items()
                else:
                    window.value()
                if not window.next_is(","):
                    window.expect("}")
                    break
            if len(lists) != 1:
                found = "the lists " + ", ".join(lists) if lists else "no list"
                raise DataError(f"{path} is an object with {found}; give a list of rows, or an object with one list.")
        else:
            raise DataError(f"{path} is neither a list of objects nor an object with one list; write it as one.")
        if window.peek():
            raise DataError(f"{path} line {window.line} goes on after the end of the JSON; remove what follows.")


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
        return _SPACE.match(self.text, start).end()  # type: ignore[union-attr]  # it also matches ""

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


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into one sentence."""
    import pyarrow as pa

    try:
        yield
    except UnicodeDecodeError:
        raise DataError(_not_utf8(path)) from None
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise DataError(f"{path} is not a whole gzip file; copy or compress it again.") from None
    except (ValueError, OverflowError, pa.ArrowException) as error:
        kind = path.suffix.lower().removeprefix(".") or "datasets folder"
        raise DataError(f"{path} is damaged or not {kind} ({one_line(error)}); write it again.") from None
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise DataError(f"{path} cannot be read or copied to datasets' cache: {reason}; check both.") from None


def _not_utf8(path: Path) -> str:
    """Where a file stops being UTF-8, what it looks like, and the command that converts it."""
    packed = path.suffix.lower() == ".gz"
    number, line, more = 0, b"", b""
    with gzip.open(path) if packed else path.open("rb") as lines:
        for line in lines:
            number += 1
            try:
                line.decode()
            except UnicodeDecodeError:
                more = lines.read(1 << 16)
                break
    encoding = _guess_encoding(line + more)
    if encoding is None:
        return f"{path} line {number} is not text (UTF-8, cp949 or UTF-16); save the file as UTF-8 text."
    source, target = str(path), str(path.with_name("utf8-" + path.name.removesuffix(".gz")))
    pipe, given = (f"zcat {shlex.quote(source)} | ", "") if packed else ("", f"{shlex.quote(source)} ")
    command = f"{pipe}iconv -f {encoding} -t utf-8 {given}> {shlex.quote(target)}"
    return f"{path} line {number} is not UTF-8, it looks like {encoding}; convert the file: {command}"


def _guess_encoding(sample: bytes) -> str | None:
    """utf-16 or cp949 (which contains euc-kr) for bytes that are not UTF-8, None if they are neither."""
    if sample.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    try:
        text = codecs.getincrementaldecoder("cp949")().decode(sample)  # the sample may end within a character
    except UnicodeDecodeError:
        return None
    return None if re.search(r"[\x00-\x08\x0e-\x1f]", text) else "cp949"
