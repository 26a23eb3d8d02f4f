"""From rehearsals and a table of machines to offers: what fits where, how fast, for how much.

    seconds of a micro-batch = max(operations / (peak share), bytes read of the weights / bandwidth, bytes gathered /
                               link) + bytes of weights opened from 4 bit / bandwidth

Several processes each compute their own micro-batches; what they send for adapters is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from byeori.plan.machines import GIB, Machine, Table
from byeori.plan.rehearsal import Rehearsal
from byeori.plan.workload import MicroBatch, Workload

COUNTS = (1, 2, 4, 8)
# gradient_checkpointing: in words, and the part of the layers that is computed twice
AGAIN = {"none": ("", 0.0), "selective": ("half checkpointing", 0.5), "full": ("checkpointing", 1.0)}
OUTSIDE = "context"  # the part that PyTorch does not count
# How often what belongs to no layer is there while it is gathered, before anything is computed: where it arrives and
# where it stays (FSDP2); between processes on CPUs also where gloo puts it together.
_GATHERED = {"cuda": 2, "cpu": 3}
_UNSHARDED = 2  # layers whose weights are whole at once under FSDP2: the one that computes and the one fetched ahead


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Settings that make a run fit, from the fastest to the most sparing."""

    micro: MicroBatch
    recompute: str
    four_bit: bool
    sharded: bool

    @property
    def words(self) -> str:
        """`4-bit, checkpointing, micro-batch 2, FSDP2`."""
        said = ["4-bit"] * self.four_bit + [AGAIN[self.recompute][0], self.micro.words]
        return ", ".join(filter(None, [*said, *["FSDP2"] * self.sharded]))

    @property
    def settings(self) -> dict[str, Any]:
        """As the settings file has them."""
        found: dict[str, Any] = {"gradient_checkpointing": self.recompute}
        found |= {"micro_batch_size": self.micro.size} if self.micro.size else {"micro_batch_tokens": self.micro.tokens}
        found |= {"load_in_4bit": self.four_bit}
        return found | ({"parallel": "fsdp"} if self.sharded else {})


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A number of one machine, and the best way on it. parts: bytes by part, with what lies outside PyTorch.

    allocated: what torch.cuda.max_memory_allocated will say. need: all of it. lacks: bytes missing where it does not
    fit. refused: why training would not start.
    tokens_per_second: of all together, 0 where no speed is predicted. cost: US dollars, None without a price.
    """

    machine: Machine
    count: int
    way: RunConfig | None = None
    fits: bool = False
    parts: dict[str, int] = field(default_factory=dict)
    allocated: int = 0
    need: int = 0
    lacks: int = 0
    tokens_per_second: float = 0.0
    hours: float = 0.0
    cost: float | None = None
    refused: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSpace:
    """What the settings leave open. None: both are tried."""

    recompute: str | None
    four_bit: bool | None
    sharding: bool | None


Rehearse = Callable[[MicroBatch, str, bool, str], Rehearsal]  # micro, recompute, four_bit, device


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanInput:
    """Everything that offers are made from.

    rehearse: the largest micro-batch of a MicroBatch. usual: (operations, those of the forward pass, tokens) of its
    usual one, without recomputation. half: whether the run computes in 16 bit, for which the peaks are known.
    least: bytes that the weights take at least, for 4 bit or not; a way without room for them is not rehearsed.
    """

    work: Workload
    choice: SearchSpace
    table: Table
    rehearse: Rehearse
    usual: Callable[[MicroBatch, str], tuple[float, float, float]]
    half: bool = True
    least: Callable[[bool], float] = lambda four_bit: 0.0


def offers(case: PlanInput, machines: Sequence[Machine]) -> list[Candidate]:
    """The best way for every machine, alone and as 2, 4 and 8 of them; a CPU alone."""
    counts = {machine.name: COUNTS if machine.device == "cuda" else (1,) for machine in machines}
    return [best(case, machine, count) for machine in machines for count in counts[machine.name]]


def ranked(found: Sequence[Candidate]) -> list[Candidate]:
    """Those that fit, best value first: by cost where there are prices, else by memory held times hours."""

    def key(offer: Candidate) -> tuple[float, ...]:
        held = offer.machine.memory / GIB * offer.count
        if offer.machine.device == "cpu":
            return (2, offer.hours, held)
        return (0, offer.cost, held) if offer.cost is not None else (1, held * (offer.hours or 1.0), held)

    return sorted((offer for offer in found if offer.fits), key=key)


def best(case: PlanInput, machine: Machine, count: int) -> Candidate:
    """The fastest way that fits `count` of a machine; where none does, the one that needs least."""
    if refused := _refused(case, count):
        return Candidate(machine=machine, count=count, refused=refused)
    tried: list[Candidate] = []
    for tier in _tiers(case, machine, count):
        here = [_offer(case, machine, count, way) for way in tier]
        fitting = [offer for offer in here if offer.fits]
        if fitting:  # fastest first; the earlier way, which changes less, where two are as fast
            return min(fitting, key=lambda offer: float(f"{offer.hours:.2g}"))
        tried += here
    return min(tried, key=lambda offer: offer.need)


def _refused(case: PlanInput, count: int) -> str:
    if case.work.batch_size % count:
        return f"batch_size {case.work.batch_size} is not a multiple of {count} processes"
    return ""


def _tiers(case: PlanInput, machine: Machine, count: int) -> Iterator[list[RunConfig]]:
    """Ways to try, those of a later tier only where none of the earlier fits: they are slower, or round the weights.

    First the settings' own. After it the most sparing way of each kind: where that does not fit, no other of its kind
    does. 4 bit comes after all of 16. Kinds whose weights alone are too much are left out, but for the last.
    """
    open_to, both = case.choice, (False, True)
    again = tuple(AGAIN) if open_to.recompute is None else (open_to.recompute,)
    packed = both if open_to.four_bit is None else (open_to.four_bit,)
    sharded = (False,) if count == 1 else both if open_to.sharding is None else (open_to.sharding,)
    pairs = [
        (micro, recompute)
        for micro in case.work.micros
        for recompute in again
        if not case.work.batch_size % ((micro.size or 1) * count)
    ]
    kinds = [(over, four_bit) for four_bit in packed for over in sharded]
    small = [kind for kind in kinds if case.least(kind[1]) / (count if kind[0] else 1) <= machine.memory]
    rounded: list[RunConfig] = []
    sparing: list[RunConfig] = []
    if kinds[0] in small:
        yield [RunConfig(micro=pairs[0][0], recompute=pairs[0][1], four_bit=packed[0], sharded=sharded[0])]
    for over, four_bit in small or kinds[-1:]:
        ways = [RunConfig(micro=m, recompute=r, four_bit=four_bit, sharded=over) for m, r in pairs]
        sparing.append(ways[-1])
        if not _offer(case, machine, count, ways[-1]).fits:
            continue
        if four_bit != packed[0]:
            rounded += ways
        else:
            yield ways[1:] if (over, four_bit) == kinds[0] else ways
    yield rounded
    yield sparing


def _offer(case: PlanInput, machine: Machine, count: int, way: RunConfig) -> Candidate:
    found = case.rehearse(way.micro, way.recompute, way.four_bit, machine.device)
    parts = memory(found, case.table, machine, count if way.sharded else 1)
    need = sum(parts.values())
    speed, hours = _speed(case, machine, count, way, found) if case.half else (0.0, 0.0)
    return Candidate(
        machine=machine,
        count=count,
        way=way,
        fits=need <= machine.memory * (1 - case.table.headroom),
        parts=parts,
        allocated=need - parts[OUTSIDE] + (machine.workspace if machine.device == "cuda" else 0),
        need=need,
        lacks=max(0, need - int(machine.memory * (1 - case.table.headroom))),
        tokens_per_second=speed,
        hours=hours,
        cost=None if machine.price is None else machine.price * hours * count,
    )


def memory(found: Rehearsal, table: Table, machine: Machine, shards: int) -> dict[str, int]:
    """Bytes by part on one device. shards: over how many the frozen weights are divided."""
    parts, gathering = dict(found.parts), 0
    if shards > 1:
        whole, mine = parts["weights"] - found.outside, parts["weights"] // shards
        parts["weights"] = mine + found.outside + min(whole, _UNSHARDED * found.layer)
        waiting = sum(size for part, size in found.resident.items() if part != "weights") + parts["gradients"]
        gathering = mine + _GATHERED[machine.device] * found.outside + waiting
    working = sum(parts.values()) - parts["weights"]
    parts["workspace"] += max(0, gathering - parts["weights"] - working)
    if machine.device == "cpu":
        return parts | {OUTSIDE: machine.workspace + int(table.cpu_holes * working)}
    return parts | {OUTSIDE: table.context + machine.workspace + int(table.fragmentation * working)}


def _speed(case: PlanInput, machine: Machine, count: int, way: RunConfig, found: Rehearsal) -> tuple[float, float]:
    """Tokens a second of all processes, and hours of the whole run with DPO's reference pass."""
    flops, forward, tokens = case.usual(way.micro, machine.device)
    again = AGAIN[way.recompute][1]
    reads, passes = 2 + again, flops + forward * again  # forward, backward, and forward again
    weights = found.resident["weights"]
    seconds = passes / (machine.flops * machine.share)
    if machine.bandwidth:
        seconds = max(seconds, reads * weights / machine.bandwidth)
    if way.sharded and machine.link_speed:
        seconds = max(seconds, reads * weights * (count - 1) / count / machine.link_speed)
    if way.four_bit and machine.bandwidth:  # a byte of each pair is read, four are written and read again
        seconds += reads * found.opened * 4.5 / machine.bandwidth
    speed = tokens / seconds * count
    reference = case.work.reference / speed * (forward / passes)
    return speed, (case.work.tokens / speed + reference) / 3600
