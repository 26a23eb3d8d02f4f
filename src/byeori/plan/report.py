"""A plan: its result, in words, as a table with a line for each machine, and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from byeori.plan import prices, speed
from byeori.plan.candidates import OUTSIDE, Candidate, middle, ranked, worth_showing
from byeori.plan.machines import GIB, Range, Service, Table
from byeori.plan.prices import Price
from byeori.plan.rehearsal import PARTS, Rehearsal
from byeori.plan.workload import Workload

ORDERS = ("cheapest", "fastest", "smallest")
_EXPLAINED = 40  # lines of --explain
_NEAREST = 3  # machines that do not fit, by name
# Young (1974): checkpoints every sqrt(2 * seconds to write one * seconds between losses) lose least.
_CHECKPOINT_SECONDS, _SPOT_LASTS = 5.0, 2 * 3600.0  # assumed: adapters are small; spot machines last hours
_MOMENTS = {
    "forward": "in the forward pass",
    "head": "in the output layer",
    "head back": "after the output layer",
    "optimizer": "in the optimizer",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanResult:
    """What a run needs and on which machine.

    model: its name. objective: sft or dpo. weights: how many the model has. about: a sentence on what is trained.
    notes: sentences about the run. workload, table: what the run computes, and the machines with their assumptions.
    candidates: the best settings on every machine and number of them. ranked: those that fit, best first, by `order`.
    calibration: what a real step here took, if asked for.
    """

    model: str
    objective: str
    weights: int
    about: str
    notes: tuple[str, ...]
    workload: Workload
    table: Table
    candidates: tuple[Candidate, ...]
    ranked: tuple[Candidate, ...]
    order: str = "cheapest"
    calibration: dict[str, Any] | None = None

    @property
    def best(self) -> Candidate | None:
        """The first of the ranked ones; None if nothing fits."""
        return self.ranked[0] if self.ranked else None

    def firsts(self) -> dict[str, Candidate]:
        """Return the cheapest, the fastest and the smallest that fit, that of the plan's own order first."""
        orders = sorted(ORDERS, key=lambda order: order != self.order)
        return {order: ranked(self.candidates, order)[0] for order in orders if self.ranked}

    def by_machine(self) -> list[list[Candidate]]:
        """Return the candidates that are worth a line, by machine, the best first."""
        names = dict.fromkeys(candidate.machine.name for candidate in (*self.ranked, *self.candidates))
        groups = [[c for c in self.candidates if c.machine.name == name] for name in names]
        firsts = list(self.firsts().values())
        return [[c for c in group if c in worth_showing(group) or c in firsts] for group in groups]

    def as_json(self) -> dict[str, Any]:
        """Return the whole plan as plain values; bytes, hours and dollars, ranges as [least, most]."""
        plan = {
            "model": self.model,
            "objective": self.objective,
            "weights": self.weights,
            "about": self.about,
            "notes": list(self.notes),
            "rows": self.workload.source,
            "steps": self.workload.steps,
            "tokens": round(self.workload.tokens),
            "machines": {"source": self.table.source, "date": self.table.date},
            "start_hours": list(self.table.start),
            "best": self.best and _candidate_json(self.best),
            "offers": [_candidate_json(candidate) for candidate in self.candidates],
        }
        return plan if self.calibration is None else plan | {"calibration": self.calibration}


def _candidate_json(candidate: Candidate) -> dict[str, Any]:
    machine, price = candidate.machine, candidate.price
    return {
        "machine": machine.name,
        "count": candidate.count,
        "fits": candidate.fits,
        "refused": candidate.refused or None,
        "settings": candidate.settings or None,
        "memory_bytes": machine.memory,
        "need_bytes": candidate.need,
        "allocated_bytes": candidate.allocated,
        "parts_bytes": {part: candidate.parts.get(part, 0) for part in (*PARTS, OUTSIDE)},
        "tokens_per_second": _rounded(candidate.tokens_per_second, 1),
        "step_seconds": _rounded(candidate.step_seconds, 4),
        "hours": _rounded(candidate.hours, 4),
        "usd_per_gpu_hour": price and price.usd_per_gpu_hour,
        "provider": price and price.provider,
        "price_date": price and price.date,
        "cost_usd": _rounded(candidate.cost, 2),
        **speed.settings_of(machine),
    }


