"""The language of pages, notes, errors and help: English, or Korean where the user asks for it.

English stands in the code; korean.yaml has what byeori says in Korean, by the English text:

    "{name} is not a folder": "{name}은(는) 폴더가 아닙니다"

A josa in two forms (을(를), 이(가), 은(는), 과(와), (으)로, (이)) after a value becomes the one that fits the value.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.resources import files
from string import Formatter, ascii_lowercase
from typing import Any

import yaml

LANGUAGES = ("en", "ko")
VARIABLE = "BYEORI_LANG"
"""Environment variable with the language that `--lang` asks for, also for the processes of a group."""

_FEW_LETTERS, _CERTAIN = 8, 12
"""Letters of a pattern without its values. With few, as in {one} and {two}, it would match anything: its values are
words then. With many it is tried on several sentences together.
"""

_asked: str | None = None
_here: ContextVar[str | None] = ContextVar("language", default=None)


def use(name: str | None) -> None:
    """Speak this language from now on: en or ko; None goes back to that of the environment."""
    global _asked
    _asked = name


@contextmanager
def speaking(name: str) -> Iterator[None]:
    """Speak this language in the body, in its thread alone: that of one reader of a page that many read."""
    token = _here.set(name)
    try:
        yield
    finally:
        _here.reset(token)


def chosen() -> str:
    """Return the language: the one asked for, else Korean if LC_ALL, LC_MESSAGES or LANG says so, else English."""
    if asked := _here.get() or _asked or os.environ.get(VARIABLE):
        return asked if asked in LANGUAGES else "en"
    locale = next((value for name in ("LC_ALL", "LC_MESSAGES", "LANG") if (value := os.environ.get(name))), "")
    return "ko" if re.match(r"ko(?![a-z])", locale, re.IGNORECASE) else "en"


def tr(message: str, **values: Any) -> str:
    """Return a message in the language of the user, with its values in place of `{name}` as `str.format` does.

    A message without Korean stays English; a test keeps the catalogue complete.
    """
    if chosen() == "ko":
        return _formatted(_messages().get(message, message), values)
    return message.format(**values)


def later(message: str) -> str:
    """Return a message as it is: one that `tr` is given later, marked here so that the catalogue has it."""
    return message


def counted(count: int, one: str, many: str, **values: Any) -> str:
    """Return the message for one thing or for several; `{count}` in it is the number."""
    return tr(one if count == 1 else many, count=count, **values)


def translated(text: str) -> str:
    """Return finished sentences, such as an error or a verdict, in the language of the user.

    Each is looked up by its pattern, and the values in it as well; what the catalogue does not have stays English.
    """
    if chosen() != "ko":
        return text
    if text in _messages() and "{" not in text:
        return _messages()[text]
    sentences = re.split(r"(?<=[.!?]) (?=[A-Z0-9'])", text)
    found = [_known(sentence) for sentence in sentences]
    if None in found and (whole := _known(text, least=_CERTAIN)):  # a value in it ends like a sentence
        return whole
    return " ".join(known or _value(sentence) for known, sentence in zip(found, sentences, strict=True))


def _known(sentence: str, least: int = 0) -> str | None:
    """Return a sentence in Korean, None if the catalogue has no pattern of it with as many letters of its own."""
    whole, patterns = _patterns()
    if sentence in whole:
        return whole[sentence]
    for letters, pieces, pattern, korean in patterns:
        if letters < least:
            break
        if all(piece in sentence for piece in pieces) and (match := re.fullmatch(pattern, sentence, re.DOTALL)):
            values = {name: _value(text or "") for name, text in match.groupdict().items()}
            return _formatted(korean, values, plain=True)
    return None


def _value(text: str) -> str:
    """Return a value of a sentence in Korean: what the catalogue knows of it, or of its parts if it is a list."""
    if known := _known(text):
        return known
    head, mark, rest = text.partition(": ")
    if mark and (known := _known(rest)):
        return f"{_value(head)}: {known}"
    for mark in ("; ", ": ", ", "):
        if mark in text:
            return mark.join(map(_value, text.split(mark)))
    return text.replace("' or '", "', '")


def _formatted(message: str, values: dict[str, Any], *, plain: bool = False) -> str:
    """Return a message with its values, and of every josa in two forms the right one. plain: values are texts."""
    out = ""
    for literal, name, spec, conversion in Formatter().parse(message):
        out += _with_josa(out, literal) if out else literal
        if name:
            value = values[name]
            if not plain and conversion == "r":
                value = repr(value)
            out += str(value) if plain else format(value, spec or "")
    return out


# ---- josa ------------------------------------------------------------------------------------------------------------

_JOSA = {
    "을(를)": ("을", "를"),
    "이(가)": ("이", "가"),
    "은(는)": ("은", "는"),
    "과(와)": ("과", "와"),
    "(으)로": ("으로", "로"),
    "(이)": ("이", ""),
}
_AFTER_VALUE = re.compile(rf"([\"'`\)\]’”」]*)({'|'.join(map(re.escape, _JOSA))})")
_NONE, _RIEUL, _OTHER = "none", "ㄹ", "other"  # final consonants
_DIGITS = {**dict.fromkeys("2459", _NONE), **dict.fromkeys("178", _RIEUL), **dict.fromkeys("036", _OTHER)}
_LETTERS = {"L": _RIEUL, "R": _RIEUL, "M": _OTHER, "N": _OTHER}  # 엘, 알, 엠, 엔; other names end in a vowel


def _with_josa(before: str, literal: str) -> str:
    match = _AFTER_VALUE.match(literal)
    return match[1] + josa(before, match[2]) + literal[match.end() :] if match else literal


def josa(word: str, pair: str) -> str:
    """Return the form of a josa that follows a word; both forms if the sound of its end is not known.

        josa("구청", "을(를)") == "을"    josa("8", "(으)로") == "로"    josa("GPU", "이(가)") == "가"

    pair: 을(를), 이(가), 은(는), 과(와), (으)로 or (이). Digits are read in Korean, capitals and words without a vowel
    letter by letter, other Latin words by their ending. Quotes and what stands in brackets at the end do not count.
    """
    final = _final(word)
    if final is None:
        return pair
    with_final, without = _JOSA[pair]
    return without if final == _NONE or (final == _RIEUL and pair == "(으)로") else with_final


def _final(word: str) -> str | None:
    """Return the final consonant that is heard at the end of a word, None if nothing can be heard."""
    text = re.sub(r"(?<=\w)\s*\([^()]*\)\W*$", "", word)
    text = re.sub(r"[^\w%]+$", "", text).rstrip("_")
    last = text[-1:]
    if "가" <= last <= "힣":
        place = (ord(last) - ord("가")) % 28
        return _NONE if place == 0 else _RIEUL if place == 8 else _OTHER
    if last == "%":  # 퍼센트
        return _NONE
    if last in _DIGITS:
        return _DIGITS[last]
    if re.match("[A-Z]", last):
        return _LETTERS.get(last, _NONE)
    return _latin(text[len(text.rstrip(ascii_lowercase)) :]) if re.match("[a-z]", last) else None


def _latin(word: str) -> str:
    """The final of a lower-case word as Korean spells it: model 모델, format 포맷, test 테스트, csv 시에스브이."""
    if not re.search("[aeiouy]", word):
        return _LETTERS.get(word[-1].upper(), _NONE)
    if word.endswith(("l", "le")):
        return _RIEUL
    if re.search(r"(m|me|n|ne|ng)$", word) or re.search(r"(?<![aeiou])[aeiou](p|t|ck)$", word):
        return _OTHER
    return _NONE


# ---- the catalogue ---------------------------------------------------------------------------------------------------


@cache
def catalogue(package: str) -> dict[str, dict[str, str]]:
    """Return the sections of a package's korean.yaml."""
    text = files(package).joinpath("korean.yaml").read_text(encoding="utf-8")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)  # in C, ten times as fast
    sections: dict[str, dict[str, str]] = loader.get_single_data()
    return sections


