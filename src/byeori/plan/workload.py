"""What a run computes: its longest micro-batch, its usual one, and how much there is in all.

With rows, the micro-batches are those that the run will make (its order, its packing, its sharing of prefixes) on the
steps that hold the longest rows and on a sample of the others. Without rows they are made up, and a sentence says how.

A unit is what is never parted: one example, or the two of a preference pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from byeori.batch import forest as forests
from byeori.batch import loader, packing
from byeori.batch.loader import Schedule
from byeori.data.tokenize import Example
from byeori.data.tokenized import Rows

Examples = tuple[Example, ...]
_LOOKED_AT, _SAMPLED = 6, 8  # steps whose micro-batches are made: those with the longest rows, and some of all
_STEPS = 20_000  # steps of a run whose lengths are compared


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """One way to cut a step. size, tokens: micro_batch_size and micro_batch_tokens, as in the settings.

    worst: the examples of the largest micro-batch. usual: those of one of the mean size. several: whether one process
    has more micro-batches than one in a step.
    """

    size: int | None
    tokens: int
    worst: Examples
    usual: Examples
    several: bool

    @property
    def words(self) -> str:
        """As the plan names it."""
        return f"micro-batch {self.size}" if self.size else f"{self.tokens:,} tokens at once"


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """micros: the ways to cut a step, the settings' own first, then smaller ones. assumed: where the rows come from.

    tokens: unique tokens of the whole run. reference: of those, what a reference pass reads once. steps: optimizer
    steps. batch_size: units of a step. rows: training rows.
    """

    micros: tuple[MicroBatch, ...]
    tokens: float
    reference: float
    steps: int
    batch_size: int
    rows: int
    assumed: str


def sizes(size: int | None, tokens: int, longest: int) -> list[tuple[int | None, int]]:
    """The settings' own (micro_batch_size, micro_batch_tokens), then smaller ones; at most four.

    longest: tokens of the longest unit; a smaller budget computes it alone all the same.
    """
    if size is not None:
        halves = [size]
        while halves[-1] > 1:
            halves.append(halves[-1] // 2)
        chosen = halves if len(halves) <= 4 else [*halves[:2], halves[len(halves) // 2], halves[-1]]
        return [(each, tokens) for each in chosen]
    budgets = [tokens]
    while budgets[-1] > longest and len(budgets) < 4:
        budgets.append(budgets[-1] // 2)
    return [(None, each) for each in budgets]


def made_up(
    *,
    cutoff_len: int,
    mean: int,
    rows: int,
    per_row: int,
    plan: Schedule,
    size: int | None,
    tokens: int,
) -> Workload:
    """Rows of `mean` tokens on average whose longest fill cutoff_len; of each unit an eighth is trained per answer.

    per_row: 1, or 2 for pairs that share their prompt.
    """

    def unit(at: int, length: int) -> list[Example]:
        answer = max(1, length // 8)
        name = [at % 16, at // 16 % 16, at // 256 % 16]  # no two units begin alike, and every vocabulary has these
        prompt = [*name, *[16] * length][: length - answer]
        ids = [[*prompt, *[17 + side] * answer] for side in range(per_row)]
        return [Example(token_ids=each, targets=((length - answer, length),)) for each in ids]

    def together(count: int, length: int) -> Examples:
        return tuple(example for at in range(count) for example in unit(at, length))

    own = forests.build(unit(0, mean)).unique_tokens
    longest = forests.build(unit(0, cutoff_len)).unique_tokens
    micros = []
    for each, budget in sizes(size, tokens, longest):
        worst, usual = (each or max(1, budget // of) for of in (longest, own))
        micros.append(
            MicroBatch(
                size=each,
                tokens=budget,
                worst=together(min(worst, plan.batch_size), cutoff_len),
                usual=together(min(usual, plan.batch_size), mean),
                several=min(usual, worst) < plan.batch_size,
            )
        )
    kind = "pairs" if per_row == 2 else "rows"
    epochs = min(plan.total_steps * plan.batch_size, rows * (plan.total_steps / plan.steps_per_epoch))
    return Workload(
        micros=tuple(micros),
        tokens=own * epochs,
        reference=own * min(rows, epochs),
        steps=plan.total_steps,
        batch_size=plan.batch_size,
        rows=rows,
        assumed=f"assumed: {rows:,} {kind} of {mean:,} tokens on average, the longest {cutoff_len:,}, an eighth of it "
        "an answer; give --data_path for your own",
    )


def of_rows(
    rows: Rows, *, plan: Schedule, world: int, size: int | None, tokens: int, share: bool, only: bool = False
) -> Workload:
    """What a run over these rows computes on `world` processes. only: no smaller micro-batches than the settings'."""
    lengths = rows.lengths()
    steps = min(plan.total_steps, _STEPS)
    orders: dict[int, np.ndarray] = {}
    reach = [_bound(lengths[loader.step_rows(plan, step, orders)], size, tokens) for step in range(steps)]
    longest = np.argsort(-np.array(reach), kind="stable")[:_LOOKED_AT]
    sample = np.unique(np.linspace(0, steps - 1, min(steps, _SAMPLED)).astype(int))
    units = {int(step): _units(rows, plan, int(step)) for step in {*longest, *sample}}
    micros, unique = [], 0.0
    every = [(size, tokens)] if only else sizes(size, tokens, int(lengths.max()))
    for each, budget in every:

        def cut(step: int, each: int | None = each, budget: int = budget) -> list[list[Examples]]:
            return [list(_cut(units[step], rank, world, each, budget, share)) for rank in range(world)]

        usual = [batch for step in sample for part in cut(int(step)) for batch in part]
        worst = usual + [batch for step in longest for part in cut(int(step)) for batch in part]
        counts = [forests.build(batch, share=share).unique_tokens for batch in worst]
        mean = float(np.mean(counts[: len(usual)]))
        unique = unique or sum(counts[: len(usual)]) / len(sample)
        micros.append(
            MicroBatch(
                size=each,
                tokens=budget,
                worst=worst[int(np.argmax(counts))],
                usual=usual[int(np.argmin(np.abs(np.array(counts[: len(usual)]) - mean)))],
                several=any(len(part) > 1 for step in {*longest, *sample} for part in cut(int(step))),
            )
        )
    part = unique / plan.batch_size
    return Workload(
        micros=tuple(micros),
        tokens=unique * plan.total_steps,
        reference=part * min(len(rows), plan.total_steps * plan.batch_size),
        steps=plan.total_steps,
        batch_size=plan.batch_size,
        rows=len(rows),
        assumed=f"{len(rows):,} row{'' if len(rows) == 1 else 's'} of {lengths.mean():,.0f} tokens on average, "
        f"the longest {lengths.max():,}",
    )


def _units(rows: Rows, plan: Schedule, step: int) -> list[list[Example]]:
    return [rows.unit(int(index)) for index in loader.step_rows(plan, step, {})]


def _cut(
    units: Sequence[Sequence[Example]], rank: int, world: int, size: int | None, tokens: int, share: bool
) -> Iterator[Examples]:
    """The micro-batches of one process, as the trainer packs them."""
    read = [[forests.needed(example) for example in unit] for unit in units]
    mine = packing.share_of(rank, world, read, share=share)
    groups = packing.micro_batches([read[index] for index in mine], size=size, tokens=tokens, share=share)
    for group in groups:
        if group:
            yield tuple(example for place in group for example in units[mine[place]])


def _bound(lengths: np.ndarray[Any, Any], size: int | None, tokens: int) -> int:
    """No micro-batch of a step with units of these lengths has more tokens."""
    if size is not None:
        return int(np.sort(lengths)[-size:].sum())
    return int(max(lengths.max(), min(tokens, lengths.sum())))


__all__ = ["MicroBatch", "Workload", "made_up", "of_rows", "sizes"]
