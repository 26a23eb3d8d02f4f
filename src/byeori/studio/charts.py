"""Curves as coordinates of an SVG: one chart, one line for each run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 220, 64, 550, 10, 190


def chart(lines: Sequence[tuple[str, Points]], *, limit: float | None = None) -> dict[str, Any] | None:
    """Return the coordinates of lines of (name, points), or None without any point. limit: a level to draw as well."""
    drawn = [(name, points) for name, points in lines if points]
    if not drawn:
        return None
    steps = [step for _, points in drawn for step, _ in points]
    values = [value for _, points in drawn for _, value in points] + ([limit] if limit is not None else [])
    ticks = _ticks(min(values), max(values))
    low, high = min(ticks[0], *values), max(ticks[-1], *values)
    first, last = min(steps), max(steps)

    def across(step: float) -> float:
        return round(LEFT + (step - first) / ((last - first) or 1) * (RIGHT - LEFT), 1)

    def up(value: float) -> float:
        return round(BOTTOM - (value - low) / ((high - low) or 1) * (BOTTOM - TOP), 1)

    return {
        "lines": [
            {
                "name": name,
                "path": "M" + "L".join(f"{across(step)} {up(value)}" for step, value in points),
                "dot": (across(points[0][0]), up(points[0][1])) if len(points) == 1 else None,
                "last": short(points[-1][1]),
                "first": short(points[0][1]),
            }
            for name, points in drawn
        ],
        "limit": up(limit) if limit is not None else None,
        "y_ticks": [(up(tick), short(tick)) for tick in ticks],
        "x_ticks": [(across(step), f"{step:,.0f}") for step in (first, (first + last) / 2, last)][
            : 3 if last > first else 1
        ],
    }


def _ticks(low: float, high: float) -> list[float]:
    """Return four to seven round numbers that cover low to high."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * 4 >= span * 0.999)
    start = math.floor(low / step)
    return [step * number for number in range(start, max(math.ceil(high / step), start + 1) + 1)]


def short(value: float) -> str:
    """Return a number for an axis: 0.0002 -> 2e-04, 12000 -> 12,000."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
