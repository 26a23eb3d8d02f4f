"""Web pages in one dress: the style sheet and the frame that every page of byeori shares.

    template (jinja2), values, script ── render ──> one HTML string, in the language of the user

A page is one file: no network, no fonts, no libraries. Text from data and models is autoescaped, and should an escape
ever be missed, a content security policy lets the browser run only the script with the page's hash. `page.css` has the
colours, type and parts of all pages; a template extends `support/pages/base.html.j2`, and says `t("...")` for words.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
import unicodedata
from functools import cache
from importlib.resources import files
from numbers import Real
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape

from byeori.support import language

_MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"


def render(template: str, *, script: str = "", **values: Any) -> str:
    """Return a page as one HTML string, to be written as UTF-8. Values that are None are shown as a dash.

    template, script: files of the package, such as "evaluate/report.html.j2"; the page may run this script alone.
    """
    code = asset(script) if script else ""
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    return (
        _environment()
        .get_template(template)
        .render(
            **values,
            lang=language.chosen(),
            css=Markup(asset("support/pages/page.css")),
            script=Markup(code),
            script_source=f"'sha256-{digest}'" if code else "'none'",
        )
    )


@cache
def asset(name: str) -> str:
    """Return a text file of the package: a style sheet, a script or a template."""
    return files("byeori").joinpath(*name.split("/")).read_text(encoding="utf-8")


def number(value: object, digits: int, *, signed: bool = False) -> str:
    """Return a number for reading, with a true minus sign; a dash if it is not a finite number."""
    found = finite(value)
    if found is None:
        return DASH
    rounded = round(found, digits) + 0.0  # + 0.0 turns -0.0 into 0.0
    return f"{rounded:{'+' if signed and rounded else ''},.{digits}f}".replace("-", _MINUS)


def finite(value: object) -> float | None:
    """Return a finite number as a float, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number of 400 digits
        return None


def safe_text(value: object) -> str:
    """Return text that UTF-8 and HTML can hold: lone surrogates and control characters become U+FFFD."""
    if isinstance(value, Markup):  # the page's own
        return value
    if value is None:
        return DASH
    if isinstance(value, (list, tuple)):
        value = ", ".join(str(part) for part in value)
    return re.sub(r"[\ud800-\udfff\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", str(value))


def is_longer(segments: list[tuple[str, bool]], lines: int, columns: int) -> bool:
    """Whether a text fills more lines of so many columns."""
    text = "".join(part for part, _ in segments)
    widths = map(width, text.split("\n"))
    return sum(max(1, -(-count // columns)) for count in widths) > lines


def width(text: str) -> int:
    """Return the columns that a line takes; wide characters (Hangul, Hanzi, kana) take two."""
    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)


def _words(message: str, **values: Any) -> Markup:
    """Return a message in the language of the user; values are escaped unless they are markup of the page."""
    safe = {name: value if isinstance(value, int) else escape(safe_text(value)) for name, value in values.items()}
    return Markup(language.tr(message, **safe))


@cache
def _environment() -> Environment:
    environment = Environment(
        autoescape=True,
        finalize=safe_text,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(asset),
    )
    environment.filters |= {"is_longer": is_longer, "number": number}
    environment.globals["t"] = _words
    return environment