@cache
def _messages() -> dict[str, str]:
    return {english: korean for section in catalogue("byeori.support").values() for english, korean in section.items()}


@cache
def _patterns() -> tuple[dict[str, str], list[tuple[int, list[str], str, str]]]:
    """The sentences without values, by their text; and those with values, the most specific first.

    Of each: how many letters it has, what stands between the values, its pattern, its Korean. A value right behind
    another is empty, or begins like a part of a sentence: {name}{nearest} is `tran (did you mean train?)`.
    """
    sentences = catalogue("byeori.support")["sentences"]
    begins = {found[0] for english in sentences if (found := re.match(r" \(\w*|[ ,;:.]+[$\w]+", english))}
    behind = f"(?:(?:{'|'.join(map(re.escape, sorted(begins)))}).*?)?"
    whole, out = {}, []
    for english, korean in sentences.items():
        parts = list(Formatter().parse(english))
        pieces = [literal for literal, _, _, _ in parts if literal]
        if all(name is None for _, name, _, _ in parts):
            whole["".join(pieces)] = _formatted(korean, {})
        elif max(map(len, pieces), default=0) >= 4:  # shorter ones would match anything
            letters = len(re.findall(r"\w", "".join(pieces)))
            value = ".*?" if letters >= _FEW_LETTERS or english.endswith(".") else r"\S+?(?:, \S+?)*?"
            pattern, seen = "", set[str]()
            for place, (literal, name, _, _) in enumerate(parts):
                pattern += re.escape(literal)
                if name:
                    values = behind if place and not literal else value
                    pattern += f"(?P={name})" if name in seen else f"(?P<{name}>{values})"
                    seen.add(name)
            out.append((letters, pieces, pattern, korean))
    return whole, sorted(out, key=lambda item: (-item[0], -sum(map(len, item[1]))))
