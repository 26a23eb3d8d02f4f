"""Text from outside: the user's files, which must be UTF-8, and the messages of other libraries' errors.

Also what is left out of text before it is shown or stored: control characters, and passwords in addresses.
"""

from __future__ import annotations

import codecs
import io
import os
import re
import select
import shlex
from pathlib import Path

from byeori.errors import ByeoriError

# Control characters are shown as their pictures, so that a row or a file's name cannot send commands to the terminal;
# tabs and line breaks stay. Those that have no picture share a sign: from U+0080 on, which some terminals obey too, the
# ones that reverse the direction of the text after them, and halves of surrogate pairs, which UTF-8 cannot hold.
_VISIBLE = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
_VISIBLE |= dict.fromkeys(
    [*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)], 0x2426
)
# Every repetition has an end: a hostile address of 60,000 characters would take its square.
_PASSWORD = re.compile(
    r"""([a-z][a-z0-9+.-]{0,30}://)(?:[^/\s'"@:]{0,999}:(?!\d+/)[^\s'"]{0,999}|[^/\s'"@]{0,999})@""", re.IGNORECASE
)
_KEYS = r"[\w-]{0,99}(?:token|password|passwd|pwd|secret|signature|api[_-]?key|access[_-]?key)[\w-]{0,99}|sig|key"
_SECRET = re.compile(rf"""([?&;](?:{_KEYS})=)[^&\s'";]+""", re.IGNORECASE)

_MOST = 64 << 20  # bytes of a small file
_WAIT = 10.0  # seconds that a pipe has to begin


def visible(text: str) -> str:
    """Return a text that a terminal shows and does not obey."""
    return text.translate(_VISIBLE)


def exists(text: str) -> bool:
    """Return whether a text is the path of something that is there; one that is longer than a name may be is none."""
    try:
        return Path(text).exists()
    except OSError:
        return False


def redacted(text: str) -> str:
    """Return a text without the passwords and keys of its URLs: `ftp://me:pw@host/x` -> `ftp://***@host/x`."""
    if "://" not in text:
        return text
    return _SECRET.sub(r"\1***", _PASSWORD.sub(r"\1***@", text))


def sentence(error: BaseException) -> str:
    """Return an error's message for the terminal: on one line, without control characters and passwords.

    Of a very long one, such as that of a list of a thousand names, the middle is left out; the remedy is at the end.
    """
    text = visible(redacted(" ".join(str(error).split())))
    return text if len(text) <= 2000 else f"{text[:1400]} [...] {text[-500:]}"


def read_text(path: Path, error: type[ByeoriError]) -> str:
    """Return the content of a small file, with \\n for every kind of line break.

    Raises:
        OSError: if it cannot be read.
        ByeoriError: of the class `error`, if it is not UTF-8, or not small.
    """
    with open(path, "rb", opener=_without_waiting) as file:
        if path.is_fifo():  # `--config <(make-settings)`
            if not select.select([file], [], [], _WAIT)[0]:
                raise error(f"{path} is a pipe into which nobody writes; give a file.")
            os.set_blocking(file.fileno(), True)
        data = file.read(_MOST + 1)
    if len(data) > _MOST:
        raise error(f"{path} has more than {_MOST >> 20} MiB, too many for such a file; give another one.")
    try:
        return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig").read()
    except UnicodeDecodeError:
        raise error(not_utf8(path, io.BytesIO(data))) from None


def _without_waiting(path: str, flags: int) -> int:
    """Open, also a pipe that nobody writes into, which would be waited for without an end."""
    return os.open(path, flags | os.O_NONBLOCK)


def hollow(status: os.stat_result) -> bool:
    """Return whether nearly nothing of a large file was ever written: a copy that was cut off, or a trap."""
    return status.st_size > _MOST and status.st_blocks * 512 * 1000 < status.st_size


def not_utf8(path: Path, lines: io.BufferedIOBase) -> str:
    """Say in which line a file stops being UTF-8, and with which command to convert it. lines: its content."""
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
    iconv = f"iconv -f {encoding} -t utf-8"
    zipped = path.suffix.lower() == ".gz"
    command = f"zcat {shlex.quote(source)} | {iconv}" if zipped else f"{iconv} {shlex.quote(source)}"
    command += f" > {shlex.quote(target)}"
    return f"{path} line {number} is not UTF-8, it looks like {encoding}; convert the file: {command}"


def _guess_encoding(sample: bytes) -> str | None:
    """Return utf-16 or cp949 (which contains euc-kr) for bytes that are not UTF-8, None if they are neither."""
    if sample.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    try:
        text = codecs.getincrementaldecoder("cp949")().decode(sample)  # the sample may end within a character
    except UnicodeDecodeError:
        return None
    return None if re.search(r"[\x00-\x08\x0e-\x1f]", text) else "cp949"


def one_line(error: BaseException | str, most: int = 300) -> str:
    """Return a text or an error's message (its class if it has none) on one line, cut to `most` characters."""
    text = visible(" ".join(str(error).split()))[:most]
    return text or (type(error).__name__ if isinstance(error, BaseException) else "")
