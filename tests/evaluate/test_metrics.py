"""Metrics against values by hand and against plain, independent computations."""

import json
import subprocess
import sys
import unicodedata
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from byeori.evaluate.metrics import (
    ROW_METRICS,
    chrf,
    exact,
    rouge_l,
    score_row,
    summarise,
)

WORDS = st.lists(st.sampled_from(["서울", "예산", "안", "발표", "the", "a"]), max_size=9).map(" ".join)


def plain_chrf(prediction: str, reference: str) -> float:
    """chrF from its definition: precision and recall averaged over the orders both texts have, then F with beta 2."""
    prediction, reference = "".join(prediction.split()), "".join(reference.split())
    precisions, recalls = [], []
    for order in range(1, 7):
        found, wanted = (
            Counter(text[i : i + order] for i in range(len(text) - order + 1)) for text in (prediction, reference)
        )
        if found and wanted:
            common = sum((found & wanted).values())
            precisions.append(common / sum(found.values()))
            recalls.append(common / sum(wanted.values()))
    precision, recall = np.mean(precisions), np.mean(recalls)
    return float(100 * 5 * precision * recall / (4 * precision + recall)) if precision + recall else 0.0


def plain_rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L by the textbook table, words split at spaces."""
    a, b = prediction.split(), reference.split()
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, left in enumerate(a):
        for j, right in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if left == right else max(table[i][j + 1], table[i + 1][j])
    if not table[-1][-1]:
        return 100.0 if a == b else 0.0
    precision, recall = table[-1][-1] / len(a), table[-1][-1] / len(b)
    return 100 * 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("서울시 예산안 발표", "서울시, 내년 예산안 발표"),
        ("the cat sat on the mat", "a cat sat on a mat"),
        ("한국어 제목을 만드세요", "전혀 다른 글입니다"),
    ],
)
def test_chrf_follows_its_definition(prediction: str, reference: str) -> None:
    assert chrf(prediction, reference) == pytest.approx(plain_chrf(prediction, reference), abs=1e-6)


def test_chrf_by_hand() -> None:
    # "ab" against "ac": only order 1 (1 of 2) and order 2 (0 of 1) exist, so P = R = F = 0.25.
    assert chrf("ab", "ac") == pytest.approx(25.0)


def test_empty_texts() -> None:
    assert (chrf("", ""), rouge_l("", ""), exact(" ", "\n")) == (100.0, 100.0, 100.0)
    assert (chrf("", "제목"), rouge_l("", "제목"), exact("", "제목")) == (0.0, 0.0, 0.0)
    assert (chrf("제목", ""), rouge_l("제목", "")) == (0.0, 0.0)
    assert rouge_l("!!!", "!!!") == 100.0
    assert rouge_l("!!!", "???") == 0.0


def test_rouge_l_by_hand_in_hangul() -> None:
    assert rouge_l("서울시 예산 안 발표", "서울시 예산 발표") == pytest.approx(600 / 7)
    assert rouge_l("발표 예산", "예산 발표") == pytest.approx(50.0)  # order counts
    assert rouge_l("“예산”, 발표!", "예산 발표") == 100.0  # punctuation does not
    assert rouge_l("GPU 5대", "gpu 5대") == 100.0
    assert rouge_l("a_b", "a b") == 100.0


def test_rouge_l_keeps_words_with_combining_marks_whole() -> None:
    assert rouge_l("हिन्दी", "हिन्द") == 0.0
    assert rouge_l("हिन्दी", "हिन्दी") == 100.0


@given(WORDS, WORDS)
def test_rouge_l_equals_the_textbook_table(a: str, b: str) -> None:
    assert rouge_l(a, b) == pytest.approx(plain_rouge_l(a, b))
    assert rouge_l(a, b) == pytest.approx(rouge_l(b, a))  # F1 of precision and recall swaps the two


@given(st.text(), st.text())
def test_metrics_stay_in_bounds(a: str, b: str) -> None:
    for metric in (chrf, rouge_l, exact):
        assert 0.0 <= metric(a, b) <= 100.0 + 1e-9
        assert metric(a, a) == pytest.approx(100.0)


def test_decomposed_hangul_is_the_same_text() -> None:
    text = "서울시 예산안"
    decomposed = unicodedata.normalize("NFD", text)
    assert decomposed != text
    assert chrf(decomposed, text) == rouge_l(decomposed, text) == exact(f" {decomposed}\n", text) == 100.0


def test_score_row_has_every_metric() -> None:
    row = score_row(" 예산 발표\n", "예산 발표", stopped=True, loss=1.5)
    assert row == dict.fromkeys(["chrf", "rouge_l", "rouge_l_chars", "exact", "stopped"], 100) | {
        "length": 5,
        "words": 2,
        "loss": 1.5,
    }
    assert tuple(row) == ROW_METRICS


def rows_of(**values: list[float]) -> dict[str, list[float]]:
    count = len(next(iter(values.values())))
    return {name: list(values.get(name, [0.0] * count)) for name in ROW_METRICS}


def test_summarise_by_hand() -> None:
    base = rows_of(chrf=[10.0, 20.0, 30.0], loss=[3.0, float("nan"), 2.0])
    tuned = rows_of(chrf=[20.0, 30.0, 40.0], loss=[1.0, 9.0, 1.0])
    result = summarise(base, tuned)
    assert set(result) == {"base", "tuned", "difference", "rows"}
    assert all(tuple(result[side]) == ROW_METRICS for side in ("base", "tuned", "difference"))
    assert result["rows"] == 3
    assert result["difference"]["chrf"] == {"mean": 10.0, "low": 10.0, "high": 10.0}
    # The second row has no base loss, so it counts for neither model.
    assert (result["base"]["loss"], result["tuned"]["loss"]) == (2.5, 1.0)
    assert result["difference"]["loss"]["mean"] == pytest.approx(-1.5)


def test_summarise_without_a_measured_loss_is_plain_json() -> None:
    base = tuned = rows_of(chrf=[1.0, 2.0], loss=[float("nan"), None])  # type: ignore[list-item]
    result = summarise(base, tuned)
    assert result["base"]["loss"] is None
    assert result["difference"]["loss"] == {"mean": None, "low": None, "high": None}
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_summarise_of_no_rows() -> None:
    none = rows_of(chrf=[])
    assert summarise(none, none)["rows"] == 0


def test_summarise_names_what_is_wrong() -> None:
    whole = rows_of(chrf=[1.0])
    with pytest.raises(ValueError, match="missing: loss"):
        summarise({name: whole[name] for name in ROW_METRICS[:-1]}, whole)
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        summarise(whole, rows_of(chrf=[1.0, 2.0]))


def test_metrics_do_not_import_torch() -> None:
    code = "import sys, byeori.evaluate.verdict, byeori.evaluate.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
