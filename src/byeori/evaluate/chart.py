"""Coordinates of the loss curve and of histograms, and what the curve says in words.

lines of train_log.jsonl ── loss_chart ──> paths, ticks, dots in a box of 720 x 310
numbers of several series ── histogram ──> outlines, ticks in a box of 720 x 220
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from byeori.support.language import tr
from byeori.support.pages import finite, number

# The SVG's view box, and the plot's edges inside it.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 310, 58, 706, 14, 270
_MOST_POINTS = 400  # more could not be told apart, and a long log would make the page heavy


def loss_chart(log: Sequence[Mapping[str, Any]], kept: int | None = None) -> dict[str, Any] | None:
    """Return the coordinates of the loss curve, or None if the log has no finite loss.

    kept: the step whose adapter was saved, which is marked.

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
        "kept": (place((min(max(kept, x_low), x_high), y_low))[0], kept) if kept is not None and evaluated else None,
        "description": _description(train, evaluated),
    }  # fmt: skip


def _description(train: list[tuple[float, float]], evaluated: list[tuple[float, float]]) -> str:
    """Return the curve in words, for screen readers."""
    parts = []
    for name, points in ((tr("Training loss"), train), (tr("Evaluation loss"), evaluated)):
        if len(points) == 1:
            step, loss = points[0]
            parts.append(tr("{name} {loss} at step {step}.", name=name, loss=f"{loss:.3f}", step=f"{step:,.0f}"))
        elif points:
            (first, start), (last, end) = points[0], points[-1]
            steps = {"first": f"{first:,.0f}", "last": f"{last:,.0f}"}
            losses = {"start": f"{start:.3f}", "end": f"{end:.3f}"}
            parts.append(
                tr("{name} from {start} at step {first} to {end} at step {last}.", name=name, **steps, **losses)
            )
    return " ".join(parts)


def kept_step(log: Sequence[Mapping[str, Any]], keep: str) -> int | None:
    """Return the step of the saved adapter: of the lowest eval_loss, or the last one; None for an empty log.

    keep: the setting of the run: auto, best or last.
    """
    steps = [int(step) for line in log if (step := finite(line.get("step"))) is not None]
    evaluated = _points(log, "eval_loss")
    if not steps:
        return None
    return (
        max(steps) if keep == "last" or not evaluated else int(min(evaluated, key=lambda step: (evaluated[step], step)))
    )


def fit_in_words(log: Sequence[Mapping[str, Any]], kept: int | None) -> str:
    """Return a sentence on overfitting: whether the evaluation loss rose again, and by how much; "" without a log.

    It counts as overfitting from 2% over the lowest, while the training loss went on falling or not.
    """
    evaluated = sorted(_points(log, "eval_loss").items())
    if not log:
        return ""
    if not evaluated:
        return tr("No rows were held out, so overfitting would not be seen; set val_set_size.")
    if len(evaluated) == 1:
        return tr("One evaluation does not show overfitting; set eval_steps for more.")
    best_step, best = min(evaluated, key=lambda point: point[1])
    last_step, last = evaluated[-1]
    values = {"best": f"{best:.3f}", "step": f"{best_step:,.0f}", "last": f"{last:.3f}"}
    if best_step == last_step:
        return tr(
            "The evaluation loss was lowest at the end ({best}): no overfitting, and more epochs might still help.",
            **values,
        )
    if last < 1.02 * best:
        said = tr(
            "The evaluation loss was lowest at step {step} ({best}) and flat from there ({last} at the end).", **values
        )
    else:
        said = tr(
            "Overfitting: the evaluation loss was lowest at step {step} ({best}) and rose to {last} by the end.",
            **values,
        )
    if kept == best_step:
        return f"{said} {tr('The adapter is that of step {step}.', step=values['step'])}"
    return f"{said} {tr('The adapter is that of the last step; see --keep.')}"


# ---- histograms ------------------------------------------------------------------------------------------------

_LOW = 220  # height of a histogram's box
_BINS = 24


def histogram(
    series: Mapping[str, Sequence[float | None]], *, limit: float | None = None, zero: bool = False
) -> dict[str, Any] | None:
    """Return outlines of several distributions over the same bins, or None without numbers.

    series: by the class of its line. The largest hundredth of all numbers shares the last bin, or one long text would
    squeeze the rest. limit: a number that is marked. zero: whether zero is marked.
    """
    values = {
        name: np.array([v for v in numbers if finite(v) is not None], dtype=float) for name, numbers in series.items()
    }
    everything = np.concatenate([*values.values(), np.zeros(0)])
    if not everything.size:
        return None
    low = min(0.0, float(everything.min()))
    high = float(np.percentile(everything, 99)) if everything.size > 100 else float(everything.max())
    high = max(high, limit or high, low + 1e-9)
    whole = bool((everything == np.round(everything)).all())
    ticks = _ticks(low, high, 6, whole=whole)
    low, high = ticks[0], ticks[-1]
    step = max((high - low) / _BINS, 1.0) if whole else (high - low) / _BINS
    edges = np.linspace(low, high, max(2, round((high - low) / step) + 1))
    counts = {name: np.histogram(np.clip(v, low, high), edges)[0] for name, v in values.items()}
    most = max(1, *(int(count.max()) for count in counts.values()))

    def across(value: float) -> float:
        return round(_LEFT + (value - low) / (high - low) * (_RIGHT - _LEFT), 1)

    def up(count: float) -> float:
        return round(_LOW - 40 - count / most * (_LOW - 54), 1)

    outlines = {}
    for name, count in counts.items():
        points = [(across(edges[0]), up(0))]
        for at, height in enumerate(count):
            points += [(across(edges[at]), up(height)), (across(edges[at + 1]), up(height))]
        outlines[name] = _path([*points, (across(edges[-1]), up(0))]) if values[name].size else ""
    y_ticks = [tick for tick in _ticks(0, most, 3, whole=True) if tick <= most]
    return {
        "width": _WIDTH, "height": _LOW, "left": _LEFT, "right": _RIGHT, "top": 14, "bottom": _LOW - 40,
        "outlines": outlines,
        "x_ticks": [(across(tick), number(tick, _digits(ticks[1] - ticks[0]))) for tick in ticks],
        "y_ticks": [(up(tick), f"{tick:,.0f}") for tick in y_ticks],
        "limit": across(limit) if limit is not None else None,
        "zero": across(0.0) if zero and low < 0 < high else None,
    }  # fmt: skip


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
