"""Intervals: how often they contain the truth, and by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from byeori.evaluate.intervals import Interval, paired_interval, t_quantile

Draw = Callable[[np.random.Generator, int], np.ndarray]


def steps(better: float, worse: float) -> Draw:
    """100 where only the tuned model is right, -100 where only the base is."""

    def draw(generator: np.random.Generator, rows: int) -> np.ndarray:
        shares = [worse, 1 - better - worse, better]
        return generator.choice([-100.0, 0.0, 100.0], size=rows, p=shares)

    return draw


DRAWS: dict[str, tuple[Draw, float]] = {
    "normal": (lambda generator, rows: generator.normal(5, 10, rows), 5.0),
    "skewed": (lambda generator, rows: generator.exponential(3.0, rows), 3.0),
    "heavy tails": (lambda generator, rows: generator.laplace(1.0, 3.0, rows), 1.0),
    "right or wrong": (steps(0.3, 0.1), 20.0),
}


@pytest.mark.parametrize("rows", [40, 400])
@pytest.mark.parametrize("name", DRAWS)
def test_95_of_100_intervals_contain_the_truth(name: str, rows: int) -> None:
    draw, truth = DRAWS[name]
    generator = np.random.default_rng(2026)
    found = [paired_interval(draw(generator, rows)) for _ in range(2000)]
    coverage = np.mean([interval.low <= truth <= interval.high for interval in found])
    assert 0.94 <= coverage <= 0.96


def test_few_changes_are_covered_rather_too_often() -> None:
    """2 in 100 rows better, 2 worse: of 40 rows often none or one changed, which bootstraps cover 56 times in 100."""
    draw, generator = steps(0.02, 0.02), np.random.default_rng(2026)
    found = [paired_interval(draw(generator, 40)) for _ in range(500)]
    changed = [interval for interval in found if interval.low < interval.high]
    assert np.mean([interval.low <= 0.0 <= interval.high for interval in changed]) > 0.98


@pytest.mark.parametrize("degrees", [1, 4, 5, 7, 39, 399])
def test_quantile_of_t_against_the_incomplete_beta_function(degrees: int) -> None:
    t = t_quantile(degrees)
    tail = mpmath.betainc(degrees / 2, 0.5, 0, degrees / (degrees + t * t), regularized=True) / 2
    assert float(tail) == pytest.approx(0.025, abs=2e-5)


def test_an_interval_of_symmetric_rows_is_that_of_t() -> None:
    symmetric = paired_interval(np.array([-2.0, -1.0, 1.0, 2.0, 3.0, -3.0]))
    assert symmetric.high == pytest.approx(-symmetric.low) == pytest.approx(2.5706 * math.sqrt(28 / 5 / 6), abs=1e-3)


def test_a_long_tail_above_moves_the_interval_up() -> None:
    values = np.array([0.0, 0.1, 0.2, 0.1, 0.3, 0.2, 9.0, 0.2])
    interval = paired_interval(values)
    assert interval.high - interval.mean > 1.5 * (interval.mean - interval.low)
    mirrored = paired_interval(-values)
    assert (-mirrored.high, -mirrored.low) == pytest.approx((interval.low, interval.high))


def test_missing_rows_are_left_out() -> None:
    assert paired_interval(np.array([np.nan, 4.0])) == Interval(4.0, 4.0, 4.0)
    assert all(math.isnan(value) for value in paired_interval(np.array([np.nan])))
    assert all(math.isnan(value) for value in paired_interval(np.array([])))


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30))
def test_an_interval_holds_its_mean(values: list[float]) -> None:
    interval = paired_interval(np.array(values))
    assert interval.low <= interval.mean + 1e-9 and interval.mean <= interval.high + 1e-9
    assert all(map(math.isfinite, interval))
