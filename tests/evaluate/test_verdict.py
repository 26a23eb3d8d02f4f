"""The verdict claims what the intervals and the findings support, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from byeori.evaluate.intervals import Interval
from byeori.evaluate.metrics import interval_sign
from byeori.evaluate.verdict import verdict


def measured(chrf: tuple[float, float, float], loss: tuple[float, float, float] | None, rows: int = 40) -> dict:
    difference: dict = {"chrf": dict(zip(("mean", "low", "high"), chrf, strict=True))}
    if loss:
        difference["loss"] = dict(zip(("mean", "low", "high"), loss, strict=True))
    return {"base": {"chrf": 20.0}, "tuned": {"chrf": 20.0 + chrf[0]}, "difference": difference, "rows": rows}


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        (
            measured((12.34, 9.1, 15.42), None),
            "The tuned model is closer to the references: chrF rose by 12.3 (95% interval 9.1 to 15.4) over 40 rows.",
        ),
        (
            measured((12.34, 9.1, 15.42), (-0.5, -0.6, -0.4)),
            "The tuned model is closer to the references: chrF rose by 12.3 (95% interval 9.1 to 15.4) over 40 rows, "
            "and the loss on the references fell by 0.500 (95% interval 0.400 to 0.600).",
        ),
        (
            measured((-3.0, -5.0, -1.0), (-0.5, -0.6, -0.4), rows=12),
            "The tuned model is further from the references: chrF fell by 3.0 (95% interval 1.0 to 5.0) "
            "over 12 rows, but the loss on the references fell by 0.500 (95% interval 0.400 to 0.600). "
            "With fewer than 20 rows the interval is rough; treat this as a hint.",
        ),
        (
            measured((0.8, -1.2, 2.8), (0.1, -0.1, 0.3)),
            "No clear difference in chrF: +0.8 over 40 rows, and the 95% interval (-1.2 to +2.8) includes zero.",
        ),
    ],
)
def test_verdict(metrics: dict, expected: str) -> None:
    assert verdict(metrics) == expected


def test_verdict_claims_nothing_from_few_rows() -> None:
    for rows in (1, 5):
        words = verdict(measured((30.0, 30.0, 30.0), (-2.0, -2.0, -2.0), rows=rows))
        assert words.startswith("Too few rows to tell: chrF went from 20.0 to 50.0 over ")
        assert "closer" not in words
    assert "over 1 row," in verdict(measured((30.0, 30.0, 30.0), None, rows=1))


def test_verdict_without_numbers() -> None:
    assert verdict({"base": {}, "tuned": {}, "difference": {}, "rows": 0}).startswith("There is nothing to compare")
    nothing = measured((float("nan"),) * 3, None)
    assert verdict(nothing).startswith("There is nothing to compare")


def test_verdict_never_prints_a_clear_interval_as_touching_zero() -> None:
    assert "(95% interval 0.003 to 0.402)" in verdict(measured((0.2, 0.0032, 0.402), None))


@given(st.floats(-50, 50), st.floats(0, 30), st.floats(0, 30))
def test_verdict_says_better_or_worse_only_where_the_interval_excludes_zero(mean: float, a: float, b: float) -> None:
    interval = Interval(mean, mean - a, mean + b)
    words = verdict(measured(interval, None))
    assert ("closer" in words) == (interval.low > 0) == (interval_sign(interval) == 1)
    assert ("further" in words) == (interval.high < 0)
    assert ("includes zero" in words) == (interval.low <= 0 <= interval.high)
