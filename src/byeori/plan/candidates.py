"""From rehearsals and a table of machines to candidates: what fits where, how fast (speed.py), at what cost.

Several processes each compute micro-batches of their own; the traffic of the adapters' gradients is left out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from byeori.plan import prices, speed
from byeori.plan.machines import GIB, Machine, Range, Table
from byeori.plan.prices import Price
from byeori.plan.rehearsal import Rehearsal
from byeori.plan.speed import Cost
from byeori.plan.workload import MicroBatch, Workload

COUNTS = (1, 2, 4, 8)
# gradient_checkpointing: its label, and the fraction of the layers that is computed twice
RECOMPUTE = {
    "none": ("", 0.0),
    "selective": ("half checkpointing", 0.5),
    "full": ("checkpointing", 1.0),
    "offload": ("offloaded checkpoints", 1.0),
}
OUTSIDE = "context"  # the part that PyTorch does not count
# How many copies of the weights outside layers exist while they are gathered, before anything is computed: the one
# that arrives and the one that stays (FSDP2); between processes on CPUs also the one that gloo assembles.
_GATHERED = {"cuda": 2, "cpu": 3}
_CHEAPER = 0.95  # of the cost with fewer of a machine, for more of it to be worth a line
_UNSHARDED = 2  # layers whose weights are whole at once under FSDP2: the one that computes and the one fetched ahead


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """The settings by which a run is made to fit."""

    micro_batch: MicroBatch
    recompute: str
    four_bit: bool
    sharded: bool

    @property
    def label(self) -> str:
        """`4-bit, checkpointing, micro-batch 2, FSDP2`."""
        parts = ["4-bit" * self.four_bit, RECOMPUTE[self.recompute][0], self.micro_batch.label, "FSDP2" * self.sharded]
        return ", ".join(filter(None, parts))

    @property
    def settings(self) -> dict[str, Any]:
        """As the settings file has them."""
        size, tokens = self.micro_batch.size, self.micro_batch.tokens
        settings: dict[str, Any] = {"gradient_checkpointing": self.recompute}
        settings |= {"micro_batch_size": size} if size else {"micro_batch_tokens": tokens}
        settings |= {"load_in_4bit": self.four_bit}
        return settings | ({"parallel": "fsdp"} if self.sharded else {})


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A number of one machine, and the best settings on it. parts: bytes by part, with what is outside PyTorch.

    allocated: what torch.cuda.max_memory_allocated will show. need: what nvidia-smi will show. lacks: bytes missing if
    it does not fit. refused: why training would not start.
    step_seconds, hours: the fastest and the slowest of an optimizer step and of the run; None if no speed is predicted.
    gathering: hours of the run for sharded weights to arrive. price: the cheapest offer, None if there is none.
    start: hours that are paid before training starts.
    """

    machine: Machine
    count: int
    run_config: RunConfig | None = None
    fits: bool = False
    parts: dict[str, int] = field(default_factory=dict)
    allocated: int = 0
    need: int = 0
    lacks: int = 0
    tokens_per_second: Range | None = None
    step_seconds: Range | None = None
    hours: Range | None = None
    gathering: Range | None = None
    price: Price | None = None
    start: Range = (0.0, 0.0)
    refused: str = ""

    @property
    def cost(self) -> Range | None:
        """US dollars, the least and the most; None without a price or a speed."""
        if self.price is None or self.hours is None:
            return None
        hourly = self.price.usd_per_gpu_hour * self.count
        return hourly * (self.hours[0] + self.start[0]), hourly * (self.hours[1] + self.start[1])

    @property
    def label(self) -> str:
        """What is chosen, in words, or why it was refused."""
        return self.run_config.label if self.run_config else self.refused

    @property
    def settings(self) -> dict[str, Any]:
        """What is chosen, as the settings file has it."""
        return self.run_config.settings if self.run_config else {}


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSpace:
    """What the settings say; None where the plan chooses."""

    recompute: str | None
    four_bit: bool | None
    sharding: bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanInput:
    """What candidates are made from.

    rehearse: of the largest micro-batch: (micro-batch, recompute, four_bit, kind of device). typical_cost: of a typical
    one. speed_known: whether the run computes in 16 bit, for which the peaks of machines are known.
    smallest_weights: bytes that the weights take at least, in 4 bit or not; without room for them nothing is rehearsed.
    spot: whether the prices are those of machines that may be taken away. cpu_offload: whether sharded weights stay in
    the CPU's memory. measured: speeds of this machine.
    """

    workload: Workload
    search_space: SearchSpace
    table: Table
    rehearse: Callable[[MicroBatch, str, bool, str], Rehearsal]
    typical_cost: Callable[[MicroBatch], Cost]
    speed_known: bool = True
    smallest_weights: Callable[[bool], float] = lambda four_bit: 0.0
    spot: bool = False
    cpu_offload: bool = False
    measured: dict[str, list[float]] = field(default_factory=speed.recorded)


