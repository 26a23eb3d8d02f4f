"""Which examples of a step are computed together, and by which process.

This changes the speed of a step, never its result. A unit is the examples of one row (a preference row has two), which
are never separated. Sorted by their tokens, units with a common prefix are neighbours, so a unit adds to a micro-batch
its own tokens minus those that it shares with the unit before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from byeori.batch.forest import MIN_SHARED

Unit = Sequence[Sequence[int]]
"""The tokens of each example of a unit that the model reads (forest.needed)."""

# Tokens of a micro-batch, by device: enough to keep matrix units busy, few enough for a small machine's memory. tiles:
# a CPU with matrix tiles, where the fixed costs of a micro-batch (reading the head's table) weigh more.
MICRO_BATCH_TOKENS = {"cpu": 2048, "tiles": 4096, "cuda": 4096}
# At about this length, attention costs more than the matrix products (a few times twice the hidden size, by model).
_QUADRATIC_FROM = 16_384
# If neighbours share less than this part of a step, units are given to processes by length alone.
_MIN_SHARED_PART = 0.05


def cost(tokens: int) -> float:
    """Return the cost of a sequence in tokens: linear in its length, plus the quadratic part of attention."""
    return tokens * (1 + tokens / _QUADRATIC_FROM)


def shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the common prefix; 0 if a forest would not share it."""
    shortest = min(len(first), len(second))
    if first[:MIN_SHARED] != second[:MIN_SHARED] or shortest < MIN_SHARED:
        return 0
    return next((at for at in range(MIN_SHARED, shortest) if first[at] != second[at]), shortest)


def own_tokens(unit: Unit, *, share: bool) -> int:
    """Return the tokens of a unit alone; tokens that its examples share count once."""
    total = sum(map(len, unit))
    return total - sum(shared(a, b) for a, b in pairwise(sorted(map(list, unit)))) if share else total


def shares(world: int, units: Sequence[Unit], *, share: bool = False) -> list[list[int]]:
    """Return which units of a step each process computes.

    The longest first, each to the process with the least work so far; if neighbours share much, runs of neighbours.
    """
    if world == 1:
        return [list(range(len(units)))]
    costs = [cost(own_tokens(unit, share=share)) for unit in units]
    if share:
        order = sorted(range(len(units)), key=lambda index: list(units[index][0]))
        common = sum(shared(units[a][0], units[b][0]) for a, b in pairwise(order))
        if common > _MIN_SHARED_PART * sum(costs):
            return _runs_of(world, order, costs)
    loads: list[float] = [0.0] * world
    out: list[list[int]] = [[] for _ in range(world)]
    for index in sorted(range(len(units)), key=lambda index: (-costs[index], index)):
        least = loads.index(min(loads))
        loads[least] += costs[index]
        out[least].append(index)
    return [sorted(part) for part in out]


def share_of(rank: int, world: int, units: Sequence[Unit], *, share: bool = False) -> list[int]:
    """Return which units of a step this process computes."""
    return shares(world, units, share=share)[rank]


def _runs_of(world: int, order: list[int], costs: list[float]) -> list[list[int]]:
    """Cut `order` into runs of about equal cost: a unit goes to the process whose part contains its middle."""
    whole, before = sum(costs), 0.0
    out: list[list[int]] = [[] for _ in range(world)]
    for index in order:
        out[int((before + costs[index] / 2) / whole * world)].append(index)
        before += costs[index]
    return [sorted(part) for part in out]


def micro_batches(units: Sequence[Unit], *, size: int | None, tokens: int, share: bool = False) -> list[list[int]]:
    """Split units into micro-batches of `size` units, or of at most `tokens` tokens (a longer unit stays alone).

    share: units with a common prefix go together, and shared tokens count once. A prefix that a whole micro-batch
    shares does not count, and lets it grow by twice its length, because any other micro-batch computes it again.
    """
    order = list(range(len(units)))
    if share:
        order.sort(key=lambda index: list(units[index]))
    if size is not None:
        return [order[start : start + size] for start in range(0, len(order), size)]
    out: list[list[int]] = []
    total, common = 0, 0
    for place, index in enumerate(order):
        own = own_tokens(units[index], share=share)
        overlap = shared(units[order[place - 1]][-1], units[index][0]) if share and out else 0
        prefix = min(common, overlap) if out and len(out[-1]) > 1 else overlap
        if out and total + own - overlap - prefix <= tokens + 2 * prefix:
            out[-1].append(index)
            total, common = total + own - overlap, prefix
        else:
            out.append([index])
            total, common = own, 0
    return out


def halved(group: list[int], times: int) -> list[list[int]]:
    """Split a micro-batch in two `times` times, but not below one unit."""
    size = -(-len(group) // 2**times)
    return [group[start : start + size] for start in range(0, len(group), size)]
