"""What a run computes: its largest micro-batch, a typical one, and the number of tokens in all.

With rows, the micro-batches are those that the run will make (its order, its packing, its sharing of prefixes) on the
steps that hold the longest rows and on a sample of the others. Without rows they are assumed, and a sentence says how.

A unit is what is never split: one example, or the two of a preference pair.
"""

from __future__ import annotations

import functools
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
_LONGEST, _SAMPLED = 6, 8  # steps whose micro-batches are made: those with the longest rows, and some of all
_STEPS = 20_000  # steps of a run whose lengths are compared
_BUDGETS = 4  # how many micro-batch sizes a plan tries


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """One way to split a step. size, tokens: micro_batch_size and micro_batch_tokens, as in the settings.

    largest: the examples of the largest micro-batch. typical: those of one of the mean size.
    accumulates: whether a process has more than one micro-batch in a step. share: whether examples share prefixes.
    """

    size: int | None
    tokens: int
    largest: Examples
    typical: Examples
    accumulates: bool
    share: bool = True

    @property
    def label(self) -> str:
        """As the plan names it."""
        return f"micro-batch {self.size}" if self.size else f"{self.tokens:,} tokens at once"


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """micro_batches: the ways to split a step, that of the settings first, then smaller ones.

    tokens: unique tokens of the whole run. reference_tokens: those that a reference pass reads once. steps: optimizer
    steps. batch_size: units of a step. rows: training rows. source: a sentence on where the rows come from.
    """

    micro_batches: tuple[MicroBatch, ...]
    tokens: float
    reference_tokens: float
    steps: int
    batch_size: int
    rows: int
    source: str


