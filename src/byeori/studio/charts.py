"""Curves as coordinates of an SVG: one chart, one line for each run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 220, 64, 550, 10, 190


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A curve. number: of the run, whose lines look the same in every chart. points: (step, value)."""

    name: str
    number: int
    evaluation: bool
    points: Sequence[tuple[float, float]]


def chart(lines: Sequence[Line]) -> dict[str, Any] | None:
    """Return the coordinates of lines, or None without any point."""
    drawn = [line for line in lines if line.points]
    if not drawn:
        return None
    steps = [step for line in drawn for step, _ in line.points]
    values = [value for line in drawn for _, value in line.points]
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
                "name": line.name,
                "number": line.number,
                "evaluation": line.evaluation,
                "path": "M" + "L".join(f"{across(step)} {up(value)}" for step, value in line.points),
                "dot": (across(line.points[0][0]), up(line.points[0][1])) if len(line.points) == 1 else None,
                "last": short(line.points[-1][1]),
                "first": short(line.points[0][1]),
            }
            for line in drawn
        ],
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
