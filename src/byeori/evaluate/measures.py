"""Measures of one's own: `--metric label tool_call my_module:score 'regex:^\\d+$'` -> functions of a row.

    spec ── parse ──> Measures ── score(row, reference, answer) ──> a number for each row
                               ── over_all(references, answers) ──> one number, as the mean of values for the rows

A measure is a number that is better when it is higher; true and false are 100 and 0, so that a mean is a percentage.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from byeori.errors import ConfigError, DataError
from byeori.evaluate import labels, structured
from byeori.evaluate.korean import rouge_l_morphemes
from byeori.support.suggestions import nearest
from byeori.support.text_files import one_line

Score = Callable[[Mapping[str, Any], str, str], Any]

_NUMBER = re.compile(r"[-+\N{MINUS SIGN}]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """name: in metrics.json and in conditions. heading, about: for people. digits: after the point.

    score: of one row, a number, true or false, None where it does not apply; None for a measure of all rows.
    over_all: references and answers -> [rows], values whose mean is the measure of all rows.
    """

    name: str
    heading: str
    about: str
    digits: int = 1
    score: Score | None = None
    over_all: Callable[[Sequence[str], Sequence[str]], np.ndarray] | None = None

    def of_row(self, row: Mapping[str, Any], reference: str, answer: str, *, named: str) -> float:
        """Return the score of one row; NaN where the measure does not apply. named: what a message calls the row.

        Raises:
            DataError: if a function of one's own fails, or returns something else than a finite number.
        """
        assert self.score is not None
        try:
            value = self.score(row, reference, answer)
        except Exception as error:  # the user's function can raise anything
            reason = f"{type(error).__name__}: {one_line(str(error), 200)}"
            raise DataError(f"--metric {self.name} failed on {named}: {reason}; fix the function") from None
        if value is None:
            return math.nan
        if isinstance(value, (bool, np.bool_)):
            return 100.0 if value else 0.0
        if not isinstance(value, (int, float, np.integer, np.floating)) or not math.isfinite(value):
            raise DataError(
                f"--metric {self.name} returned {one_line(repr(value), 60)} for {named}; return a finite number, true "
                "or false, or None where it does not apply"
            )
        return float(value)


def parse(specs: Sequence[str]) -> list[Measure]:
    """Return the measures that the words name, in their order.

    Raises:
        ConfigError: if one is unknown, given twice, or names a function or an expression that cannot be used.
    """
    found = [measure for spec in specs for measure in _parse(spec)]
    names = [measure.name for measure in found]
    if twice := [name for at, name in enumerate(names) if name in names[:at]]:
        raise ConfigError(f"--metric {twice[0]} is given twice; give it once")
    return found


def _parse(spec: str) -> list[Measure]:
    kind, colon, argument = spec.partition(":")
    if kind == "regex":
        return [_regex(argument)]
    if kind == "contains" and colon:
        return [
            _measure(spec, f"Contains {argument}", f"answers that contain {argument!r}, %", _contains_text(argument))
        ]
    if spec in _KINDS:
        return _KINDS[spec]
    if colon and re.fullmatch(r"[\w.]+", kind) and argument.isidentifier():
        return [_measure(spec, argument, f"{kind}.{argument} of your own", _function(kind, argument))]
    known = (*_KINDS, "regex:PATTERN", "contains:TEXT", "my_module:function")
    raise ConfigError(f"there is no metric {spec!r}{nearest(spec, list(_KINDS))}; give one of {', '.join(known)}")


def _measure(name: str, heading: str, about: str, score: Score, digits: int = 1) -> Measure:
    return Measure(name=name, heading=heading, about=about, score=score, digits=digits)


# ---- from outside ----------------------------------------------------------------------------------------------


def _function(module: str, name: str) -> Score:
    """Return a function of a module, which is also looked for in the current folder.

    Raises:
        ConfigError: if there is none that accepts a row, a reference and an answer.
    """
    spec, here = f"--metric {module}:{name}", str(Path.cwd())
    sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # the user's module runs here
        raise ConfigError(
            f"{spec}: the module {module!r} cannot be imported ({type(error).__name__}: {one_line(str(error), 200)}); "
            "it is looked for in the current folder and among the installed packages"
        ) from None
    finally:
        sys.path.remove(here)
    if not callable(function):
        known = [key for key, value in vars(sys.modules[module]).items() if inspect.isfunction(value)]
        raise ConfigError(f"{spec}: {module} has no function {name!r}{nearest(name, known)}")
    try:
        inspect.signature(function).bind({}, "", "")
    except TypeError:
        raise ConfigError(
            f"{spec}: write it as {name}(row, reference, answer), which returns a number or bool"
        ) from None
    except ValueError:  # one of C, without a signature
        pass
    return function


def _regex(text: str) -> Measure:
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise ConfigError(f"--metric regex:{text} is no regular expression: {error}") from None
    if not text:
        raise ConfigError("--metric regex: needs an expression, such as 'regex:^[A-Z]'")
    name = f"regex:{text}"
    return _measure(
        name, name, f"answers in which {text} is found, %", lambda _row, _ref, answer: bool(pattern.search(answer))
    )


def _contains_text(text: str) -> Score:
    if not text:
        raise ConfigError("--metric contains: needs a text, such as contains:감사합니다")
    return lambda _row, _reference, answer: _folded(text) in _folded(answer)


# ---- built in --------------------------------------------------------------------------------------------------


def _contains(_row: Mapping[str, Any], reference: str, answer: str) -> bool | None:
    return _folded(reference) in _folded(answer) if reference.strip() else None


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def number_in(text: str) -> float | None:
    """Return the last number of a text, in which commas part thousands; None if there is none.

    number_in("따라서 답은 1,234.5원") == 1234.5
    """
    found = _NUMBER.findall(unicodedata.normalize("NFKC", text))
    return float(found[-1].replace(",", "").replace("\N{MINUS SIGN}", "-")) if found else None


def _number(_row: Mapping[str, Any], reference: str, answer: str) -> bool | None:
    wanted, given = number_in(reference), number_in(answer)
    return None if wanted is None else given is not None and math.isclose(wanted, given, rel_tol=1e-6, abs_tol=1e-9)


_KINDS: dict[str, list[Measure]] = {
    "contains": [_measure("contains", "Contains the reference", "answers that contain the reference, %", _contains)],
    "number": [_measure("number", "Number", "answers whose last number is that of the reference, %", _number)],
    "label": [
        _measure("label", "Accuracy", "answers with the label of the reference, %", labels.same),
        Measure(
            name="label_f1",
            heading="F1",
            about="mean over the labels of the references (macro F1), 0 to 100",
            over_all=labels.macro_f1,
        ),
    ],
    "json_valid": [_measure("json_valid", "Valid JSON", "answers that are JSON, %", structured.json_valid)],
    "json_fields": [
        _measure(
            "json_fields", "JSON fields", "fields with the value of the reference, F1, 0 to 100", structured.json_fields
        )
    ],
    "tool_call": [
        _measure("tool_call_valid", "Tool call", "answers that can be read as calls, %", structured.calls_valid),
        _measure(
            "tool_call_name", "Tool name", "answers that call the tools of the reference, %", structured.calls_names
        ),
        _measure(
            "tool_call_arguments",
            "Tool arguments",
            "answers with the calls and arguments of the reference, %",
            structured.calls_equal,
        ),
    ],
    "rouge_l_morphemes": [
        _measure(
            "rouge_l_morphemes",
            "ROUGE-L, morphemes",
            "morphemes of Korean (kiwipiepy) shared in the same order, 0 to 100",
            lambda _row, reference, answer: rouge_l_morphemes(answer, reference),
        )
    ],
}