def all_machines(
    plan: PlanInput, machines: Sequence[Machine], on_progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Candidate]:
    """Return the best candidate for every machine, alone and as 2, 4 and 8 of them, or as many as there are."""
    wanted = [(machine, count) for machine in machines for count in _counts(machine)]
    found: list[Candidate] = []
    for machine, count in wanted:
        on_progress(len(found), len(wanted))
        found.append(best(plan, machine, count))
    return found


def _counts(machine: Machine) -> list[int]:
    if machine.device == "cpu":
        return [1]
    return sorted({*(count for count in COUNTS if count < machine.most), machine.most}) if machine.most else [*COUNTS]


def middle(bounds: Range | None) -> float:
    """Return the geometric mean of a range, by which candidates are ordered; infinity for None."""
    return math.inf if bounds is None else math.sqrt(bounds[0] * bounds[1])


def ranked(candidates: Sequence[Candidate], by: str = "cheapest") -> list[Candidate]:
    """Those that fit, the best first; CPUs last.

    by: cheapest (memory held times hours where there is no price), fastest or smallest (memory of all together).
    """

    def key(candidate: Candidate) -> tuple[float, ...]:
        held = candidate.machine.memory / GIB * candidate.count
        cost, hours = middle(candidate.cost), middle(candidate.hours)
        if by == "fastest":
            order = (hours, cost, held)
        elif by == "smallest":
            order = (held, cost, hours)
        else:
            order = (cost, held * (hours if candidate.hours else 1.0), held)
        return (float(candidate.machine.device == "cpu"), *order)

    return sorted((candidate for candidate in candidates if candidate.fits), key=key)


