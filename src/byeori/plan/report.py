"""A plan in words, as a table for each GPU, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from byeori.plan.candidates import OUTSIDE, Candidate, PlanInput
from byeori.plan.machines import GIB, Machine
from byeori.plan.rehearsal import PARTS, Rehearsal

_HEADS = {"weights": "weights", "adapters": "adapt", "gradients": "grads", "optimizer": "optim"} | {
    "activations": "activ",
    "head": "head",
    "workspace": "work",
    OUTSIDE: "context",
}
_LINES = 40  # of --explain


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is planned. name: of the model. weights: how many numbers it has. notes: sentences above the tables."""

    name: str
    objective: str
    weights: int
    notes: tuple[str, ...]


def lines(subject: Subject, case: PlanInput, offers: Sequence[Candidate], ranked: Sequence[Candidate]) -> list[str]:
    """The whole plan as text."""
    out = [f"{subject.objective.upper()} of {subject.name}: {subject.weights / 1e9:,.2f} billion weights"]
    out += [f"  {note}" for note in subject.notes]
    out += ["", *_best(offers, ranked), ""]
    order = list(dict.fromkeys([*(offer.machine.name for offer in ranked), *(offer.machine.name for offer in offers)]))
    for name in order:
        rows = [offer for offer in offers if offer.machine.name == name]
        out += [*_table(rows, case), ""]
    return [*out, *_footer(case, offers)]


def _best(offers: Sequence[Candidate], ranked: Sequence[Candidate]) -> list[str]:
    if not ranked:
        nearest = min((offer for offer in offers if offer.need), key=lambda o: o.need / o.machine.memory, default=None)
        if nearest is None:
            return [f"Training would not start anywhere: {offers[0].refused}"]
        return [f"Nothing here is enough: {nearest.machine.name} x {nearest.count} lacks {_gib(nearest.lacks)} GiB"]
    first = sentence(ranked[0])
    after = {offer.machine.name: offer for offer in reversed(ranked) if offer.machine.name != ranked[0].machine.name}
    others = [f"{name} x {offer.count} ({_time(offer)}{_cost(offer)})" for name, offer in reversed(after.items())][:3]
    return [first, *(["Then: " + "; ".join(others)] if others else [])]


def sentence(offer: Candidate) -> str:
    """`RTX 4090 x 1 is enough: 4-bit, micro-batch 2, about 5 h`."""
    assert offer.way is not None
    time = f", {_time(offer)}" if offer.hours else ""
    return f"{offer.machine.name} x {offer.count} is enough: {offer.way.words}{time}{_cost(offer)}"


def _table(rows: Sequence[Candidate], case: PlanInput) -> list[str]:
    machine = rows[0].machine
    heads = "".join(f"{head:>8}" for head in _HEADS.values())
    told = {offer.count: _told(offer) for offer in rows if not offer.refused}
    wide = max([24, *map(len, told.values())])
    out = [_title(machine), f"      peak GiB{heads}   {'settings':<{wide}}{'tokens/s':>10}{'time':>18}{'cost':>10}"]
    for offer in rows:
        if offer.refused:
            out.append(f"  x{offer.count}  {offer.refused}")
            continue
        parts = "".join(f"{_gib(offer.parts[part]):>8}" for part in _HEADS)
        known = offer.fits and offer.hours
        speed, time = (f"{offer.tokens_per_second:,.0f}", _time(offer)) if known else ("-", "-")
        cost = f"${offer.cost:,.2f}" if known and offer.cost is not None else "-"
        out.append(
            f"  x{offer.count}{_gib(offer.need):>10}{parts}   {told[offer.count]:<{wide}}"
            f"{speed:>10}{time:>18}{cost:>10}"
        )
    return out


def _told(offer: Candidate) -> str:
    assert offer.way is not None
    return offer.way.words if offer.fits else f"no: lacks {_gib(offer.lacks)} GiB with {offer.way.words}"


