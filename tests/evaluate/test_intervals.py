"""Intervals: how often they contain the truth, and by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from byeori.evaluate.intervals import Interval, p_value, paired_interval, t_quantile

Draw = Callable[[np.random.Generator, int], np.ndarray]


DRAWS: dict[str, tuple[Draw, float]] = {
    "normal": (lambda generator, rows: generator.normal(5, 10, rows), 5.0),
    "skewed": (lambda generator, rows: generator.exponential(3.0, rows), 3.0),
    "heavy tails": (lambda generator, rows: generator.laplace(1.0, 3.0, rows), 1.0),
    "log-normal": (lambda generator, rows: generator.lognormal(1.0, 1.0, rows), math.exp(1.5)),
}


@pytest.mark.parametrize("rows", [40, 400])
@pytest.mark.parametrize("name", DRAWS)
def test_95_of_100_intervals_contain_the_truth(name: str, rows: int) -> None:
    draw, truth = DRAWS[name]
    generator = np.random.default_rng(2026)
    found = [paired_interval(draw(generator, rows)) for _ in range(2000)]
    coverage = np.mean([interval.low <= truth <= interval.high for interval in found])
    assert 0.94 <= coverage <= 0.96


@pytest.mark.parametrize("rows", [40, 400])
@pytest.mark.parametrize(("better", "worse"), [(0.3, 0.1), (0.1, 0.05), (0.05, 0.05), (0.13, 0.0)])
def test_95_of_100_intervals_of_right_and_wrong_contain_the_truth(better: float, worse: float, rows: int) -> None:
    """Every outcome that is likelier than 1e-7, by its probability."""
    covered = 0.0
    for gained in range(rows + 1):
        for lost in range(rows + 1 - gained if worse else 1):
            ways = math.comb(rows, gained) * math.comb(rows - gained, lost)
            chance = ways * better**gained * worse**lost * (1 - better - worse) ** (rows - gained - lost)
            if chance > 1e-7:
                interval = paired_interval(answers(gained, lost, rows))
                covered += chance * (
                    interval.low <= 100 * (better - worse) + 1e-9 and interval.high >= 100 * (better - worse) - 1e-9
                )
    assert 0.94 <= covered <= 0.96


def answers(gained: int, lost: int, rows: int) -> np.ndarray:
    return np.array([100.0] * gained + [-100.0] * lost + [0.0] * (rows - gained - lost))


def test_the_interval_of_two_tests_of_hyper_reactive_airways() -> None:
    """21 children before and after, 1 and 7 changed: -0.517 to -0.026 (Fagerland, Lydersen and Laake 2014, Tango)."""
    interval = paired_interval(answers(1, 7, 21))
    assert (interval.low, interval.high) == pytest.approx((-51.7, -2.6), abs=0.05)


@pytest.mark.parametrize(("gained", "lost", "rows"), [(12, 4, 40), (2, 2, 40), (5, 0, 40), (40, 0, 40), (30, 60, 400)])
def test_a_score_test_rejects_what_is_outside(gained: int, lost: int, rows: int) -> None:
    """The chi-squared statistic of the best fit with that difference, found by search, is 1.96 squared at each end."""
    interval = paired_interval(answers(gained, lost, rows))
    for end in (interval.low / 100, interval.high / 100):
        if abs(end) == 1:
            continue
        q = np.linspace(max(0.0, -end), (1 - end) / 2, 400_001)[1:-1]  # the share that is lost
        with np.errstate(divide="ignore"):
            fit = gained * np.log(q + end) + lost * np.log(q) + (rows - gained - lost) * np.log(1 - 2 * q - end)
        best = q[int(np.nanargmax(fit))]
        statistic = (gained - lost - rows * end) ** 2 / (rows * (2 * best + end - end**2))
        assert statistic == pytest.approx(3.8415, rel=2e-3)


def test_one_changed_row_decides_nothing_and_all_rows_do_not_promise_all() -> None:
    assert paired_interval(answers(1, 0, 40)).low < 0
    assert 80 < paired_interval(answers(40, 0, 40)).low < 95
    assert paired_interval(np.zeros(40)) == Interval(0, 0, 0)


def test_a_p_value_of_right_and_wrong_is_that_of_mcnemar() -> None:
    assert p_value(answers(12, 4, 40)) == pytest.approx(0.0455, abs=1e-4)  # chi-squared 64 / 16 = 4, one degree
    assert p_value(answers(3, 3, 40)) == 1.0
    assert (p_value(answers(10, 3, 50)) < 0.05) == (paired_interval(answers(10, 3, 50)).low > 0)


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
@example([0.0, 7.8e-301])  # squares and cubes vanish
@example([0.0, 0.0, 7.8e-120])
def test_an_interval_holds_its_mean(values: list[float]) -> None:
    interval = paired_interval(np.array(values))
    assert interval.low <= interval.mean + 1e-9 and interval.mean <= interval.high + 1e-9
    assert all(map(math.isfinite, interval))