def worth_showing(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Of one machine: the smallest number that fits, and larger ones that cost less; else the largest number."""
    shown: list[Candidate] = []
    for candidate in candidates:
        if candidate.fits and (not shown or middle(candidate.cost) < _CHEAPER * middle(shown[-1].cost)):
            shown.append(candidate)
    return shown or [candidate for candidate in candidates if not candidate.refused][-1:] or [*candidates[:1]]


def best(plan: PlanInput, machine: Machine, count: int) -> Candidate:
    """Return the fastest candidate of the first tier in which one fits; if none does, the one that needs least."""
    if plan.workload.batch_size % count:
        refused = f"batch_size {plan.workload.batch_size} is not a multiple of {count} processes"
        return Candidate(machine=machine, count=count, refused=refused)
    configs = _run_configs(plan, machine, count)
    smallest = {_kind(config): config for _, config in configs}  # the last of each kind

    def evaluate(config: RunConfig) -> Candidate:
        return _candidate(plan, machine, count, config)

    tried = [evaluate(config) for tier, config in configs if not tier]
    if tried and tried[0].fits:
        return tried[0]
    for _, group in itertools.groupby(configs[len(tried) :], key=lambda item: item[0]):
        fitting = []
        for _, same in itertools.groupby((config for _, config in group), key=_but_recompute):
            more = [*same]  # recomputation: if the smallest of the kind does not fit, or its most, nothing does
            if evaluate(smallest[_kind(more[-1])]).fits and evaluate(more[-1]).fits:
                fitting.append(next(candidate for candidate in map(evaluate, more) if candidate.fits))
        if fitting:  # of two that are about as fast, the earlier one, which changes less
            return min(fitting, key=lambda candidate: float(f"{middle(candidate.hours):.2g}"))
    return min([*tried, *map(evaluate, smallest.values())], key=lambda candidate: candidate.need)


def _but_recompute(config: RunConfig) -> tuple[Any, ...]:
    return id(config.micro_batch), config.four_bit, config.sharded, config.recompute == "offload"


def _kind(config: RunConfig) -> tuple[bool, bool, bool]:
    return config.four_bit, config.sharded, config.recompute == "offload"


def _run_configs(plan: PlanInput, machine: Machine, count: int) -> list[tuple[int, RunConfig]]:
    """What may be tried with its tier, sorted: a later tier is slower, or rounds the weights.

    Tiers: 0, the settings' own; 1, smaller micro-batches and recomputation; 2, sharded weights; 3, what is recomputed
    from is in the CPU's memory; 4, weights in 4 bit.
    Kinds whose weights alone are too much are left out; if all are, the one that needs least stays.
    """
    space, both = plan.search_space, (False, True)
    kinds = [kind for kind in RECOMPUTE if kind != "offload" or machine.device == "cuda"]
    recompute = kinds if space.recompute is None else [space.recompute]
    four_bit = both if space.four_bit is None else (space.four_bit,)
    sharded = (False,) if count == 1 else both if space.sharding is None else (space.sharding,)
    micro_batches = [m for m in plan.workload.micro_batches if not plan.workload.batch_size % ((m.size or 1) * count)]
    configs = [
        RunConfig(micro_batch=micro_batch, recompute=again, four_bit=packed, sharded=over)
        for packed, over, micro_batch, again in itertools.product(four_bit, sharded, micro_batches, recompute)
    ]
    own = configs[0]

    def has_room(config: RunConfig) -> bool:
        return plan.smallest_weights(config.four_bit) / (count if config.sharded else 1) <= machine.memory

    def tier(config: RunConfig) -> int:
        if config is own:
            return 0
        if config.four_bit != own.four_bit:
            return 4
        return 3 if _kind(config)[2] != _kind(own)[2] else 2 if config.sharded != own.sharded else 1

    possible = [config for config in configs if has_room(config)] or configs[-1:]
    return sorted(((tier(config), config) for config in possible), key=lambda item: item[0])


def _candidate(plan: PlanInput, machine: Machine, count: int, config: RunConfig) -> Candidate:
    machine = speed.with_measured(machine, config.four_bit, plan.measured)
    rehearsal = plan.rehearse(config.micro_batch, config.recompute, config.four_bit, machine.kind)
    parts = memory(rehearsal, plan.table, machine, count if config.sharded else 1, cpu_offload=plan.cpu_offload)
    need, available = sum(parts.values()), machine.memory * (1 - plan.table.headroom)
    offers = prices.offers(plan.table.prices, machine.name, count, spot=plan.spot)
    return Candidate(
        machine=machine,
        count=count,
        run_config=config,
        fits=need <= available,
        parts=parts,
        allocated=need - parts[OUTSIDE] + (machine.workspace if machine.device == "cuda" else 0),
        need=need,
        lacks=max(0, need - int(available)),
        price=offers[0] if offers else None,
        start=plan.table.start,
        **(_speed(plan, machine, count, config, rehearsal) if plan.speed_known else {}),
    )


def memory(
    rehearsal: Rehearsal, table: Table, machine: Machine, shards: int, *, cpu_offload: bool = False
) -> dict[str, int]:
    """Return bytes by part on one device. shards: over how many the frozen weights are divided.

    cpu_offload: whether shards are in the CPU's memory while they are not in use.
    """
    parts, gathering = dict(rehearsal.parts), 0
    if shards > 1:
        inside, shard = parts["weights"] - rehearsal.outside, 0 if cpu_offload else parts["weights"] // shards
        if rehearsal.whole:  # gradients are whole for a layer at a time; float32 shards stand for the weights
            shard = 0 if parts["masters"] else shard
            for part in ("masters", "gradients", "optimizer"):
                parts[part] //= shards
            parts["gradients"] += rehearsal.outside + min(inside, rehearsal.layer)
        parts["weights"] = shard + rehearsal.outside + min(inside, _UNSHARDED * rehearsal.layer)
        waiting = sum(size for part, size in rehearsal.resident.items() if part != "weights") + parts["gradients"]
        gathering = shard + _GATHERED[machine.device] * rehearsal.outside + waiting
    working = sum(parts.values()) - parts["weights"]
    parts["workspace"] += max(0, gathering - parts["weights"] - working)
    if machine.device == "cpu":
        return parts | {OUTSIDE: machine.workspace + int(table.cpu_holes * working)}
    return parts | {OUTSIDE: table.context + machine.workspace + int(table.fragmentation * working)}


def _speed(plan: PlanInput, machine: Machine, count: int, config: RunConfig, rehearsal: Rehearsal) -> dict[str, Any]:
    """Tokens a second of all processes, seconds of a step, and hours of the run with DPO's reference pass."""
    work, cost, again = plan.workload, plan.typical_cost(config.micro_batch), RECOMPUTE[config.recompute][1]
    how: dict[str, Any] = {"again": again, "processes": count, "sharded": config.sharded}
    how |= {"cpu_offload": plan.cpu_offload}
    seconds = speed.seconds(plan.table, machine, rehearsal, cost, **how)
    if seconds is None:
        return {}
    forward = cost.forward_flops / (cost.flops + again * cost.forward_flops)
    batches = (work.tokens + forward * work.reference_tokens) / cost.tokens / count
    low, high = (batches * each / 3600 for each in seconds)
    passes = batches * (2 + again) * rehearsal.resident["weights"] * (count - 1) / count / 3600
    return {
        "tokens_per_second": (cost.tokens * count / seconds[1], cost.tokens * count / seconds[0]),
        "step_seconds": (low * 3600 / work.steps, high * 3600 / work.steps),
        "hours": (low, high),
        "gathering": (passes / machine.gather[1], passes / machine.gather[0])
        if config.sharded and machine.gather
        else None,
    }
