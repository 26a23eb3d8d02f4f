"""The frame of every page: one file, its own script alone, text as text."""

from __future__ import annotations

import re

from byeori.support import pages
from byeori.support.pages import number


def test_the_style_has_both_colour_schemes_small_windows_and_paper() -> None:
    css = pages.asset("support/pages/page.css")
    for rule in ("(prefers-color-scheme: dark)", "(max-width: 720px)", "print"):
        assert f"@media {rule} {{" in css
    assert "word-break: keep-all" in css  # Hangul breaks between words
    assert "url(" not in css and "@import" not in css
    used, made = set(re.findall(r"var\((--[\w-]+)\)", css)), set(re.findall(r"(--[\w-]+):", css))
    assert used <= made and made <= used


def test_numbers_for_reading() -> None:
    assert number(-1234.56, 1) == "\N{MINUS SIGN}1,234.6"
    assert number(0.04, 1, signed=True) == "0.0" and number(-0.04, 1, signed=True) == "0.0"
    assert number(2.25, 1, signed=True) == "+2.2"
    assert {number(value, 1) for value in (None, float("nan"), float("inf"), True, "3", 10**400)} == {"\N{EN DASH}"}
