"""A plan as a picture: cost against time of every machine, and what does not fit. One HTML file without scripts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from byeori.plan.candidates import Candidate, middle
from byeori.plan.report import PlanResult, dollars, hours

# The SVG's view box, and the plot's edges inside it.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 960, 520, 70, 930, 20, 460
_LABEL = 15  # height of a label
_HOURS = (1 / 60, 2 / 60, 5 / 60, 10 / 60, 20 / 60, 0.5, 1, 2, 4, 8, 12, 24, 48, 96, 240, 480, 960, 2400)


def render(plan: PlanResult) -> str:
    """Return the page."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    groups = plan.by_machine()
    best: dict[int, str] = {}
    for order, candidate in plan.firsts().items():
        best[id(candidate)] = ", ".join(filter(None, [best.get(id(candidate)), order]))
    shown = [candidate for group in groups for candidate in group]
    return environment.get_template("page.html.j2").render(
        plan=plan,
        chart=chart([c for c in shown if c.fits and c.hours and c.cost], best),
        rows=[_row(candidate, best.get(id(candidate), "")) for candidate in shown],
    )


def _row(candidate: Candidate, order: str) -> dict[str, Any]:
    gib = 2**30
    price = candidate.price
    return {
        "name": f"{candidate.machine.name} x {candidate.count}",
        "order": order,
        "fits": candidate.fits,
        "time": hours(candidate.hours) if candidate.fits else "",
        "cost": dollars(candidate.cost) if candidate.fits else "",
        "price": f"${price.usd_per_gpu_hour:,.2f}, {price.provider}" if price else "no price",
        "settings": candidate.label or "as given",
        "used": round(100 * min(1.5, candidate.need / candidate.machine.memory)),
        "memory": f"{candidate.need / gib:,.1f} of {candidate.machine.memory / gib:,.1f} GiB" if candidate.need else "",
        "lacks": f"lacks {candidate.lacks / gib:,.1f} GiB" if candidate.need and not candidate.fits else "",
    }


def chart(candidates: Sequence[Candidate], best: dict[int, str]) -> dict[str, Any] | None:
    """Return the coordinates of every candidate's ranges on logarithmic axes, hours across and dollars up."""
    if not candidates:
        return None
    times = [bound for candidate in candidates for bound in candidate.hours or ()]
    costs = [bound for candidate in candidates for bound in candidate.cost or ()]
    x_low, x_high = min(times) / 1.15, max(times) * 1.6
    y_low, y_high = max(min(costs), 1e-3) / 1.2, max(costs) * 1.2

    def across(value: float) -> float:
        return round(_LEFT + math.log(value / x_low) / math.log(x_high / x_low) * (_RIGHT - _LEFT), 1)

    def up(value: float) -> float:
        return round(_BOTTOM - math.log(max(value, y_low) / y_low) / math.log(y_high / y_low) * (_BOTTOM - _TOP), 1)

    money = [step * 10**power for power in range(-3, 7) for step in (1, 2, 5)]
    points = [_point(candidate, across, up, best.get(id(candidate), "")) for candidate in candidates]
    return {
        "width": _WIDTH, "height": _HEIGHT, "left": _LEFT, "right": _RIGHT, "top": _TOP, "bottom": _BOTTOM,
        "points": _without_overlaps(points),
        "x_ticks": [(across(value), hours((value, value))) for value in _HOURS if x_low <= value <= x_high],
        "y_ticks": [(up(value), f"${value:,.2f}" if value < 1 else f"${value:,.0f}") for value in money
                    if y_low <= value <= y_high],
    }  # fmt: skip


def _point(candidate: Candidate, across: Any, up: Any, order: str) -> dict[str, Any]:
    times, costs = candidate.hours or (1.0, 1.0), candidate.cost or (1.0, 1.0)
    name = f"{candidate.machine.name} x {candidate.count}"
    return {
        "name": f"{name}: {order}" if order else name,
        "order": order,
        "x": across(middle(times)), "y": up(middle(costs)),
        "x1": across(times[0]), "x2": across(times[1]), "y1": up(costs[0]), "y2": up(costs[1]),
        "title": f"{name}: {hours(times)}, {dollars(costs)}, {candidate.label}",
    }  # fmt: skip


def _without_overlaps(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give every label a place beside its point where no other label is; those of the best machines first."""
    taken: list[tuple[float, float, float]] = []
    for point in sorted(points, key=lambda point: not point["order"]):
        width = 6.6 * len(point["name"])
        right = point["x"] + 9 + width < _WIDTH
        left = point["x"] + 9 if right else point["x"] - 9 - width
        free = (
            point["y"] + shift * _LABEL
            for shift in (0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5)
            if all(
                abs(point["y"] + shift * _LABEL - y) >= _LABEL or left > end or left + width < start
                for start, end, y in taken
            )
        )
        point["label_x"], point["label_y"] = left, next(free, point["y"])
        taken.append((left, left + width, point["label_y"]))
    return points