def _rounded(bounds: Range | None, digits: int) -> list[float] | None:
    return bounds and [round(each, digits) for each in bounds]


# ---- in words --------------------------------------------------------------------------------------------------------


def lines(plan: PlanResult, command: str) -> list[str]:
    """Return the plan in at most twelve lines. command: `byeori rent` or what comes next."""
    work = plan.workload
    out = [
        f"{plan.objective.upper()} of {plan.model}, {_count(plan.weights)} weights: {plan.about}",
        f"{work.steps:,} steps, {_count(work.tokens)} tokens; {work.source}",
    ]
    out += [f"Note: {'; '.join(plan.notes)}"] if plan.notes else []
    out += _chosen(plan)
    for line in (_free(plan), _links(plan), _too_small(plan), _spot(plan), _dates(plan)):
        out += [line] if line else []
    return [*out, f"Next: {command}"]


def _chosen(plan: PlanResult) -> list[str]:
    """A line for the cheapest, the fastest and the smallest."""
    if plan.best is None:
        possible = [candidate for candidate in plan.candidates if candidate.need]
        nearest = min(possible, key=lambda candidate: candidate.need / candidate.machine.memory)
        return [f"Nothing here is enough: {_name(nearest)} lacks {_gib(nearest.lacks)} GiB with {nearest.label}"]
    first: dict[tuple[str, int], tuple[list[str], Candidate]] = {}
    for order, candidate in plan.firsts().items():
        first.setdefault((candidate.machine.name, candidate.count), ([], candidate))[0].append(order)
    if len(first) == 1:
        return _columns([("Best", *_cells(plan.best))])
    rows = [(", ".join(orders).capitalize(), *_cells(candidate)) for orders, candidate in first.values()]
    return _columns(rows)


def _cells(candidate: Candidate) -> tuple[str, ...]:
    price = candidate.price
    memory = f"{_gib(candidate.need)} of {_gib(candidate.machine.memory)} GiB"
    hourly = f"${price.usd_per_gpu_hour:,.2f} an hour{' each' if candidate.count > 1 else ''}" if price else "no price"
    provider = f", {price.provider}" if price and price.provider else ""
    return (
        _name(candidate),
        hours(candidate.hours),
        dollars(candidate.cost),
        memory,
        candidate.label or "as given",
        hourly + provider,
    )


def table(plan: PlanResult) -> list[str]:
    """Return one line for each machine, and for a larger number of it where that is cheaper."""
    rows = [("GPU", "time", "cost", "memory", "settings", "price", "others")]
    for candidate in [each for group in plan.by_machine() for each in group]:
        if candidate.refused:
            rows.append((_name(candidate), "-", "-", "-", candidate.refused, "-", ""))
            continue
        name, time, cost, memory, label, price = _cells(candidate)
        if not candidate.fits:
            time, cost, label = "-", "-", f"does not fit: lacks {_gib(candidate.lacks)} GiB with {label}"
        rows.append((name, time, cost, memory, label, price, _others(plan, candidate)))
    low, high = plan.table.layer_seconds
    return [
        *_columns(rows),
        "",
        "memory: what nvidia-smi will show (of which PyTorch allocates "
        f"all but {plan.table.context / GIB:.1f} GiB and {plan.table.fragmentation:.0%} of what is not weights).",
        f"time: {low * 1000:g} to {high * 1000:g} ms a layer at least, and a share of the peak: "
        + "; ".join(f"{name} {text}" for name, text in _shares(plan).items())
        + ".",
        f"cost: the cheapest offer, with {hours(plan.table.start)} of starting the machine.",
        f"GPU figures: {plan.table.source} ({plan.table.date}).",
    ]


def _shares(plan: PlanResult) -> dict[str, str]:
    shares: dict[str, list[str]] = {}
    for machine in dict.fromkeys(candidate.machine for candidate in plan.candidates):
        low, high = machine.share
        shares.setdefault(f"{low:.0%} to {high:.0%} ({machine.share_source})", []).append(machine.name)
    return {", ".join(names): text for text, names in shares.items()}


