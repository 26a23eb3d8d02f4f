"""Each step is prepared while the one before it runs: rows are read, packed into forests, copied to the device."""

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
from byeori.model import device_batch
from byeori.model.device_batch import DeviceBatch
from byeori.train import memory
from byeori.train.state import Job, Options, Progress

Unit = Sequence[Example]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """units: all rows of the step. placed: this process's micro-batches of them, halved `halvings` times."""

    units: list[Unit]
    halvings: int
    placed: list[DeviceBatch]

    def batches(self, job: Job, halvings: int) -> Iterator[DeviceBatch]:
        """Yield the micro-batches, releasing each as the next is taken; built again if memory ran out since."""
        if halvings != self.halvings:
            self.placed[:] = []
            yield from place(job, self.units, halvings)
        while self.placed:
            yield self.placed.pop(0)


@contextmanager
def steps_from(job: Job, progress: Progress) -> Iterator[Iterator[Step]]:
    """Yield the remaining steps of a run, each prepared while the one before it runs."""
    orders: dict[int, np.ndarray] = {}

    def prepare(step: int) -> Step:
        units: list[Unit] = [job.train_rows.unit(int(i)) for i in loader.step_rows(job.schedule, step, orders)]
        halvings = progress.halvings
        return Step(units=units, halvings=halvings, placed=list(place(job, units, halvings)))

    with ahead(prepare, range(progress.step, job.schedule.total_steps), job.processes.device) as steps:
        yield _with_pages(steps, memory.Pages(job.processes.device, limit=job.planned_bytes))


def _with_pages(steps: Iterator[Step], pages: memory.Pages) -> Iterator[Step]:
    for step in steps:
        pages.before(max((batch.forest.unique_tokens for batch in step.placed), default=0))
        yield step


def place(job: Job, units: Sequence[Unit], halvings: int) -> Iterator[DeviceBatch]:
    """Yield this process's micro-batches of some rows, on its device."""
    windows = device_batch.windows(job.model.config)
    for forest in pack(units, job.options, job.processes, halvings):
        yield device_batch.place(forest, job.processes.device, windows)


def pack(units: Sequence[Unit], options: Options, processes: Processes, halvings: int = 0) -> Iterator[Forest]:
    """Yield the micro-batches of one process as forests. halvings: how often each is halved."""
    tokens = [[forests.needed(example) for example in unit] for unit in units]
    mine = packing.share_of(processes.rank, processes.world, tokens, share=options.share_prefixes)
    for group in _groups(mine, tokens, options, halvings):
        yield forests.build([example for index in group for example in units[index]], share=options.share_prefixes)


def idle(units: Sequence[Unit], options: Options, processes: Processes, halvings: int = 0) -> Iterator[Forest]:
    """Yield micro-batches without effect, so that this process runs as many as the busiest one.

    Where weights are sharded, a layer is gathered from all processes, so each of them has to run it.
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
    """The units of a process, grouped by micro-batch."""
    size = 1 if options.one_at_a_time else options.micro_batch_size
    mine = [tokens[index] for index in part]
    groups = packing.micro_batches(mine, size=size, tokens=options.micro_batch_tokens, share=options.share_prefixes)
    return [[part[place] for place in group] for whole in groups for group in packing.halved(whole, halvings)]


@contextmanager
def ahead(make: Callable[[int], T], steps: Iterable[int], device: torch.device) -> Iterator[Iterator[T]]:
    """Yield make(step) for each step, computed in a thread that is one step ahead of the consumer.

    An exception of make is raised when its step is taken; leaving the block ends the thread. The order of calls, and
    so their results, does not depend on timing. Copies to the device go to the stream that computes.
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
