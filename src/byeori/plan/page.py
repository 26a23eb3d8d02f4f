"""A plan as a picture: cost against time of every machine, and what does not fit. One HTML file without scripts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from byeori.plan.candidates import Candidate, middle
from byeori.plan.report import PlanResult, dollars, hours
from byeori.support import pages
from byeori.support.language import tr, translated

# The SVG's view box, and the plot's edges inside it.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 960, 520, 70, 930, 20, 460
_LABEL = 15  # height of a label
_HOURS = (1 / 60, 2 / 60, 5 / 60, 10 / 60, 20 / 60, 0.5, 1, 2, 4, 8, 12, 24, 48, 96, 240, 480, 960, 2400)


def render(plan: PlanResult) -> str:
    """Return the page."""
    groups = plan.by_machine()
    best: dict[int, str] = {}
    for order, candidate in plan.firsts().items():
        best[id(candidate)] = ", ".join(filter(None, [best.get(id(candidate)), order]))
    shown = [candidate for group in groups for candidate in group]
    return pages.render(
        "plan/page.html.j2",
        title=tr("Plan: {objective} of {model}", objective=plan.objective.upper(), model=plan.model),
        facts=[_sentence(fact) for fact in (plan.about, plan.workload.source, *plan.notes)],
        chart=chart([c for c in shown if c.fits and c.hours and c.cost], best),
        rows=[_row(candidate, best.get(id(candidate), "")) for candidate in shown],
    )


def _sentence(fact: str) -> str:
    """Return a fact of the plan as a sentence in the language of the page."""
    said = translated(fact)
    if said == fact:
        said = said[:1].upper() + said[1:]
    return said if said.endswith((".", "?", "!")) else f"{said}."


def _tick(value: float) -> str:
    return tr("{count} h", count=f"{value:g}") if value > 1 else translated(hours((value, value)))


def _row(candidate: Candidate, order: str) -> dict[str, Any]:
    gib = 2**30
    price = candidate.price
    return {
        "name": f"{candidate.machine.name} x {candidate.count}",
        "order": ", ".join(map(tr, order.split(", "))) if order else "",
        "fits": candidate.fits,
        "time": translated(hours(candidate.hours)) if candidate.fits else "",
        "cost": translated(dollars(candidate.cost)) if candidate.fits else "",
        "price": f"${price.usd_per_gpu_hour:,.2f}, {price.provider}" if price else tr("no price"),
        "settings": candidate.label or tr("as given"),
        "used": round(100 * min(1.5, candidate.need / candidate.machine.memory)),
        "memory": f"{candidate.need / gib:,.1f} / {candidate.machine.memory / gib:,.1f} GiB" if candidate.need else "",
        "lacks": tr("lacks {gib} GiB", gib=f"{candidate.lacks / gib:,.1f}")
        if candidate.need and not candidate.fits
        else "",
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
        "x_ticks": [(across(value), _tick(value)) for value in _HOURS if x_low <= value <= x_high],
        "y_ticks": [(up(value), f"${value:,.2f}" if value < 1 else f"${value:,.0f}") for value in money
                    if y_low <= value <= y_high],
    }  # fmt: skip


def _point(candidate: Candidate, across: Any, up: Any, order: str) -> dict[str, Any]:
    times, costs = candidate.hours or (1.0, 1.0), candidate.cost or (1.0, 1.0)
    name = candidate.machine.name + (f" x {candidate.count}" if candidate.count > 1 else "")
    return {
        "name": f"{name}: {', '.join(map(tr, order.split(', ')))}" if order else name,
        "order": order,
        "x": across(middle(times)), "y": up(middle(costs)),
        "x1": across(times[0]), "x2": across(times[1]), "y1": up(costs[0]), "y2": up(costs[1]),
        "title": f"{name}: {translated(hours(times))}, {translated(dollars(costs))}, {candidate.label}",
    }  # fmt: skip


def _without_overlaps(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give every label the nearest place beside its point without another label or point; the best machines first.

    A label that does not stand right beside its point gets a line that leads to it.
    """
    taken = [_around(point) for point in points]
    for point in sorted(points, key=lambda point: not point["order"]):
        width = (7.6 if point["order"] else 6.9) * len(point["name"])
        others = [box for box in taken if box != _around(point)]
        free = (place for place in _places(point, width) if not any(_meet(_box(place, width), box) for box in others))
        found = next(free, (point["x"] + 9, point["x"] + 9, point["y"]))
        taken.append(_box(found, width))
        point["label_x"], lead, point["label_y"] = (round(value, 1) for value in found)
        point["lead_x"] = lead if abs(lead - point["x"]) + abs(point["label_y"] - point["y"]) > 12 else None
    return points


def _places(point: dict[str, Any], width: float) -> list[tuple[float, float, float]]:
    """Return where a label may begin, where a line to it ends, and its height; the nearest first."""
    found = []
    for shift in range(-_LABEL * 9, _LABEL * 9 + 1, 3):
        y = point["y"] + shift
        for away in (9, 24, 48):
            right, left = point["x"] + away, point["x"] - away
            found += [(abs(shift) + away, right, right, y), (abs(shift) + away + 1, left - width, left, y)]
    inside = [place for _, *place in sorted(found) if _LEFT < place[0] < _WIDTH - width and _TOP < place[2] < _BOTTOM]
    return [(x, lead, y) for x, lead, y in inside]


def _box(place: tuple[float, float, float], width: float) -> tuple[float, float, float, float]:
    x, _, y = place
    return x, x + width, y - _LABEL / 2, y + _LABEL / 2


def _around(point: dict[str, Any]) -> tuple[float, float, float, float]:
    return point["x"] - 6, point["x"] + 6, point["y"] - 6, point["y"] + 6


def _meet(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[1] and other[0] < one[1] and one[2] < other[3] and other[2] < one[3]