def _others(plan: PlanResult, candidate: Candidate) -> str:
    known = prices.offers(plan.table.prices, candidate.machine.name, candidate.count)
    if len(known) < 2:
        return ""
    return f"{len(known)} providers, to ${known[-1].usd_per_gpu_hour:,.2f} ({known[-1].provider})"


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _free(plan: PlanResult) -> str:
    """What free notebooks can do, by name, and what to use where their time is too short."""
    found = [
        (service, candidate)
        for service in plan.table.services
        for candidate in plan.candidates
        if (candidate.machine.name, candidate.count) == (service.gpu, service.count) and not candidate.refused
    ]
    enough = [service.name for service, c in found if c.fits and c.hours and c.hours[1] <= service.session]
    rented = plan.best.price.provider if plan.best and plan.best.price else ""
    instead = " or ".join(filter(None, [*enough, rented]))
    parts = [f"{service.name} ({_name(c)}) {_in_sessions(c, service, instead)}" for service, c in found]
    return "Free: " + "; ".join(parts) if parts else ""


def _in_sessions(candidate: Candidate, service: Service, instead: str) -> str:
    if not candidate.fits:
        return f"lacks {_gib(candidate.lacks)} GiB"
    text = f"fits with {candidate.label}, {hours(candidate.hours)}"
    if candidate.hours is None or candidate.hours[1] <= service.session:
        return text
    use = f", use {instead}" if instead else ""
    if service.weekly is not None and candidate.hours[0] > service.weekly:
        return f"{text}, longer than the {service.weekly:g} hours of a week{use}"
    may = "may be longer" if candidate.hours[0] <= service.session else "longer"
    return f"{text}, {may} than a session ({service.session:g} h){use}"


def _links(plan: PlanResult) -> str:
    """What a slow link does to the best run with weights that had to be sharded."""
    shown = [candidate for group in plan.by_machine() for candidate in group if candidate.fits]
    slow = [c for c in shown if c.gathering and c.machine.link.startswith("PCIe")]
    one = max(slow, key=lambda candidate: candidate.count, default=None)
    if one is None or one.gathering is None or one.hours is None:
        return ""
    waits = one.gathering
    return (
        f"PCIe: {_name(one)} spends {hours(waits)} of {hours(one.hours)} on gathering weights from the other cards"
        + (", more than on computing" if waits[1] > one.hours[1] / 2 else "")
    )


def _too_small(plan: PlanResult) -> str:
    """What does not fit, and by how much the nearest do not."""
    lasts = [group[-1] for group in plan.by_machine() if group[-1].machine.device != "cpu"]
    missing = [candidate for candidate in lasts if not candidate.fits and not candidate.refused]
    if not missing or plan.best is None:
        return ""
    missing.sort(key=lambda candidate: candidate.lacks)
    alike: dict[str, list[str]] = {}
    for candidate in missing:
        alike.setdefault(f"(lacks {_gib(candidate.lacks)} GiB with {candidate.label})", []).append(_name(candidate))
    near = [f"{', '.join(names)} {why}" for why, names in list(alike.items())[:_NEAREST]]
    more = len(missing) - sum(len(names) for names in list(alike.values())[:_NEAREST])
    return "Does not fit: " + "; ".join(near) + (f"; {more} more" if more else "")


def _spot(plan: PlanResult) -> str:
    """The cheapest offer of a machine that may be taken away, and how often to save on it."""
    found: list[tuple[float, Candidate, Price]] = []
    for candidate in plan.ranked:
        offers = prices.offers(plan.table.prices, candidate.machine.name, candidate.count, spot=True)
        if offers and candidate.hours and candidate.step_seconds:
            found.append((middle(candidate.hours) * offers[0].usd_per_gpu_hour * candidate.count, candidate, offers[0]))
    cheapest = middle(plan.best.cost) if plan.best else 0.0
    mine = plan.best is not None and plan.best.price is not None and plan.best.price.kind == "spot"
    if not found or (not mine and min(each[0] for each in found) >= cheapest):
        return ""
    _, candidate, price = (0.0, plan.best, plan.best.price) if mine and plan.best else min(found, key=lambda e: e[0])
    assert price is not None
    every = save_steps(candidate, plan.workload.steps)
    return (
        f"Spot: {_name(candidate)} at ${price.usd_per_gpu_hour:,.2f} an hour each ({price.provider}) may be taken "
        f"away at any time; --save_steps {every} loses at most {hours(_times(candidate.step_seconds, every / 3600))}"
    )


