"""From rehearsals and a table of machines to candidates: what fits where, how fast, at what cost.

    seconds of a micro-batch = max(operations / (peak utilisation), bytes read of the weights / bandwidth,
                               bytes gathered / link) + bytes dequantized from 4 bit / bandwidth

Several processes each compute micro-batches of their own; the traffic of the adapters' gradients is left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from byeori.plan.machines import GIB, Machine, Table
from byeori.plan.rehearsal import Rehearsal
from byeori.plan.workload import MicroBatch, Workload

COUNTS = (1, 2, 4, 8)
# gradient_checkpointing: its label, and the fraction of the layers that is computed twice
RECOMPUTE = {"none": ("", 0.0), "selective": ("half checkpointing", 0.5), "full": ("checkpointing", 1.0)}
OUTSIDE = "context"  # the part that PyTorch does not count
# How many copies of the weights outside layers exist while they are gathered, before anything is computed: the one
# that arrives and the one that stays (FSDP2); between processes on CPUs also the one that gloo assembles.
_GATHERED = {"cuda": 2, "cpu": 3}
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

    allocated: what torch.cuda.max_memory_allocated will show. need: all of it. lacks: bytes missing if it does not fit.
    refused: why training would not start.
    tokens_per_second: of all together, 0 if no speed is predicted. cost: US dollars, None without a price.
    """

    machine: Machine
    count: int
    run_config: RunConfig | None = None
    fits: bool = False
    parts: dict[str, int] = field(default_factory=dict)
    allocated: int = 0
    need: int = 0
    lacks: int = 0
    tokens_per_second: float = 0.0
    hours: float = 0.0
    cost: float | None = None
    refused: str = ""

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


class Cost(NamedTuple):
    """A typical micro-batch without recomputation: operations, those of its forward pass, unique tokens."""

    flops: float
    forward_flops: float
    tokens: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanInput:
    """What candidates are made from.

    rehearse: of the largest micro-batch: (micro-batch, recompute, four_bit, kind of device). typical_cost: of a typical
    one. speed_known: whether the run computes in 16 bit, for which the peaks of machines are known.
    smallest_weights: bytes that the weights take at least, in 4 bit or not; without room for them nothing is rehearsed.
    """

    workload: Workload
    search_space: SearchSpace
    table: Table
    rehearse: Callable[[MicroBatch, str, bool, str], Rehearsal]
    typical_cost: Callable[[MicroBatch], Cost]
    speed_known: bool = True
    smallest_weights: Callable[[bool], float] = lambda four_bit: 0.0


def all_machines(plan: PlanInput, machines: Sequence[Machine]) -> list[Candidate]:
    """Return the best candidate for every machine, alone and as 2, 4 and 8 of them; a CPU alone."""
    return [
        best(plan, machine, count)
        for machine in machines
        for count in (COUNTS if machine.device == "cuda" else COUNTS[:1])
    ]


def ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that fit, best value first: by cost if there are prices, else by memory held times hours; CPUs last."""

    def key(candidate: Candidate) -> tuple[float, ...]:
        held = candidate.machine.memory / GIB * candidate.count
        if candidate.machine.device == "cpu":
            return (2, candidate.hours, held)
        return (0, candidate.cost, held) if candidate.cost is not None else (1, held * (candidate.hours or 1.0), held)

    return sorted((candidate for candidate in candidates if candidate.fits), key=key)


def best(plan: PlanInput, machine: Machine, count: int) -> Candidate:
    """Return the fastest candidate of the first tier in which one fits; if none does, the one that needs least."""
    if plan.workload.batch_size % count:
        refused = f"batch_size {plan.workload.batch_size} is not a multiple of {count} processes"
        return Candidate(machine=machine, count=count, refused=refused)
    configs = _run_configs(plan, machine, count)
    smallest = {(config.four_bit, config.sharded): config for _, config in configs}  # the last of each kind

    def evaluate(config: RunConfig) -> Candidate:
        return _candidate(plan, machine, count, config)

    tried = []
    for tier, group in itertools.groupby(configs, key=lambda item: item[0]):
        candidates = [
            evaluate(config)
            for _, config in group
            # if the smallest of its kind does not fit, no other does; the settings' own is tried without asking
            if not tier or evaluate(smallest[config.four_bit, config.sharded]).fits
        ]
        fitting = [candidate for candidate in candidates if candidate.fits]
        if fitting:  # of two that are about as fast, the earlier one, which changes less
            return min(fitting, key=lambda candidate: float(f"{candidate.hours:.2g}"))
        tried += candidates
    return min([*tried, *map(evaluate, smallest.values())], key=lambda candidate: candidate.need)


def _run_configs(plan: PlanInput, machine: Machine, count: int) -> list[tuple[int, RunConfig]]:
    """What may be tried with its tier, sorted: a later tier is slower, or rounds the weights.

    Tiers: 0, the settings' own; 1, smaller micro-batches and recomputation; 2, sharded weights; 3, weights in 4 bit.
    Kinds whose weights alone are too much are left out; if all are, the one that needs least stays.
    """
    space, both = plan.search_space, (False, True)
    recompute = tuple(RECOMPUTE) if space.recompute is None else (space.recompute,)
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
        return 3 if config.four_bit != own.four_bit else 2 if config.sharded != own.sharded else 1

    possible = [config for config in configs if has_room(config)] or configs[-1:]
    return sorted(((tier(config), config) for config in possible), key=lambda item: item[0])


def _candidate(plan: PlanInput, machine: Machine, count: int, config: RunConfig) -> Candidate:
    rehearsal = plan.rehearse(config.micro_batch, config.recompute, config.four_bit, machine.device)
    parts = memory(rehearsal, plan.table, machine, count if config.sharded else 1)
    need, available = sum(parts.values()), machine.memory * (1 - plan.table.headroom)
    speed, hours = _speed(plan, machine, count, config, rehearsal) if plan.speed_known else (0.0, 0.0)
    return Candidate(
        machine=machine,
        count=count,
        run_config=config,
        fits=need <= available,
        parts=parts,
        allocated=need - parts[OUTSIDE] + (machine.workspace if machine.device == "cuda" else 0),
        need=need,
        lacks=max(0, need - int(available)),
        tokens_per_second=speed,
        hours=hours,
        cost=None if machine.price is None else machine.price * hours * count,
    )


def memory(rehearsal: Rehearsal, table: Table, machine: Machine, shards: int) -> dict[str, int]:
    """Return bytes by part on one device. shards: over how many the frozen weights are divided."""
    parts, gathering = dict(rehearsal.parts), 0
    if shards > 1:
        inside, shard = parts["weights"] - rehearsal.outside, parts["weights"] // shards
        parts["weights"] = shard + rehearsal.outside + min(inside, _UNSHARDED * rehearsal.layer)
        waiting = sum(size for part, size in rehearsal.resident.items() if part != "weights") + parts["gradients"]
        gathering = shard + _GATHERED[machine.device] * rehearsal.outside + waiting
    working = sum(parts.values()) - parts["weights"]
    parts["workspace"] += max(0, gathering - parts["weights"] - working)
    if machine.device == "cpu":
        return parts | {OUTSIDE: machine.workspace + int(table.cpu_holes * working)}
    return parts | {OUTSIDE: table.context + machine.workspace + int(table.fragmentation * working)}


def _speed(
    plan: PlanInput, machine: Machine, count: int, config: RunConfig, rehearsal: Rehearsal
) -> tuple[float, float]:
    """Tokens a second of all processes, and hours of the whole run with DPO's reference pass."""
    cost, again = plan.typical_cost(config.micro_batch), RECOMPUTE[config.recompute][1]
    flops = cost.flops + cost.forward_flops * again
    reads = (2 + again) * rehearsal.resident["weights"]  # forward, backward, and forward again
    seconds = flops / (machine.flops * machine.utilisation)
    if machine.bandwidth:
        seconds = max(seconds, reads / machine.bandwidth)
    if config.sharded and machine.link_speed:
        seconds = max(seconds, reads * (count - 1) / count / machine.link_speed)
    if config.four_bit and machine.bandwidth:  # a byte of each pair is read, four are written and read again
        seconds += (2 + again) * rehearsal.quantized * 4.5 / machine.bandwidth
    speed = cost.tokens / seconds * count
    reference = plan.workload.reference_tokens / speed * (cost.forward_flops / flops)
    return speed, (plan.workload.tokens / speed + reference) / 3600
