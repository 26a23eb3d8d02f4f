"""Every error and note of the source has its Korean, and is found by it when it is said."""

from __future__ import annotations

import re
from string import Formatter

import pytest
import yaml

from byeori.support import language
from messages import SOURCE
from spoken import shape, spoken

CATALOGUE: dict[str, dict[str, str]] = yaml.safe_load((SOURCE / "support" / "korean.yaml").read_text(encoding="utf-8"))

# Put together from parts in an order of their own; tests/support/test_korean.py has them whole.
TOGETHER = ("evaluate/verdict.py", "evaluate/findings.py")
# Tables and facts, which stay English.
TABLES = (
    "plan/report.py",
    "plan/page.py",
    "commands/doctor.py:1",
    "artifacts/model_card.py:19",
    "artifacts/serving.py:1",
)
NOT_SAID = {
    "Base model of the adapter. The default is the one that the adapter names.",  # a description of a setting
    "({identifier} | default('', true))",
    "Unknown split {unknown}. Should be one of {list}.",  # read by a reader of this error
    "Weather of a city",
    "Name of the city",
    "cannot be trained, and training will stop unless --on_bad_rows drop is given",  # with the rows, a message
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "gate_proj, down_proj, up_proj",
    "jobs launch",
    "validation_path: {error}",
    "{retention}loss",
    "--nproc {count} --parallel fsdp",
    "--parallel ddp",
}
FOR_PROGRAMS = re.compile(
    r"byeori \{\w+\}|\S+|(curl|iconv|zcat|  SkyPilot|  dstack|  RunPod) .*|Write a title .*", re.DOTALL
)


def said() -> dict[str, str]:
    return {
        message: where
        for message, where in spoken(SOURCE).items()
        if not where.startswith((*TOGETHER, *TABLES))
        and message not in NOT_SAID
        and not FOR_PROGRAMS.fullmatch(message)
    }


def test_no_error_or_note_lacks_its_korean() -> None:
    known = {shape(english) for section in CATALOGUE.values() for english in section}
    assert not {message: where for message, where in said().items() if shape(message) not in known}


def test_each_is_found_when_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """With values in it, in the Korean of its own entry and not of one that is more general."""
    monkeypatch.setenv(language.VARIABLE, "ko")
    catalogue = [item for section in CATALOGUE.values() for item in section.items()]
    by_shape = {shape(english): (english, korean) for english, korean in catalogue}
    wrong = {}
    for message in said():
        english, korean = by_shape[shape(message)]
        parts = [(literal, name) for literal, name, _, _ in Formatter().parse(english) if name]
        values = {name: f"Wert{place}x" if literal or not place else "" for place, (literal, name) in enumerate(parts)}
        found, expected = language.translated(english.format(**values)), language._formatted(korean, values)
        if found != expected:
            wrong[english] = found
    assert not wrong
