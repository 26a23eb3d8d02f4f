"""95% intervals for the mean of paired differences, whose coverage was measured (benchmarks/coverage.py).

A bootstrap's percentiles are too narrow at 40 rows and miss skewed differences on one side. The interval here lies, at
each end, halfway between two: Student's t, too short for skewed rows, and Hall's transformation of t, which corrects
for skewness (Hall 1992, On the removal of skewness by transformation) and is too short for heavy tails. A few rows show
less than the skewness there is, so it is taken 1 + 18 / rows times, by simulation. Differences that are only -100, 0
and 100 (two models right or wrong) take Tango's score interval for paired proportions (Tango 1998), and their p-value
is McNemar's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

_STEPS = (-100.0, 0.0, 100.0)
_UNSEEN_SKEW = 18


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
    mean = float(values.mean())
    if values.min() == values.max() and (values.size == 1 or mean not in (-100.0, 100.0)):
        return Interval(mean, mean, mean)
    if np.isin(values, _STEPS).all():
        low, high = _tango(values, confidence)
    else:
        t = t_quantile(values.size - 1, confidence)
        (low, high), (hall_low, hall_high) = _student(values, t), _hall(values, t)
        low, high = (low + hall_low) / 2, (high + hall_high) / 2
    return Interval(mean, min(low, mean), max(high, mean))


def p_value(difference: np.ndarray) -> float:
    """Return the two-sided p-value of a mean difference of zero: of the t statistic, or McNemar's of right and wrong.

    difference [rows]: as for `paired_interval`. Equal models have 1.0, and so has a single row.
    """
    values = _finite(difference)
    if values.size < 2 or not values.any():
        return 1.0
    if np.isin(values, _STEPS).all():
        return math.erfc(abs(values.sum()) / math.sqrt(2 * (values**2).sum()))
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


def _tango(values: np.ndarray, confidence: float) -> tuple[float, float]:
    """Return the differences of two paired proportions, in percent, that a score test would not reject.

    For a difference d, the share q of rows in which the first is right alone is estimated under d (Tango 1998, eq. 5).
    """
    rows, gained, lost = values.size, int((values > 0).sum()), int((values < 0).sum())
    z = NormalDist().inv_cdf((1 + confidence) / 2)

    def rejected(d: float) -> bool:
        linear, constant = (2 * rows - gained + lost) * d - gained - lost, -lost * d * (1 - d)
        q = (math.sqrt(max(0.0, linear**2 - 8 * rows * constant)) - linear) / (4 * rows)
        variance = rows * (2 * q + d * (1 - d))
        return (gained - lost - rows * d) ** 2 > z**2 * max(variance, 0.0)

    def end(outside: float) -> float:
        inside = (gained - lost) / rows
        if not rejected(outside):
            return outside
        for _ in range(50):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if rejected(middle) else (middle, outside)
        return inside

    return 100 * end(-1.0), 100 * end(1.0)


def _student(values: np.ndarray, t: float) -> tuple[float, float]:
    reach = t * values.std(ddof=1) / math.sqrt(values.size)
    return float(values.mean() - reach), float(values.mean() + reach)


def _hall(values: np.ndarray, t: float) -> tuple[float, float]:
    """Return the interval of T = (mean - mu) / s made symmetric: T + g T^2 / 3 + g^2 T^3 / 27 + g / (6 n).

    g: the skewness of the values, with what few rows do not show. The cubic is monotone, and its inverse is below.
    """
    rows, mean, spread = values.size, values.mean(), values.std()
    skew = (1 + _UNSEEN_SKEW / rows) * float((((values - mean) / spread) ** 3).mean()) if spread else 0.0
    if abs(skew) < 1e-6:
        return _student(values, t)
    error = values.std(ddof=1)
    reach = t / math.sqrt(rows)

    def inverse(place: float) -> float:
        return 3 / skew * (float(np.cbrt(1 + skew * (place - skew / (6 * rows)))) - 1)

    return float(mean - error * inverse(reach)), float(mean - error * inverse(-reach))
