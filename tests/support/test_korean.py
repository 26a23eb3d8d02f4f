"""The Korean catalogue: every marked message is there, with the same values; none is left over."""

from __future__ import annotations

import re
import unicodedata
from string import Formatter
from typing import Any

import pytest
import yaml

from byeori import cli, config
from byeori.config.base import GROUPS
from byeori.config.help import help_text
from byeori.evaluate.verdict import verdict
from byeori.support import language
from messages import SOURCE, marked

CATALOGUE: dict[str, dict[str, str]] = yaml.safe_load((SOURCE / "support" / "korean.yaml").read_text(encoding="utf-8"))
NEITHER = {"chrF", "ROUGE-L", "there {count}; {which}"}  # names, and what has values alone


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
            assert not re.search(r"(?<!\})\}[\"'`)]*(을|를|이|가|은|는|과|와|으로|로|라는)(?=[\s.,]|$)", korean), korean


def test_a_text_in_two_sections_has_one_korean() -> None:
    seen: dict[str, str] = {}
    for section in CATALOGUE.values():
        for english, korean in section.items():
            assert seen.setdefault(english, korean) == korean, english


# ---- help, errors, verdicts: finished sentences, found by their patterns ------------------------------------------


@pytest.fixture
def korean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(language.VARIABLE, "ko")


def test_every_command_and_group_of_settings_has_its_korean() -> None:
    known = {english for section in CATALOGUE.values() for english in section}
    assert {config.about(kind) for kind in cli.COMMANDS.values()} | set(GROUPS) <= known


@pytest.mark.parametrize("command", cli.COMMANDS)
@pytest.mark.parametrize("full", [False, True])
def test_help_is_korean_and_fits_the_terminal(
    korean: None, command: str, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = help_text(cli.COMMANDS[command], command, prog=f"byeori {command}", full=full)
    assert "usage" not in text and "(required)" not in text and "(default" not in text
    for line in text.splitlines():
        width = sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in line)
        assert width <= 100 or line.startswith("  --"), line  # a list of values is not broken
    settings = re.findall(r"^  --\w+.*(?:\n {30}.*)*", text, re.MULTILINE)
    assert all(re.search("[가-힣]", entry) for entry in settings), settings


ERRORS = [
    ["tran"],
    ["--verison"],
    ["sft", "--learning_rat", "1"],
    ["sft", "a", "b", "--learning_rate"],
    ["sft"],
    ["sft", "model", "rows.jsonl", "--output_dir", "out", "--compile", "maybe"],
    ["sft", "model", "rows.jsonl", "--output_dir", "out", "--keep", "best"],
    ["sft", "model", "rows.jsonl", "--output_dir", "out", "--sample_rows", "2"],
    ["sft", "--config", "nowhere.yaml"],
    ["compare", "--lang", "fr"],
    ["compare", "a"],
    ["compare", "a", "rows.jsonl", "--output_dir", "out", "--metric", "chrff"],
    ["compare", "a", "rows.jsonl", "--output_dir", "out", "--judge", "localhost"],
    ["merge", "nowhere", "out"],
    ["publish", "tests", "--repo_id", "a/b/c"],
    ["plan", "--shape", "hidden_size=wide"],
    ["sft", "model", "rows.jsonl", "--output_dir", "out", "--lora_init", "mica", "--use_dora", "True"],
    ["sft", "model", "rows.jsonl", "--output_dir", "out", "--lora_target_modules", ""],
    ["sft", "model", "rows.jsonl", "--output_dir", "out", "--optim", "adamwww"],
    ["studio", "nowhere"],
]


