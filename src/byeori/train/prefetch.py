"""A step is made ready while the one before it runs: rows read, packed into forests, copied to the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from byeori.batch import forest as forests
from byeori.batch import loader, packing
from byeori.batch.forest import Forest
from byeori.data.tokenize import Example
from byeori.distributed.processes import Processes
from byeori.model import device_batch as placed
from byeori.model.device_batch import DeviceBatch
from byeori.train import memory
from byeori.train.state import Job, Options, Run

Unit = Sequence[Example]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """units: all rows of the step. placed: this process's micro-batches of them, halved `halvings` times."""

    units: list[Unit]
    halvings: int
    placed: list[DeviceBatch]

    def batches(self, job: Job, halvings: int) -> Iterator[DeviceBatch]:
        """The micro-batches, each let go of when the next is taken; made anew where memory ran out since."""
        if halvings != self.halvings:
            self.placed[:] = []
            yield from place(job, self.units, halvings)
        while self.placed:
            yield self.placed.pop(0)


@contextmanager
def steps_from(job: Job, run: Run) -> Iterator[Iterator[Step]]:
    """The steps that a run has left, each made ready while the one before it runs."""
    orders: dict[int, np.ndarray] = {}

    def prepare(step: int) -> Step:
        units: list[Unit] = [job.train_rows.unit(int(i)) for i in loader.step_rows(job.plan, step, orders)]
        halvings = run.halvings
        return Step(units=units, halvings=halvings, placed=list(place(job, units, halvings)))

    with ahead(prepare, range(run.step, job.plan.total_steps), job.processes.device) as steps:
        yield _with_pages(steps, memory.Pages(job.processes.device, limit=job.planned_bytes))


def _with_pages(steps: Iterator[Step], pages: memory.Pages) -> Iterator[Step]:
    for step in steps:
        pages.before(max((batch.forest.unique_tokens for batch in step.placed), default=0))
        yield step


def place(job: Job, units: Sequence[Unit], halvings: int) -> Iterator[DeviceBatch]:
    """This process's micro-batches of some rows, on its device."""
    windows = placed.windows(job.model.config)
    for forest in pack(units, job.options, job.processes, halvings):
        yield placed.place(forest, job.processes.device, windows)


def pack(units: Sequence[Unit], options: Options, processes: Processes, halvings: int = 0) -> Iterator[Forest]:
    """The micro-batches of one process, as forests. halvings: how often each is split in two."""
    tokens = [[forests.needed(example) for example in unit] for unit in units]
    mine = packing.share_of(processes.rank, processes.world, tokens, share=options.share_prefixes)
    for group in _groups(mine, tokens, options, halvings):
        yield forests.build([example for index in group for example in units[index]], share=options.share_prefixes)


def idle(units: Sequence[Unit], options: Options, processes: Processes, halvings: int = 0) -> Iterator[Forest]:
    """Micro-batches that count for nothing, after which this process has run as many as the busiest.

    Where weights are sharded, a layer is gathered from all processes, so all of them must come by.
    """
    if not processes.sharded:
        return
    tokens = [[forests.needed(example) for example in unit] for unit in units]
    parts = packing.shares(processes.world, tokens, share=options.share_prefixes)
    counts = [len(_groups(part, tokens, options, halvings)) for part in parts]
    shortest = min(units, key=lambda unit: sum(len(forests.needed(example)) for example in unit))
    for _ in range(max(counts) - counts[processes.rank]):
        yield forests.build(shortest, share=options.share_prefixes)


def _groups(part: list[int], tokens: Sequence[packing.Unit], options: Options, halvings: int) -> list[list[int]]:
    """Units of a process, by micro-batch."""
    size = 1 if options.one_at_a_time else options.micro_batch_size
    mine = [tokens[index] for index in part]
    groups = packing.micro_batches(mine, size=size, tokens=options.micro_batch_tokens, share=options.share_prefixes)
    return [[part[place] for place in group] for whole in groups for group in packing.halved(whole, halvings)]


@contextmanager
def ahead(make: Callable[[int], T], steps: Iterable[int], device: torch.device) -> Iterator[Iterator[T]]:
    """make(step) for each step, in a thread of its own that is one step ahead of whoever takes them.

    What make raises is raised where its step is taken; leaving the block ends the thread. The order of calls, and so
    what they give, does not depend on timing. The device's copies go to the stream that computes.
    """

    def use() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)

    pool = ThreadPoolExecutor(1, thread_name_prefix="byeori-ahead", initializer=use)
    try:
        yield _taken(pool, make, steps)
    finally:
        pool.shutdown(cancel_futures=True)


def _taken(pool: ThreadPoolExecutor, make: Callable[[int], T], steps: Iterable[int]) -> Iterator[T]:
    waiting: Future[T] | None = None
    for step in steps:
        following = pool.submit(make, step)
        if waiting is not None:
            yield waiting.result()
        waiting = following
    if waiting is not None:
        yield waiting.result()
