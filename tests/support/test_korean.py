"""The Korean catalogue: every marked message is there, with the same values; none is left over."""

from __future__ import annotations

import re
from string import Formatter
from typing import Any

import pytest
import yaml

from messages import SOURCE, marked

CATALOGUE: dict[str, dict[str, str]] = yaml.safe_load((SOURCE / "support" / "korean.yaml").read_text(encoding="utf-8"))
NEITHER = {"chrF", "ROUGE-L"}  # names


def fields(message: str) -> set[Any]:
    return {name for _, name, _, _ in Formatter().parse(message) if name is not None}


def test_no_marked_message_lacks_its_korean() -> None:
    known = {english for section in CATALOGUE.values() for english in section}
    assert not {message: file for message, file in marked().items() if message not in known}


def test_no_word_of_the_pages_is_left_over() -> None:
    assert not set(CATALOGUE["pages"]) - set(marked())


@pytest.mark.parametrize("section", CATALOGUE)
def test_korean_is_korean_and_has_the_same_values(section: str) -> None:
    for english, korean in CATALOGUE[section].items():
        assert fields(english) == fields(korean), english
        assert "{{" not in english or "{{" in korean
        plain = re.sub(r"\{[^}]*\}", "", english)
        assert re.search("[가-힣]", korean) or english in NEITHER or not re.search("[A-Za-z]{3}", plain), english


def test_josa_after_a_value_is_written_in_two_forms() -> None:
    for section in CATALOGUE.values():
        for korean in section.values():
            assert not re.search(r"\}[\"'`)]*(을|를|이|가|은|는|과|와|으로|로|라는)(?=[\s.,]|$)", korean), korean


def test_a_text_in_two_sections_has_one_korean() -> None:
    seen: dict[str, str] = {}
    for section in CATALOGUE.values():
        for english, korean in section.items():
            assert seen.setdefault(english, korean) == korean, english