def save_steps(candidate: Candidate, steps: int) -> int:
    """Return how many steps to train between checkpoints on a machine that may be taken away. steps: of the run."""
    interval = (2 * _CHECKPOINT_SECONDS * _SPOT_LASTS) ** 0.5
    return min(steps, max(1, round(interval / max(middle(candidate.step_seconds), 1e-9))))


def _dates(plan: PlanResult) -> str:
    """From when the prices are, if there are any."""
    known = [price for price in plan.table.prices if price.date]
    if not known or not any(candidate.price for candidate in plan.candidates):
        return ""
    first, last = (choose(price.date for price in known) for choose in (min, max))
    old = sum(map(prices.stale, known))
    text = f"Prices: {len(known)} from {first}" + (f" to {last}" if last != first else "")
    return text + (f", {old} of them older than {prices.STALE_DAYS} days: byeori plan --update-prices" if old else "")


def _name(candidate: Candidate) -> str:
    return f"{candidate.machine.name} x {candidate.count}"


def _times(bounds: Range | None, factor: float) -> Range | None:
    return bounds and (bounds[0] * factor, bounds[1] * factor)


def hours(bounds: Range | None) -> str:
    """Return `8 to 12 min`, `2.1 to 3.8 h` or `4 to 6 days`."""
    if bounds is None:
        return "time unknown"
    if bounds[1] < 1.5:
        return _between(bounds, 60, " min", lambda value: f"{max(1, round(value))}")
    if bounds[1] < 72:
        return _between(bounds, 1, " h", _short)
    return _between(bounds, 1 / 24, " days", _short)


def dollars(bounds: Range | None) -> str:
    """Return `$1.20 to 2.00`."""
    return "-" if bounds is None else "$" + _between(bounds, 1, "", lambda v: f"{v:,.2f}" if v < 10 else f"{v:,.0f}")


def _between(bounds: Range, factor: float, unit: str, shown: Callable[[float], str]) -> str:
    low, high = (shown(value * factor) for value in bounds)
    return f"{low}{unit}" if low == high else f"{low} to {high}{unit}"


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0") if value < 10 else f"{value:,.0f}"


def _count(number: float) -> str:
    if number >= 1e9:
        return f"{number / 1e9:,.2f} billion"
    return f"{number / 1e6:,.1f} million" if number >= 1e6 else f"{number:,.0f}"


# ---- --explain -------------------------------------------------------------------------------------------------------


def by_part(candidate: Candidate) -> list[str]:
    """Return the two memory numbers of a candidate, and its parts."""
    parts = "; ".join(f"{part} {_gib(candidate.parts.get(part, 0))}" for part in (*PARTS, OUTSIDE))
    return [
        f"{_name(candidate)}: PyTorch allocates {_gib(candidate.allocated)} GiB, nvidia-smi shows "
        f"{_gib(candidate.need)} GiB of {_gib(candidate.machine.memory)}",
        f"  {parts} (GiB; {OUTSIDE}: outside PyTorch's allocator, or held by it and unused)",
    ]


def explanation(rehearsal: Rehearsal, label: str) -> list[str]:
    """Return where each byte of a peak comes from, the largest first."""
    out = [f"Peak of {label}: {_gib(rehearsal.peak)} GiB, {_moment(rehearsal.segment)}"]
    out += [f"  {'GiB':>8} {'count':>7}  {'part':<12}{'module':<46}{'made by':<26}tensor"]
    rows = sorted(rehearsal.sources.items(), key=lambda item: -item[1][0])
    for (part, module, operation, tensor), (size, count) in rows[:_EXPLAINED]:
        out.append(f"  {size / GIB:>8.3f} {count:>7,}  {part:<12}{module:<46}{operation:<26}{tensor}")
    if rest := [sizes for _, sizes in rows[_EXPLAINED:]]:
        size, count = map(sum, zip(*rest, strict=True))
        out.append(f"  {size / GIB:>8.3f} {count:>7,}  {len(rest)} more kinds")
    return out


def _moment(segment: str) -> str:
    if segment.startswith("back"):
        return "in the backward pass of a layer near the " + ("last" if "end" in segment else "first")
    return _MOMENTS[segment]


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f}"
