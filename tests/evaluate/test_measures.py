"""Measures of the user's own, by hand and against plain computations; what is wrong with one is said first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import byeori
from byeori.errors import ConfigError, DataError
from byeori.evaluate import labels, measures, structured
from byeori.evaluate.korean import rouge_l_morphemes
from byeori.evaluate.metrics import rouge_l, rouge_l_chars
from byeori.evaluate.verdict import verdict

OWN = """
def score(row, reference, answer):
    return len(answer) / len(reference)

def same_start(row, reference, answer):
    return answer[:1] == row["title"][:1]

def broken(row, reference, answer):
    return row["missing"]

def nothing(row, reference, answer):
    return float("nan")

def two(row, answer):
    return 1
"""


def score(spec: str, reference: str, answer: str) -> list[float]:
    return [m.of_row({}, reference, answer, named="row 1") for m in measures.parse([spec]) if m.score]


@pytest.mark.parametrize(
    ("spec", "reference", "answer", "expected"),
    [
        ("contains", "서울", "답은 서울입니다", 100.0),
        ("contains", "서울 시청", "답은 부산", 0.0),
        ("contains:감사", "", "정말 감사합니다", 100.0),
        (r"regex:^\d{2,3}$", "", "123", 100.0),
        (r"regex:^\d{2,3}$", "", "1234", 0.0),
        ("number", "답: 1,234", "따라서 1234원", 100.0),
        ("number", "#### 12", "3 더하기 9는 12.0", 100.0),
        ("number", "12", "열둘", 0.0),
        ("number", "-3", "\N{MINUS SIGN}3", 100.0),
        ("label", "긍정", " 긍정.\n", 100.0),
        ("label", "Positive", "positive", 100.0),
        ("label", "긍정", "긍정적인 글입니다", 0.0),
        ("json_valid", "", '{"a": [1, 2]}', 100.0),
        ("json_valid", "", '```json\n{"a": 1}\n```', 100.0),
        ("json_valid", "", 'Here: {"a": 1}', 0.0),
        ("json_valid", "", "NaN", 0.0),
        ("json_fields", '{"a": 1, "b": {"c": "x"}}', '{"b": {"c": "x"}, "a": 1.0}', 100.0),
        ("json_fields", '{"a": 1, "b": 2}', '{"a": 1, "b": 3}', 50.0),
        ("json_fields", '{"a": true}', '{"a": 1}', 0.0),
        ("json_fields", '{"a": 1}', "no json", 0.0),
    ],
)
def test_one_row_by_hand(spec: str, reference: str, answer: str, expected: float) -> None:
    assert score(spec, reference, answer) == [expected]


def test_measures_that_do_not_apply_are_not_measured() -> None:
    assert np.isnan(score("number", "열둘", "12")).all()
    assert np.isnan(score("json_fields", "no json", "{}")).all()


CALL = '[{"name": "weather", "arguments": {"city": "서울", "days": 2}}]'


@pytest.mark.parametrize(
    ("answer", "valid", "name", "arguments"),
    [
        ('<tool_call>\n{"name": "weather", "arguments": {"days": 2, "city": "서울"}}\n</tool_call>', 100, 100, 100),
        ('{"name": "weather", "parameters": {"city": "서울", "days": 2.0}}', 100, 100, 100),
        ('{"function": {"name": "weather", "arguments": "{\\"city\\": \\"서울\\", \\"days\\": 2}"}}', 100, 100, 100),
        (
            "<function=weather>\n<parameter=city>\n서울\n</parameter>\n<parameter=days>\n2\n</parameter>\n</function>",
            100,
            100,
            100,
        ),
        ('{"name": "weather", "arguments": {"city": "부산", "days": 2}}', 100, 100, 0),
        ('{"name": "forecast", "arguments": {"city": "서울", "days": 2}}', 100, 0, 0),
        ('<tool_call>{"name": "weather", "arguments": {"city": </tool_call>', 0, 0, 0),
        ("서울은 맑습니다", 0, 0, 0),
    ],
)
def test_tool_calls_as_models_write_them(answer: str, valid: float, name: float, arguments: float) -> None:
    assert score("tool_call", CALL, answer) == [valid, name, arguments]


def test_parallel_calls_in_any_order_and_answers_without_calls() -> None:
    one, two = ({"name": name, "arguments": {"x": 1}} for name in ("a", "b"))
    assert score("tool_call", json.dumps([one, two]), f"{json.dumps(two)}\n{json.dumps(one)}") == [100, 100, 100]
    assert score("tool_call", "안녕하세요", "반갑습니다") == [100, 100, 100]
    assert score("tool_call", "안녕하세요", CALL) == [0, 0, 0]
    assert structured.calls('{"city": "서울"}') == []  # an answer in JSON, no call


def plain_macro_f1(references: list[str], answers: list[str]) -> float:
    scores = []
    for name in set(references):
        hits = sum(a == b == name for a, b in zip(references, answers, strict=True))
        precision = hits / max(1, answers.count(name))
        recall = hits / references.count(name)
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    return 100 * sum(scores) / len(scores)


PAIRS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abcd")), min_size=2, max_size=30)


@given(PAIRS)
def test_macro_f1_and_its_jackknife(pairs: list[tuple[str, str]]) -> None:
    references, answers = [a for a, _ in pairs], [b for _, b in pairs]
    values = labels.macro_f1(references, answers)
    whole = plain_macro_f1(references, answers)
    assert values.mean() == pytest.approx(whole)
    without = [
        plain_macro_f1(references[:i] + references[i + 1 :], answers[:i] + answers[i + 1 :]) for i in range(len(pairs))
    ]
    expected = [(len(pairs) - 1) * (np.mean(without) - one) for one in without]
    assert values - whole == pytest.approx(np.array(expected), abs=1e-6)


def test_the_table_of_confusions() -> None:
    table = labels.confusion(["a", "a", "b"], ["A", "b", "else"])
    assert table == {"labels": ["a", "b"], "counts": [[1, 1, 0], [0, 0, 1]]}
    assert labels.confusion([str(n) for n in range(40)], [""] * 40) is None


def test_particles_of_korean_do_not_cost_the_word() -> None:
    pytest.importorskip("kiwipiepy")
    reference, answer = "구청이 예산을 확정", "구청 예산 확정"
    assert rouge_l(answer, reference) == pytest.approx(100 / 3)
    assert rouge_l_chars(answer, reference) == pytest.approx(200 * 6 / 14)
    assert rouge_l_morphemes(answer, reference) == pytest.approx(200 * 3 / 8)  # 구청 이 예산 을 확정
    assert rouge_l_morphemes("하늘", "바다") == 0.0
    assert rouge_l_morphemes("", "") == 100.0


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("lable", "there is no metric 'lable' (did you mean label?)"),
        ("regex:[", "is no regular expression"),
        ("no_such_module:score", "the module 'no_such_module' cannot be imported"),
        ("json:no_such", "json has no function 'no_such'"),
        ("json:dumb", "(did you mean dump?)"),
        ("math:pow", "write it as pow(row, reference, answer)"),
        ("own_metric:two", "write it as two(row, reference, answer)"),
    ],
)
def test_a_metric_that_cannot_be_used(
    spec: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_metric.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        measures.parse([spec])
    assert sentence in str(error.value)


def test_the_same_metric_twice() -> None:
    with pytest.raises(ConfigError, match="--metric label is given twice"):
        measures.parse(["label", "label"])


@pytest.mark.parametrize(("name", "words"), [("broken", "KeyError: 'missing'"), ("nothing", "returned nan for x")])
def test_a_function_that_fails_is_named_with_its_row(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_metric.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    (measure,) = measures.parse([f"own_metric:{name}"])
    with pytest.raises(DataError, match=words) as error:
        measure.of_row({}, "a", "b", named="x")
    assert f"--metric own_metric:{name}" in str(error.value)


def test_several_measures_of_a_comparison(
    trained: Path, title_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_metric.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    given = ["own_metric:same_start", "own_metric:score", "label"]
    result = byeori.compare(
        adapter=trained, data_path=title_rows, output_dir="report", metric=given, max_rows=8, max_new_tokens=6,
        dtype="float32", few_shots=0,
    )  # fmt: skip
    rows: list[Any] = [json.loads(line) for line in result.rows.read_text(encoding="utf-8").splitlines()]
    for side in ("base", "tuned"):
        expected = [len(row[f"{side}_output"]) / len(row["title"]) for row in rows]
        assert [row[side]["own_metric:score"] for row in rows] == pytest.approx(expected)
        starts = [100.0 * (row[f"{side}_output"][:1] == row["title"][:1]) for row in rows]
        assert result.metrics[side]["own_metric:same_start"] == pytest.approx(np.mean(starts))
    assert list(result.metrics["measures"]) == [*given, "label_f1"]
    assert set(result.metrics["difference"]["label_f1"]) == {"mean", "low", "high"}
    assert len(result.metrics["confusion"]["tuned"]["labels"]) == 8
    page = result.report.read_text(encoding="utf-8")
    assert "own_metric.same_start of your own" in page and "macro F1" in page
    assert "same_start" in result.verdict and "chrF" not in result.verdict.split(".")[0]


def test_the_first_of_ones_own_decides() -> None:
    metrics = {
        "base": {"label": 50.0}, "tuned": {"label": 80.0}, "rows": 40,
        "difference": {"label": {"mean": 30.0, "low": 20.0, "high": 40.0}},
        "measures": {"label": {"heading": "Accuracy", "about": "", "digits": 1}},
    }  # fmt: skip
    assert (
        verdict(metrics) == "The tuned model is better: Accuracy rose by 30.0 (95% interval 20.0 to 40.0) over 40 rows."
    )