@pytest.mark.parametrize("words", ERRORS, ids=" ".join)
def test_common_errors_of_the_command_line_are_korean(
    korean: None, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("오류: ") and re.search("[가-힣]", said.removeprefix("오류: ")), said
    assert "을(를)" not in said and "이(가)" not in said and "은(는)" not in said, said


def interval(low: float, high: float) -> dict[str, float]:
    return {"mean": (low + high) / 2, "low": low, "high": high}


def pairs(low: float, high: float) -> dict[str, Any]:
    sides = {"base": {"preference_accuracy": 50.0, "chrf": 10.0}, "tuned": {"preference_accuracy": 75.0, "chrf": 20.0}}
    names = {"preference_accuracy": interval(low, high), "preference_margin": interval(low / 9, high / 9)}
    return {**sides, "difference": names | {"chrf": interval(1, 3)}, "rows": 40}


def metrics(low: float, high: float, rows: int = 44) -> dict[str, Any]:
    return {"base": {"chrf": 12.0}, "tuned": {"chrf": 30.0}, "difference": {"chrf": interval(low, high)}, "rows": rows}


def found(*sentences: str, undermines: bool = True) -> dict[str, Any]:
    return {"findings": [{"name": "x", "sentence": sentence, "undermines": undermines} for sentence in sentences]}


VERDICTS = [
    {"rows": 0},
    metrics(1, 3, rows=3),
    metrics(16.9, 29.1),
    metrics(-29.1, -16.9),
    metrics(-1, 2),
    metrics(3, 9, rows=12),
    pairs(10, 40),
    pairs(-40, -10),
    pairs(-10, 20),
    metrics(3, 9)
    | found(
        "40 of the tuned model's 44 answers repeat their input, and 2 of the references do.",
        "Copying the first sentence of the input does as well: chrF 19.4, the tuned model 18.3.",
        "The gain may be only that answers end. Cutting the base model's answers to the length of the tuned model's is "
        "not clearly worse: chrF 19.4, the tuned model 18.3 (95% interval of the lead -1.0 to 2.0).",
        "The interval is wide, 12.0 points of chrF; an interval of 5 would need about 250 rows.",
        "3 of the 44 rows were trained on, so the model may have memorised them.",
        "2 of the 44 rows are near copies of training rows, which may give answers away.",
    ),
    metrics(3, 9)
    | found(
        "40 of the tuned model's 44 answers are empty or have no letter or digit.",
        "30 of the tuned model's 44 answers are answers of training rows, word for word; 2 of the references are.",
        "40 of the tuned model's 44 answers are in another script than their references.",
        "40 of the tuned model's 44 answers are those of the base model.",
        "40 of the tuned model's 44 answers ran into the length limit.",
        "40 of the base model's 44 answers are empty or have no letter or digit, so any answer is a gain.",
        "The tuned model gives 3 different answers to 44 rows, whose references are 44 different ones.",
        "The tuned model's own answer to another row does as well: chrF 19.4, the tuned model 18.3.",
        "2 of the 44 rows repeat another row and its answer. Without them the change of chrF is +1.0 (95% interval "
        "-1.0 to +3.0).",
        "1 of the 44 rows repeats another row and its answer. Without it the change of chrF is +1.0 (95% interval "
        "-1.0 to +3.0).",
        "The training rows are not here, so whether these rows were trained on is not known.",
    ),
    pairs(10, 40)
    | found(
        "Preferring the longer answer does as well: it is the chosen one in 88% of the pairs, and the tuned model "
        "prefers that in 75%.",
        "Preferring the shorter answer is not clearly worse: it is the chosen one in 68% of the pairs, and the tuned "
        "model prefers that in 75%.",
    ),
]


@pytest.mark.parametrize("measured", VERDICTS, ids=range(len(VERDICTS)))
def test_verdicts_are_korean_to_the_last_sentence(korean: None, measured: dict[str, Any]) -> None:
    said = language.translated(verdict(measured))
    for word in ("The ", "the ", "over ", "interval", "rows", "answers", "rose", "fell", "Copying", "을(를)", "이(가)"):
        assert word not in said, said


def test_a_verdict_by_hand(korean: None) -> None:
    measured = metrics(16.9, 29.1)
    measured["difference"]["loss"] = interval(-1.024, -0.836)
    assert language.translated(verdict(measured)) == (
        "튜닝한 모델이 정답에 더 가깝습니다. 44개 행에서 chrF가 23.0 올랐습니다(95% 신뢰구간 16.9 ~ 29.1). "
        "정답의 손실은 0.930 내렸습니다(95% 신뢰구간 0.836 ~ 1.024)."
    )


def test_lang_is_taken_from_anywhere_and_a_column_of_this_name_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(language.VARIABLE, "en")
    assert cli._language(["preview", "m", "rows", "--lang", "ko", "--json"]) == ["preview", "m", "rows", "--json"]
    assert language.chosen() == "ko"
    assert cli._language(["--lang=en", "--help"]) == ["--help"] and language.chosen() == "en"
    assert cli._language(["generate", "m", "--lang", "Korean"]) == ["generate", "m", "--lang", "Korean"]
