"""Text that others wrote: the user's files, in UTF-8 or else a sentence that says how to, and foreign errors."""

from __future__ import annotations

import codecs
import io
import re
import shlex
from pathlib import Path

from byeori.errors import ByeoriError


def read_text(path: Path, error: type[ByeoriError]) -> str:
    """What a small file holds, with \\n for every kind of line break. error: what is raised where it is not UTF-8.

    Raises:
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    try:
        return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig").read()
    except UnicodeDecodeError:
        raise error(not_utf8(path, io.BytesIO(data))) from None


def not_utf8(path: Path, lines: io.BufferedIOBase) -> str:
    """Where a file stops being UTF-8, what it looks like, and the command that converts it. lines: what it holds."""
    packed = path.suffix.lower() == ".gz"
    number, line, more = 0, b"", b""
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


def one_line(error: BaseException | str, most: int = 300) -> str:
    """A text, or an error's words (its kind where it has none), on one line, of at most so many characters."""
    words = " ".join(str(error).split())[:most]
    return words or (type(error).__name__ if isinstance(error, BaseException) else "")
