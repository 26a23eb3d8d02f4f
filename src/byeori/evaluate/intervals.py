"""95% intervals for the mean of paired differences, whose coverage was measured (benchmarks/coverage.py).

A bootstrap's percentiles are too narrow at 40 rows and miss skewed differences on one side. The interval here lies, at
each end, between two: Student's t, too short for skewed rows, and Hall's transformation of t, which corrects for
skewness (Hall 1992, On the removal of skewness by transformation) and is too short for heavy tails. It reaches six
tenths of the way to the wider one, which covers both kinds 95 times in 100, by simulation. Differences that are only
-100, 0 and 100 (two models right or wrong) take t alone, which skewness estimated from a few rows would spoil; where
fewer than 5 rows differ from the most common outcome, one row of each sign is added (Bonett and Price 2012).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

_STEPS = (-100.0, 0.0, 100.0)
_FEW_CHANGES = 5
_WIDER = 0.6


class Interval(NamedTuple):
    """A mean and its interval, in the metric's unit; all NaN if there was nothing to measure."""

    mean: float
    low: float
    high: float


def paired_interval(difference: np.ndarray, confidence: float = 0.95) -> Interval:
    """Return the mean difference and its interval.

    difference [rows]: tuned minus base of each row; non-finite rows are left out. With one row (or equal rows) low =
    mean = high; that is not certainty, see metrics.FEWEST_ROWS. Without rows, all are NaN.
    """
    values = _finite(difference)
    if values.size == 0:
        return Interval(math.nan, math.nan, math.nan)
    if values.min() == values.max():
        return Interval(float(values[0]), float(values[0]), float(values[0]))
    mean, t = float(values.mean()), t_quantile(values.size - 1, confidence)
    if np.isin(values, _STEPS).all():
        steps = _with_changes(values)
        low, high = _student(steps, t_quantile(steps.size - 1, confidence))
        low, high = max(low, -100.0), min(high, 100.0)
    else:
        lows, highs = zip(_student(values, t), _hall(values, t), strict=True)
        low = _WIDER * min(lows) + (1 - _WIDER) * max(lows)
        high = _WIDER * max(highs) + (1 - _WIDER) * min(highs)
    return Interval(mean, min(low, mean), max(high, mean))


def p_value(difference: np.ndarray) -> float:
    """Return the two-sided p-value of a mean difference of zero, from the t statistic of the rows.

    difference [rows]: as for `paired_interval`. Equal models have 1.0, and so has a single row.
    """
    values = _finite(difference)
    if values.size < 2 or not values.any():
        return 1.0
    if np.isin(values, _STEPS).all():
        values = _with_changes(values)
    spread = values.std(ddof=1)
    return 0.0 if spread == 0 else 1 - _within(abs(values.mean()) * math.sqrt(values.size) / spread, values.size - 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values corrected for their number (Holm 1979): at 0.05, one false claim in 20 families or fewer."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p_values[index]))
        corrected[index] = largest
    return corrected


@cache
def t_quantile(degrees: int, confidence: float = 0.95) -> float:
    """Return how far Student's t reaches to both sides with this probability, by bisection."""
    low, high = 0.0, 1.0
    while _within(high, degrees) < confidence:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < confidence else (low, middle)
    return high


def _within(t: float, degrees: int) -> float:
    """Return the probability that Student's t lies within -t and t, a finite sum (Abramowitz and Stegun 26.7.3-4)."""
    angle = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    steps = np.arange(1 + odd, degrees - 2 + odd, 2, dtype=np.float64)
    terms = np.cumprod(np.append(1.0, steps / (steps + 1) * math.cos(angle) ** 2))
    if degrees == 1:
        return 2 / math.pi * angle
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * math.cos(angle) * float(terms.sum()))
    return math.sin(angle) * float(terms.sum())


def _finite(difference: np.ndarray) -> np.ndarray:
    values = np.asarray(difference, dtype=np.float64)
    return values[np.isfinite(values)]


def _with_changes(values: np.ndarray) -> np.ndarray:
    """Return differences of right and wrong, with a row of each sign if few differ from the most common outcome."""
    changed = values.size - max(int((values == step).sum()) for step in _STEPS)
    return np.append(values, [100.0, -100.0]) if changed < _FEW_CHANGES else values


def _student(values: np.ndarray, t: float) -> tuple[float, float]:
    reach = t * values.std(ddof=1) / math.sqrt(values.size)
    return float(values.mean() - reach), float(values.mean() + reach)


def _hall(values: np.ndarray, t: float) -> tuple[float, float]:
    """Return the interval of T = (mean - mu) / s made symmetric: T + g T^2 / 3 + g^2 T^3 / 27 + g / (6 n).

    g: the skewness of the values. The cubic is monotone, and its inverse is below.
    """
    rows, mean, spread = values.size, values.mean(), values.std()
    skew = float(((values - mean) ** 3).mean() / spread**3)
    if abs(skew) < 1e-6:
        return _student(values, t)
    error = values.std(ddof=1)
    reach = t / math.sqrt(rows)

    def inverse(place: float) -> float:
        return 3 / skew * (float(np.cbrt(1 + skew * (place - skew / (6 * rows)))) - 1)

    return float(mean - error * inverse(reach)), float(mean - error * inverse(-reach))