def budgets(size: int | None, tokens: int, longest: int) -> list[tuple[int | None, int]]:
    """Return (micro_batch_size, micro_batch_tokens) of the settings, then smaller ones; at most four.

    longest: tokens of the longest unit; a smaller budget computes it alone all the same.
    """
    if size is not None:
        sizes = [size >> shift for shift in range(size.bit_length())]
        if len(sizes) > _BUDGETS:
            sizes = [*sizes[:2], sizes[len(sizes) // 2], sizes[-1]]
        return [(each, tokens) for each in sizes]
    halves = [tokens]
    while halves[-1] > longest and len(halves) < _BUDGETS:
        halves.append(halves[-1] // 2)
    return [(None, each) for each in halves]


def assumed(
    *,
    cutoff_len: int,
    mean: int,
    rows: int,
    per_row: int,
    schedule: Schedule,
    size: int | None,
    tokens: int,
    share: bool = True,
    all_trained: bool = False,
) -> Workload:
    """Rows of `mean` tokens on average, the longest of cutoff_len; an eighth of a row is the answer, which is trained.

    per_row: examples of a row: 1, or 2 for pairs that share their prompt if `share`. all_trained: the prompt as well.
    """

    @functools.cache
    def unit(at: int, length: int) -> list[Example]:
        answer = max(1, length // 8)
        start = [at % 16, at // 16 % 16, at // 256 % 16]  # no two units begin alike, and every vocabulary has these
        prompt = [*start, *[16] * length][: length - answer]
        ids = [[*prompt, *[17 + side] * answer] for side in range(per_row)]
        return [Example(token_ids=each, targets=((1 if all_trained else length - answer, length),)) for each in ids]

    def units(count: int, length: int) -> Examples:
        return tuple(example for at in range(min(count, schedule.batch_size)) for example in unit(at, length))

    typical, longest = (forests.build(unit(0, length), share=share).unique_tokens for length in (mean, cutoff_len))
    micro_batches = []
    for each, budget in budgets(size, tokens, longest):
        few, many = (each or max(1, budget // length) for length in (longest, typical))
        micro_batches.append(
            MicroBatch(
                size=each,
                tokens=budget,
                largest=units(few, cutoff_len),
                typical=units(many, mean),
                accumulates=min(few, many) < schedule.batch_size,
                share=share,
            )
        )
    kind = "pairs" if per_row == 2 else "rows"
    read = min(schedule.total_steps * schedule.batch_size, rows * schedule.total_steps / schedule.steps_per_epoch)
    return Workload(
        micro_batches=tuple(micro_batches),
        tokens=typical * read,
        reference_tokens=typical * min(rows, read),
        steps=schedule.total_steps,
        batch_size=schedule.batch_size,
        rows=rows,
        source=f"assumed: {rows:,} {kind} of {mean:,} tokens on average, the longest {cutoff_len:,}, "
        f"{'all of it trained' if all_trained else 'an eighth of each an answer'}; give --data_path for your own",
    )


def of_rows(
    rows: Rows, *, schedule: Schedule, world: int, size: int | None, tokens: int, share: bool, only: bool = False
) -> Workload:
    """What a run over these rows computes on `world` processes. only: no smaller micro-batches than the settings'."""
    lengths = rows.lengths()
    steps = min(schedule.total_steps, _STEPS)
    orders: dict[int, np.ndarray] = {}
    bounds = [_bound(lengths[loader.step_rows(schedule, step, orders)], size, tokens) for step in range(steps)]
    longest = np.argsort(-np.array(bounds), kind="stable")[:_LONGEST].tolist()
    sample = np.unique(np.linspace(0, steps - 1, min(steps, _SAMPLED)).astype(int)).tolist()
    units = {
        step: [rows.unit(int(index)) for index in loader.step_rows(schedule, step, orders)]
        for step in {*longest, *sample}
    }
    micro_batches, unique = [], 0.0
    for each, budget in budgets(size, tokens, int(lengths.max()))[: 1 if only else _BUDGETS]:
        parts = {
            step: [list(_split(units[step], rank, world, each, budget, share)) for rank in range(world)]
            for step in units
        }
        sampled = [batch for step in sample for part in parts[step] for batch in part]
        batches = sampled + [batch for step in longest for part in parts[step] for batch in part]
        counts = np.array([forests.build(batch, share=share).unique_tokens for batch in batches])
        sampled_counts = counts[: len(sampled)]
        unique = unique or float(sampled_counts.sum()) / len(sample)
        micro_batches.append(
            MicroBatch(
                size=each,
                tokens=budget,
                largest=batches[int(counts.argmax())],
                typical=sampled[int(np.abs(sampled_counts - sampled_counts.mean()).argmin())],
                accumulates=any(len(part) > 1 for step in units for part in parts[step]),
                share=share,
            )
        )
    return Workload(
        micro_batches=tuple(micro_batches),
        tokens=unique * schedule.total_steps,
        reference_tokens=unique / schedule.batch_size * min(len(rows), schedule.total_steps * schedule.batch_size),
        steps=schedule.total_steps,
        batch_size=schedule.batch_size,
        rows=len(rows),
        source=f"{len(rows):,} row{'' if len(rows) == 1 else 's'} of {lengths.mean():,.0f} tokens on average, "
        f"the longest {lengths.max():,}",
    )


def _split(
    units: Sequence[Sequence[Example]], rank: int, world: int, size: int | None, tokens: int, share: bool
) -> Iterator[Examples]:
    """The micro-batches of one process, as the trainer packs them."""
    read = [[forests.needed(example) for example in unit] for unit in units]
    mine = packing.share_of(rank, world, read, share=share)
    for group in packing.micro_batches([read[index] for index in mine], size=size, tokens=tokens, share=share):
        if group:
            yield tuple(example for place in group for example in units[mine[place]])


def _bound(lengths: np.ndarray[Any, Any], size: int | None, tokens: int) -> int:
    """No micro-batch of a step with units of these lengths has more tokens."""
    if size is not None:
        return int(np.sort(lengths)[-size:].sum())
    return int(max(lengths.max(), min(tokens, lengths.sum())))
