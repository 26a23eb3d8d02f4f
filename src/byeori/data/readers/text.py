"""What the formats of text (jsonl, json, csv, tsv) share: compression, encodings, limits, and rows to Arrow."""

from __future__ import annotations

import bz2
import codecs
import functools
import gzip
import io
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from byeori.data.readers.schema import features_of
from byeori.errors import DataError

if TYPE_CHECKING:  # importing it takes half a second, which `byeori --help` must not
    import pyarrow as pa
    from datasets import Features

Records = Iterator[tuple[int, dict[str, Any]]]
"""(1-based line where the row begins, row), one by one."""

BATCH_ROWS = 1000
_BATCH_CHARACTERS = 1 << 26  # Arrow's text is at most 2 GiB a batch, and a batch is in memory
LONGEST_LINE = 1 << 26
"""Characters of a line of jsonl, or of a value of csv, that are still read."""
_ALWAYS, _RATIO = 1 << 30, 1000  # bytes that a compressed file may hold, and how many times its size beyond that
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
"""What the decompressors raise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRows:
    """The rows of a file.

    features: of every column. batches: the rows as Arrow. left_out: columns that cannot be read, and why.
    notes: sentences for the user, in which {path} stands for the name of the file.
    """

    features: Features
    batches: Iterator[pa.RecordBatch]
    left_out: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def with_compressed(*endings: str) -> tuple[str, ...]:
    """Return the endings, and each once more with those of compressed files."""
    return (*endings, *(ending + packed for ending in endings for packed in COMPRESSED))


def plain_ending(path: Path) -> str:
    """Return the ending of a file without that of its compression: ".csv" of "A.CSV" and of "b.csv.gz"."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes[-2:]) if suffix not in COMPRESSED), "")


def reader(records: Callable[[Path], Records]) -> Callable[[Path], FileRows]:
    """Make a `read` function of a format's `records`, which are gone through twice: for their types, then for rows."""

    def read(path: Path) -> FileRows:
        features = features_of(path, records(path))
        encoding = encoding_of(path)
        notes = () if encoding == "utf-8" else (f"{{path}} is read as {encoding.upper()}",)
        return FileRows(features=features, batches=batches_of(records(path), features), notes=notes)

    return read


def batches_of(records: Records, features: Features) -> Iterator[pa.RecordBatch]:
    """Yield rows as Arrow."""
    import pyarrow as pa

    from byeori.data.json_values import JsonValue, dumps

    json_columns = [name for name, feature in features.items() if isinstance(feature, JsonValue)]
    schema, batch, size = features.arrow_schema, [], 0
    for _, row in records:
        row |= {name: dumps(row[name]) for name in json_columns if row.get(name) is not None}
        size += sum(len(value) for value in row.values() if isinstance(value, str))
        batch.append(row)
        if len(batch) == BATCH_ROWS or size > _BATCH_CHARACTERS:
            yield pa.RecordBatch.from_pylist(batch, schema)
            batch, size = [], 0
    if batch:
        yield pa.RecordBatch.from_pylist(batch, schema)


# ---- files of text -------------------------------------------------------------------------------------------------


def open_text(path: Path, newline: str) -> IO[str]:
    """Open a file of text, plain or compressed, in its encoding; the mark that Excel and Windows put first is dropped.

    Raises:
        DataError: while it is read, if a compressed file holds more than text does.
    """
    encoding = encoding_of(path).replace("utf-8", "utf-8-sig")
    return io.TextIOWrapper(open_bytes(path), encoding=encoding, newline=newline)


def lines_of(path: Path, file: IO[str]) -> Iterator[str]:
    """Yield the lines of a file of text.

    Raises:
        DataError: if one is longer than any text is.
    """
    for number, line in enumerate(iter(functools.partial(file.readline, LONGEST_LINE), ""), start=1):
        if len(line) == LONGEST_LINE:
            raise DataError(
                f"{path} line {number} has more than {LONGEST_LINE:,} characters; write one row a line, and long "
                "documents as several rows."
            )
        yield line


def encoding_of(path: Path) -> str:
    """Return the encoding of a file of text: utf-8, utf-16, utf-16-le, utf-16-be or cp949.

    UTF-8 is also returned for what is none of these; reading it raises UnicodeDecodeError.
    """
    status = path.stat()
    return _encoding(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _encoding(path: Path, size: int, changed_ns: int) -> str:
    with open_bytes(path) as file:
        start = file.read(4096)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    even, odd = start[::2].count(0), start[1::2].count(0)  # half of a letter of ASCII
    for zeros, others, likely in ((odd, even, "utf-16-le"), (even, odd, "utf-16-be")):
        if zeros > 2 * others and _decodes(path, likely):
            return likely
    return "cp949" if not _decodes(path, "utf-8") and _decodes(path, "cp949") else "utf-8"


def _decodes(path: Path, encoding: str) -> bool:
    """Return whether all of a file is text in an encoding; in cp949, most of its letters have to be Hangul as well.

    The bytes of other encodings of East Asia often happen to be characters of cp949, but rarely of Hangul.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    letters = hangul = 0
    with open_bytes(path) as file:
        try:
            while block := file.read(1 << 20):
                text = decoder.decode(block)
                if encoding != "utf-8":
                    if any(character < " " and character not in "\t\n\r\f\v" for character in set(text)):
                        return False
                    letters += sum(character.isalpha() and not character.isascii() for character in text)
                    hangul += sum("가" <= character <= "힣" for character in text)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return encoding != "cp949" or 2 * hangul > letters


def open_bytes(path: Path) -> io.BufferedReader:
    """Open a file, and decompress it."""
    kind = path.suffix.lower()
    if kind not in COMPRESSED:
        return path.open("rb")
    if kind == ".zst":
        import pyarrow as pa

        stream = pa.input_stream(str(path), compression="zstd")
    else:
        opens: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
        stream = opens[kind](path)
    return io.BufferedReader(_Bounded(stream, path), buffer_size=1 << 18)


class _Bounded(io.RawIOBase):
    """A stream that decompresses, up to as many bytes as text of its size can have."""

    def __init__(self, stream: Any, path: Path) -> None:
        self._stream, self._path = stream, path
        self._left = _ALWAYS + _RATIO * path.stat().st_size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise too_large(self._path)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


def check_decoded(path: Path, size: int) -> None:
    """Raise DataError if the content of a compressed file is larger than any text of its size is."""
    if size > _ALWAYS + _RATIO * path.stat().st_size:
        raise too_large(path)


def too_large(path: Path) -> DataError:
    """Return the error for a compressed file that holds more than text does."""
    return DataError(
        f"{path} holds more than {_RATIO} times its size, which text does not; if it is meant, decompress it first."
    )


def check_unique(path: Path | str, columns: list[str]) -> None:
    """Raise DataError if two columns have the same name, or one a name that no table can have."""
    if twice := [name for name, count in Counter(columns).items() if count > 1]:
        raise DataError(f"{path} has the column {twice[0]!r} twice; rename one of them.")
    if nul := [name for name in columns if "\0" in name]:  # where Arrow's schema ends a name
        raise DataError(f"{path} has the column {nul[0]!r}, whose name holds a NUL; rename it.")