def _title(machine: Machine) -> str:
    said = [f"{machine.memory / GIB:.1f} GiB"]
    if machine.bandwidth:
        said.append(f"{machine.bandwidth / 1e9:,.0f} GB/s")
    said.append(f"{_tera(machine.flops)} TFLOPS, of which {machine.share:.0%} are counted on ({machine.share_source})")
    if machine.link_speed:
        said.append(f"{machine.link} {machine.link_speed / 1e9:,.0f} GB/s")
    if machine.price is not None:
        said.append(f"${machine.price:.2f} an hour ({machine.price_source})")
    return f"{machine.name}: {', '.join(said)}"


def _footer(case: PlanInput, offers: Sequence[Candidate]) -> list[str]:
    table = case.table
    out = [
        "context: outside PyTorch's allocator, or held by it and not in use "
        f"({table.context / GIB:.1f} GiB and {table.fragmentation:.0%} of all but the weights, assumed); on a CPU "
        f"what the process holds, and {table.cpu_holes:.0%} for holes in its heap.",
        f"GPU figures: {table.source} ({table.date}).",
    ]
    if all(offer.machine.price is None for offer in offers):
        out.append("No prices: the order is by GiB of memory times hours; put what you pay into a file for --prices.")
    return out


def explained(found: Rehearsal, words: str) -> list[str]:
    """Where each byte of a peak comes from, the largest first."""
    out = [f"Peak of {words}: {_gib(found.peak)} GiB, {_moment(found.segment)}"]
    rows = sorted(found.sources.items(), key=lambda item: -item[1][0])
    out += [f"  {'GiB':>8} {'count':>7}  {'part':<12}{'module':<46}{'made by':<26}what"]
    for (part, where, made, what), (size, count) in rows[:_LINES]:
        out.append(f"  {size / GIB:>8.3f} {count:>7,}  {part:<12}{where:<46}{made:<26}{what}")
    rest = rows[_LINES:]
    if rest:
        size, count = sum(item[1][0] for item in rest), sum(item[1][1] for item in rest)
        out.append(f"  {size / GIB:>8.3f} {count:>7,}  {len(rest)} more kinds")
    return out


def _moment(segment: str) -> str:
    if segment.startswith("back"):
        return "in the backward pass of a layer near the " + ("last" if "end" in segment else "first")
    return {
        "forward": "in the forward pass",
        "head": "in the output layer",
        "head back": "behind the output layer",
    }.get(segment, f"in the {segment}")


def as_json(
    subject: Subject, case: PlanInput, offers: Sequence[Candidate], ranked: Sequence[Candidate]
) -> dict[str, Any]:
    """The whole plan as plain values; bytes, seconds and dollars."""
    return {
        "model": subject.name,
        "objective": subject.objective,
        "weights": subject.weights,
        "notes": list(subject.notes),
        "rows": case.work.assumed,
        "steps": case.work.steps,
        "tokens": round(case.work.tokens),
        "machines": {"source": case.table.source, "date": case.table.date},
        "best": _offer(ranked[0]) if ranked else None,
        "offers": [_offer(offer) for offer in offers],
    }


def _offer(offer: Candidate) -> dict[str, Any]:
    machine = offer.machine
    return {
        "machine": machine.name,
        "count": offer.count,
        "fits": offer.fits,
        "refused": offer.refused or None,
        "settings": offer.way.settings if offer.way else None,
        "memory_bytes": machine.memory,
        "need_bytes": offer.need,
        "allocated_bytes": offer.allocated,
        "parts_bytes": {part: offer.parts.get(part, 0) for part in (*PARTS, OUTSIDE)},
        "tokens_per_second": round(offer.tokens_per_second, 1) or None,
        "hours": round(offer.hours, 4) or None,
        "cost_usd": None if offer.cost is None else round(offer.cost, 2),
        "share_of_peak": machine.share,
        "share_source": machine.share_source,
    }


def _tera(speed: float) -> str:
    return f"{speed / 1e12:,.0f}" if speed >= 1e13 else f"{speed / 1e12:.2g}"


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f}"


def _time(offer: Candidate) -> str:
    hours = offer.hours
    if hours < 1.5:
        return f"about {max(1, round(hours * 60))} min"
    return f"about {hours:.0f} h" if hours < 72 else f"about {hours / 24:.0f} days"


def _cost(offer: Candidate) -> str:
    return "" if offer.cost is None else f", ${offer.cost:,.2f}"
