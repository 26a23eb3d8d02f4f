"""A plan: its result, in words, as a table for each machine, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from byeori.plan.candidates import OUTSIDE, Candidate
from byeori.plan.machines import GIB, Machine, Table
from byeori.plan.rehearsal import PARTS, Rehearsal
from byeori.plan.workload import Workload

_HEADS = dict(
    zip((*PARTS, OUTSIDE), ("weights", "adapt", "grads", "optim", "activ", "head", "work", "context"), strict=True)
)
_EXPLAINED = 40  # lines of --explain
_MOMENTS = {
    "forward": "in the forward pass",
    "head": "in the output layer",
    "head back": "after the output layer",
    "optimizer": "in the optimizer",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanResult:
    """What a run needs and on which machine.

    model: its name. objective: sft or dpo. weights: how many the model has. notes: sentences about the run.
    workload, table: what the run computes, and the machines with their assumptions.
    candidates: the best settings on every machine and number of them. ranked: those that fit, best value first.
    calibration: what a real step here took, if asked for.
    """

    model: str
    objective: str
    weights: int
    notes: tuple[str, ...]
    workload: Workload
    table: Table
    candidates: tuple[Candidate, ...]
    ranked: tuple[Candidate, ...]
    calibration: dict[str, Any] | None = None

    @property
    def best(self) -> Candidate | None:
        """The best value; None if nothing fits."""
        return self.ranked[0] if self.ranked else None

    def as_json(self) -> dict[str, Any]:
        """Return the whole plan as plain values; bytes, hours and dollars."""
        plan = {
            "model": self.model,
            "objective": self.objective,
            "weights": self.weights,
            "notes": list(self.notes),
            "rows": self.workload.source,
            "steps": self.workload.steps,
            "tokens": round(self.workload.tokens),
            "machines": {"source": self.table.source, "date": self.table.date},
            "best": self.best and _candidate_json(self.best),
            "offers": [_candidate_json(candidate) for candidate in self.candidates],
        }
        return plan if self.calibration is None else plan | {"calibration": self.calibration}


def _candidate_json(candidate: Candidate) -> dict[str, Any]:
    machine = candidate.machine
    return {
        "machine": machine.name,
        "count": candidate.count,
        "fits": candidate.fits,
        "refused": candidate.refused or None,
        "settings": candidate.settings or None,
        "memory_bytes": machine.memory,
        "need_bytes": candidate.need,
        "allocated_bytes": candidate.allocated,
        "parts_bytes": {part: candidate.parts.get(part, 0) for part in _HEADS},
        "tokens_per_second": round(candidate.tokens_per_second, 1) or None,
        "hours": round(candidate.hours, 4) or None,
        "cost_usd": None if candidate.cost is None else round(candidate.cost, 2),
        "share_of_peak": machine.utilisation,
        "share_source": machine.utilisation_source,
    }


def lines(plan: PlanResult) -> list[str]:
    """Return the whole plan as text."""
    out = [f"{plan.objective.upper()} of {plan.model}: {plan.weights / 1e9:,.2f} billion weights"]
    out += [*(f"  {note}" for note in plan.notes), "", *_best(plan), ""]
    for name in dict.fromkeys(candidate.machine.name for candidate in (*plan.ranked, *plan.candidates)):
        out += [*_table([candidate for candidate in plan.candidates if candidate.machine.name == name]), ""]
    table = plan.table
    out += [
        "context: memory outside PyTorch's allocator, or reserved by it and unused "
        f"({table.context / GIB:.1f} GiB and {table.fragmentation:.0%} of all but the weights, assumed); on a CPU "
        f"what the process holds, and {table.cpu_holes:.0%} for holes in its heap.",
        f"GPU figures: {table.source} ({table.date}).",
    ]
    if all(candidate.machine.price is None for candidate in plan.candidates):
        out.append("No prices: ordered by GiB of memory times hours; put the prices you pay into a file for --prices.")
    return out


def _best(plan: PlanResult) -> list[str]:
    if plan.best is None:
        possible = [candidate for candidate in plan.candidates if candidate.need]
        nearest = min(possible, key=lambda candidate: candidate.need / candidate.machine.memory)
        return [f"Nothing here is enough: {nearest.machine.name} x {nearest.count} lacks {_gib(nearest.lacks)} GiB"]
    others: dict[str, Candidate] = {}
    for candidate in plan.ranked:
        if candidate.machine.name != plan.best.machine.name:
            others.setdefault(candidate.machine.name, candidate)
    then = [f"{name} x {other.count} ({_time(other)}{_cost(other)})" for name, other in list(others.items())[:3]]
    return [sentence(plan.best), *(["Then: " + "; ".join(then)] if then else [])]


def sentence(candidate: Candidate) -> str:
    """Return `RTX 4090 x 1 is enough: 4-bit, micro-batch 2, about 5 h`."""
    time = f", {_time(candidate)}" if candidate.hours else ""
    return f"{candidate.machine.name} x {candidate.count} is enough: {candidate.label}{time}{_cost(candidate)}"


def _table(rows: Sequence[Candidate]) -> list[str]:
    settings = {
        row.count: row.label if row.fits else f"no: lacks {_gib(row.lacks)} GiB with {row.label}"
        for row in rows
        if not row.refused
    }
    width = max([24, *map(len, settings.values())])
    heads = "".join(f"{head:>8}" for head in _HEADS.values())
    out = [
        _title(rows[0].machine),
        f"      peak GiB{heads}   {'settings':<{width}}{'tokens/s':>10}{'time':>18}{'cost':>10}",
    ]
    for row in rows:
        if row.refused:
            out.append(f"  x{row.count}  {row.refused}")
            continue
        parts = "".join(f"{_gib(row.parts[part]):>8}" for part in _HEADS)
        known = row.fits and row.hours
        speed, time = (f"{row.tokens_per_second:,.0f}", _time(row)) if known else ("-", "-")
        cost = f"${row.cost:,.2f}" if known and row.cost is not None else "-"
        out.append(
            f"  x{row.count}{_gib(row.need):>10}{parts}   {settings[row.count]:<{width}}{speed:>10}{time:>18}{cost:>10}"
        )
    return out


def _title(machine: Machine) -> str:
    figures = [f"{machine.memory / GIB:.1f} GiB"]
    if machine.bandwidth:
        figures.append(f"{machine.bandwidth / 1e9:,.0f} GB/s")
    source = "" if machine.utilisation_source == "assumed" else f" ({machine.utilisation_source})"
    figures.append(f"{_tera(machine.flops)} TFLOPS, assuming {machine.utilisation:.0%} utilisation{source}")
    if machine.link_speed:
        figures.append(f"{machine.link} {machine.link_speed / 1e9:,.0f} GB/s")
    if machine.price is not None:
        figures.append(f"${machine.price:.2f} an hour ({machine.price_source})")
    return f"{machine.name}: {', '.join(figures)}"


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


def _tera(speed: float) -> str:
    return f"{speed / 1e12:,.0f}" if speed >= 1e13 else f"{speed / 1e12:.2g}"


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f}"


def _time(candidate: Candidate) -> str:
    hours = candidate.hours
    if hours < 1.5:
        return f"about {max(1, round(hours * 60))} min"
    return f"about {hours:.0f} h" if hours < 72 else f"about {hours / 24:.0f} days"


def _cost(candidate: Candidate) -> str:
    return "" if candidate.cost is None else f", ${candidate.cost:,.2f}"
