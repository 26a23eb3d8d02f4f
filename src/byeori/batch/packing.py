"""Which examples of a step are computed together, and by which process.

The result of a step does not depend on it; its speed does. A unit is the examples of one row (a preference row has
two), which are never parted. Units that begin alike are neighbours once they are sorted by their tokens, so that what
a unit adds to a micro-batch is its own tokens less what it shares with the unit before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from byeori.batch.forest import MIN_SHARED

# A unit: the tokens of each of its examples that the model reads (forest.needed).
Unit = Sequence[Sequence[int]]

# Tokens of a micro-batch, by device: what matrix units need to be busy, and what a small machine's memory bears. tiles:
# a CPU whose matrix units are so fast that what else a micro-batch costs (reading the head's table) weighs more.
MICRO_BATCH_TOKENS = {"cpu": 2048, "tiles": 4096, "cuda": 4096}
# Attention's cost overtakes the matrices' at about so many tokens (twice the hidden size times a few, by model).
_QUADRATIC_FROM = 16_384
# Neighbours that share less than this part of a step are given to processes by length alone.
_WORTH_MEETING = 0.05


def cost(tokens: int) -> float:
    """What a sequence takes, in tokens: linear in its length, and quadratic in attention."""
    return tokens * (1 + tokens / _QUADRATIC_FROM)


def shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens of the common prefix; 0 where a forest would not share it."""
    shortest = min(len(first), len(second))
    if first[:MIN_SHARED] != second[:MIN_SHARED] or shortest < MIN_SHARED:
        return 0
    return next((at for at in range(MIN_SHARED, shortest) if first[at] != second[at]), shortest)


def own_tokens(unit: Unit, *, share: bool) -> int:
    """Tokens of a unit alone, what its examples share counted once."""
    total = sum(map(len, unit))
    return total - sum(shared(a, b) for a, b in pairwise(sorted(map(list, unit)))) if share else total


def shares(world: int, units: Sequence[Unit], *, share: bool = False) -> list[list[int]]:
    """Which units of a step each process computes.

    Longest first, each to the process with the least so far; where much is shared, runs of neighbours instead.
    """
    if world == 1:
        return [list(range(len(units)))]
    costs = [cost(own_tokens(unit, share=share)) for unit in units]
    if share:
        order = sorted(range(len(units)), key=lambda index: list(units[index][0]))
        met = sum(shared(units[a][0], units[b][0]) for a, b in pairwise(order))
        if met > _WORTH_MEETING * sum(costs):
            return _runs_of(world, order, costs)
    loads: list[float] = [0.0] * world
    out: list[list[int]] = [[] for _ in range(world)]
    for index in sorted(range(len(units)), key=lambda index: (-costs[index], index)):
        least = loads.index(min(loads))
        loads[least] += costs[index]
        out[least].append(index)
    return [sorted(part) for part in out]


def share_of(rank: int, world: int, units: Sequence[Unit], *, share: bool = False) -> list[int]:
    """Which units of a step this process computes."""
    return shares(world, units, share=share)[rank]


def _runs_of(world: int, order: list[int], costs: list[float]) -> list[list[int]]:
    """Runs of `order`: a unit goes to the process in whose part of the whole cost its middle lies."""
    whole, before = sum(costs), 0.0
    out: list[list[int]] = [[] for _ in range(world)]
    for index in order:
        out[int((before + costs[index] / 2) / whole * world)].append(index)
        before += costs[index]
    return [sorted(part) for part in out]


def micro_batches(units: Sequence[Unit], *, size: int | None, tokens: int, share: bool = False) -> list[list[int]]:
    """Split units into micro-batches of `size` units, or else of at most `tokens` tokens (a longer unit is alone).

    share: neighbours meet, and shared tokens count once. A prefix that a whole micro-batch shares does not count, and
    lets it grow by twice its length, because whatever is split off has to compute it again.
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
        met = shared(units[order[place - 1]][-1], units[index][0]) if share and out else 0
        prefix = min(common, met) if out and len(out[-1]) > 1 else met
        if out and total + own - met - prefix <= tokens + 2 * prefix:
            out[-1].append(index)
            total, common = total + own - met, prefix
        else:
            out.append([index])
            total, common = own, 0
    return out


def halved(group: list[int], times: int) -> list[list[int]]:
    """A micro-batch split in two so many times, as far as it has units."""
    size = -(-len(group) // 2**times)
    return [group[start : start + size] for start in range(0, len(group), size)]
