"""Text that others wrote, in sentences of ours."""

from __future__ import annotations

import pytest

from byeori.support.text_files import one_line


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
