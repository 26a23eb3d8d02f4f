"""Coordinates of the loss curve, and a description of it.

lines of train_log.jsonl ── loss_chart ──> paths, ticks, dots in a box of 720 x 310
"""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

# The SVG's view box, and the plot's edges inside it.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 310, 58, 706, 14, 270
_MOST_POINTS = 400  # more could not be told apart, and a long log would make the page heavy


def loss_chart(log: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the coordinates of the loss curve, or None if the log has no finite loss.

    The smoothed line is a centred mean over about a fifteenth of the steps, so it does not lag. If a step appears
    twice (in a resumed run), its later line counts.
    """
    train = _thin(sorted(_points(log, "loss").items()))
    evaluated = sorted(_points(log, "eval_loss").items())
    if not train and not evaluated:
        return None
    steps = [step for step, _ in train + evaluated]
    losses = [loss for _, loss in train + evaluated]
    x_low, x_high = min(steps), max(steps)
    y_ticks = _ticks(min(losses), max(losses), 5)
    y_low, y_high = min(y_ticks[0], *losses), max(y_ticks[-1], *losses)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across = (point[0] - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        up = (point[1] - y_low) / (y_high - y_low)
        return round(_LEFT + across * (_RIGHT - _LEFT), 1), round(_BOTTOM - up * (_BOTTOM - _TOP), 1)

    x_ticks = [tick for tick in _ticks(x_low, x_high, 6, whole=True) if x_low <= tick <= x_high] or [x_low]
    window = max(1, len(train) // 15)
    smooth = _moving_mean([loss for _, loss in train], window)
    step_size = y_ticks[1] - y_ticks[0]
    return {
        "width": _WIDTH, "height": _HEIGHT, "left": _LEFT, "right": _RIGHT, "top": _TOP, "bottom": _BOTTOM,
        "train": _path([place(point) for point in train]),
        "smooth": _path([place((s, v)) for (s, _), v in zip(train, smooth, strict=True)]) if window > 2 else "",
        "dot": place(train[0]) if len(train) == 1 else None,
        "evaluated": [place(point) for point in evaluated],
        "evaluated_path": _path([place(point) for point in evaluated]),
        "x_ticks": [(place((tick, y_low))[0], f"{tick:,.0f}") for tick in x_ticks],
        "y_ticks": [(place((x_low, tick))[1], f"{tick:.{_digits(step_size)}f}") for tick in y_ticks],
        "description": _description(train, evaluated),
    }  # fmt: skip


def _description(train: list[tuple[float, float]], evaluated: list[tuple[float, float]]) -> str:
    """Return the curve in words, for screen readers."""
    parts = []
    for name, points in (("Training loss", train), ("Evaluation loss", evaluated)):
        if len(points) == 1:
            parts.append(f"{name} {points[0][1]:.3f} at step {points[0][0]:,.0f}.")
        elif points:
            (first, start), (last, end) = points[0], points[-1]
            parts.append(f"{name} from {start:.3f} at step {first:,.0f} to {end:.3f} at step {last:,.0f}.")
    return " ".join(parts)


def _points(log: Sequence[Mapping[str, Any]], key: str) -> dict[float, float]:
    pairs = ((finite(line.get("step")), finite(line.get(key))) for line in log)
    return {step: loss for step, loss in pairs if step is not None and loss is not None}


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average neighbours until at most _MOST_POINTS points are left, so that no spike is lost by chance."""
    if len(points) <= _MOST_POINTS:
        return points
    groups = np.array_split(np.array(points), _MOST_POINTS)
    return [(float(group[:, 0].mean()), float(group[:, 1].mean())) for group in groups]


def _moving_mean(values: Sequence[float], window: int) -> list[float]:
    """Return centred means over about `window` values; the window narrows at the ends."""
    half = max(1, window // 2)
    return [float(np.mean(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]


def _ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """Return about `count`, at least two, round numbers (1, 2 or 5 times a power of ten) that cover low..high."""
    span = high - low
    if span < 1e-6 * max(1.0, abs(high)):  # a flat line still needs an axis
        span = max(1.0, abs(high))
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * count >= span * 0.999)
    if whole:
        step = max(1.0, step)
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    return [index * step for index in range(first, last + 1)]


def _digits(step: float) -> int:
    return max(0, -math.floor(math.log10(step) + 1e-9))


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x} {y}" for x, y in points) if len(points) > 1 else ""


def finite(value: object) -> float | None:
    """Return a finite number as a float, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return float(value) if math.isfinite(value) else None
