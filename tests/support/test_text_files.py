"""Text that others wrote, in sentences of ours."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from byeori.errors import ConfigError
from byeori.support import text_files
from byeori.support.text_files import hollow, one_line, read_text, redacted, sentence, visible


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (ValueError("one\n  two\n\tthree"), "one two three"),
        (RuntimeError(), "RuntimeError"),
        (KeyError(""), "''"),
        ("a\r\nb", "a b"),
        ("", ""),
    ],
)
def test_one_line(given: BaseException | str, words: str) -> None:
    assert one_line(given) == words


def test_one_line_is_not_endless() -> None:
    assert one_line("x" * 1000, 200) == "x" * 200


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("\x1b]0;title\x07 red \x1b[31m", "␛]0;title␇ red ␛[31m"),
        ("\x9b31m \x7f \r", "␦31m ␡ ␍"),
        ("abc\u202etxt.exe\u2066", "abc␦txt.exe␦"),  # shown as abcexe.txt by a terminal that knows Hebrew
        ("half \udc80", "half ␦"),
        ("가\t나\n다", "가\t나\n다"),
    ],
)
def test_visible(given: str, words: str) -> None:
    assert visible(given) == words


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("ftp://me:pw@host/x", "ftp://***@host/x"),
        ("copying to FTP://me:p@w:1@host:21/x failed", "copying to FTP://***@host:21/x failed"),
        ("postgresql+psycopg2://me:p/w%40@db.example.org/rows", "postgresql+psycopg2://***@db.example.org/rows"),
        ("https://ghp_abc@github.com/a/b", "https://***@github.com/a/b"),
        ("['s3://k:s@b/x', 'gs://b/y']", "['s3://***@b/x', 'gs://b/y']"),
        ("https://h/x?sig=abc%3D&X-Amz-Signature=00ff&page=2", "https://h/x?sig=***&X-Amz-Signature=***&page=2"),
        ("https://h/x?access_token=abc; try again", "https://h/x?access_token=***; try again"),
        # no passwords
        ("hf://datasets/me/rows@main/a.jsonl", "hf://datasets/me/rows@main/a.jsonl"),
        ("http://localhost:8000/v1/models/a@b", "http://localhost:8000/v1/models/a@b"),
        ("write to me@example.org; see https://example.org/", "write to me@example.org; see https://example.org/"),
    ],
)
def test_redacted(given: str, words: str) -> None:
    assert redacted(given) == words


def test_sentence() -> None:
    error = ValueError("column '\x1b[2J' of\nhttps://me:pw@h/ is missing; " + "x, " * 2000 + "give one of them")
    text = sentence(error)
    assert text.startswith("column '␛[2J' of https://***@h/ is missing; x, x")
    assert text.endswith("x, give one of them") and len(text) < 2000


@pytest.mark.parametrize(
    "text", ["a." * 30_000 + "://", "x://" * 15_000, "x://?" + "token" * 12_000, "x://" + "a:" * 30_000]
)
def test_a_long_address_takes_no_longer_than_it_is(text: str) -> None:
    began = time.process_time()
    redacted(text)
    assert time.process_time() - began < 3


def test_small_files_are_small(tmp_path: Path) -> None:
    """Neither a device without an end nor a file of holes is read into memory."""
    with pytest.raises(ConfigError, match="more than 64 MiB"):
        read_text(Path("/dev/zero"), ConfigError)
    with (tmp_path / "holes").open("wb") as file:
        file.truncate(2**40)
    assert hollow((tmp_path / "holes").stat())
    (tmp_path / "text").write_text("words")
    assert not hollow((tmp_path / "text").stat()) and read_text(tmp_path / "text", ConfigError) == "words"


def test_a_pipe_is_read_once_somebody_writes_into_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--config <(make-settings)` gives one; one that nobody writes into is not waited for without an end."""
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(text_files, "_WAIT", 0.01)
    with pytest.raises(ConfigError, match="is a pipe into which nobody writes"):
        read_text(tmp_path / "pipe", ConfigError)
    monkeypatch.setattr(text_files, "_WAIT", 30.0)
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("a" * 100_000))
    writer.start()
    assert read_text(tmp_path / "pipe", ConfigError) == "a" * 100_000
    writer.join()
