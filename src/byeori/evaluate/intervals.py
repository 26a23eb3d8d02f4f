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
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

_T_OF_FEW = (12.7062, 4.3027, 3.1824, 2.7764)  # 97.5% quantile of t for 1 to 4 degrees of freedom
_STEPS = (-100.0, 0.0, 100.0)
_FEW_CHANGES = 5
_WIDER = 0.6


class Interval(NamedTuple):
    """A mean and its 95% interval, in the metric's unit; all NaN if there was nothing to measure."""

    mean: float
    low: float
    high: float


def paired_interval(difference: np.ndarray) -> Interval:
    """Return the mean difference and its 95% interval.

    difference [rows]: tuned minus base of each row; non-finite rows are left out. With one row (or equal rows) low =
    mean = high; that is not certainty, see metrics.FEWEST_ROWS. Without rows, all are NaN.
    """
    values = np.asarray(difference, dtype=np.float64)
    values = values[np.isfinite(values)]
    if values.size == 0:
        return Interval(math.nan, math.nan, math.nan)
    if values.min() == values.max():
        return Interval(float(values[0]), float(values[0]), float(values[0]))
    mean = float(values.mean())
    if np.isin(values, _STEPS).all():
        changed = values.size - max(int((values == step).sum()) for step in _STEPS)
        low, high = _student(np.append(values, [100.0, -100.0]) if changed < _FEW_CHANGES else values)
        low, high = max(low, -100.0), min(high, 100.0)
    else:
        lows, highs = zip(_student(values), _hall(values), strict=True)
        low = _WIDER * min(lows) + (1 - _WIDER) * max(lows)
        high = _WIDER * max(highs) + (1 - _WIDER) * min(highs)
    return Interval(mean, min(low, mean), max(high, mean))


def t_quantile(degrees: int) -> float:
    """Return the 97.5% quantile of Student's t, to 0.001 (Fisher's expansion; Abramowitz and Stegun 26.7.5)."""
    if degrees <= len(_T_OF_FEW):
        return _T_OF_FEW[degrees - 1]
    z = NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, 1))


def _student(values: np.ndarray) -> tuple[float, float]:
    reach = t_quantile(values.size - 1) * values.std(ddof=1) / math.sqrt(values.size)
    return float(values.mean() - reach), float(values.mean() + reach)


def _hall(values: np.ndarray) -> tuple[float, float]:
    """Return the interval of T = (mean - mu) / s made symmetric: T + g T^2 / 3 + g^2 T^3 / 27 + g / (6 n).

    g: the skewness of the values. The cubic is monotone, and its inverse is below.
    """
    rows, mean, spread = values.size, values.mean(), values.std()
    skew = float(((values - mean) ** 3).mean() / spread**3)
    if abs(skew) < 1e-6:
        return _student(values)
    error = values.std(ddof=1)
    reach = t_quantile(rows - 1) / math.sqrt(rows)

    def inverse(place: float) -> float:
        return 3 / skew * (float(np.cbrt(1 + skew * (place - skew / (6 * rows)))) - 1)

    return float(mean - error * inverse(reach)), float(mean - error * inverse(-reach))
