"""Log-probs under the reference model: computed once, before training, and cached in a file.

The reference is the model before training: the base with its adapter switched off, or with the adapter that the run
continues. Its log-probs are computed on the forests that training uses, without rows that the run never reaches, and
are read from the file row by row, so that nothing of the reference stays in memory. What was computed before an
interruption is not computed again.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from byeori.batch import loader
from byeori.batch.forest import Forest
from byeori.data import tokenized
from byeori.data.tokenized import Rows
from byeori.distributed.processes import Processes, all_reduce_array, all_reduce_sum, barrier
from byeori.model import forward, full, wrap
from byeori.support.atomic_files import disk_errors, new_file
from byeori.support.console import Say
from byeori.train import oom
from byeori.train.prefetch import idle, pack
from byeori.train.state import Options

_ROUNDING = 0.02  # nats a token; that of bfloat16 is a tenth of it, another model differs by more


def rows_of_first_epoch(schedule: loader.Schedule) -> list[np.ndarray]:
    """Return the rows of each step of the first epoch: packed as they will be trained."""
    orders: dict[int, np.ndarray] = {}
    return [
        loader.step_rows(schedule, step, orders) for step in range(min(schedule.total_steps, schedule.steps_per_epoch))
    ]


def in_order(count: int, at_once: int) -> list[np.ndarray]:
    """Return all of `count` rows, in the parts that evaluation uses."""
    return [np.arange(start, min(start + at_once, count)) for start in range(0, count, at_once)]


@torch.no_grad()
def with_reference(
    model: Any,
    rows: Rows,
    parts: Sequence[np.ndarray],
    *,
    file: Path,
    fresh: bool,
    options: Options,
    processes: Processes,
    on_progress: Callable[[int, int], None],
    say: Say,
) -> Rows:
    """Return the rows with their reference log-probs.

    parts: the rows that are needed, grouped as they will be trained. file: the cache, with the log-probs of the table's
    targets (float32), then a CRC-32 of those of each row; where it does not fit, they are not computed yet, or damaged.
    The first part is computed in any case, and a cache that says something else is not used. fresh: the adapter is new,
    so the reference is the model without it; a model that is trained in full is the base before its first step.

    Raises:
        CheckpointError: if the disk is full or read-only.
    """
    offsets = tokenized.target_offsets(rows.table)
    bounds = offsets[rows.starts]
    values, sums = _open_cache(file, bounds, processes)
    training = model.training
    model.eval()
    adapter_off: AbstractContextManager[Any] = (
        model.disable_adapter() if fresh and not full.is_full(model) else nullcontext()
    )
    with adapter_off, wrap.uncompiled():
        for done, part in enumerate(parts):
            spans = [slice(bounds[i], bounds[i + 1]) for i in part.tolist()]
            kept = [zlib.crc32(values[span].tobytes()) == sums[i] for i, span in zip(part, spans, strict=True)]
            missing = processes.first_here and not all(kept)
            if done == 0 or all_reduce_sum([float(missing)], processes)[0]:
                computed = _compute(model, rows, part, spans, options, processes)
                if processes.first_here and not missing and not _close([values[span] for span in spans], computed):
                    say(f"The reference log-probs in {file} are not those of this model; computing them again")
                    sums[:], missing = 0, True
                if missing:
                    for i, span, logprobs in zip(part, spans, computed, strict=True):
                        values[span], sums[i] = logprobs, zlib.crc32(logprobs.tobytes())
                    values.flush()
                    sums.flush()
            on_progress(done + 1, len(parts))
    model.train(training)
    barrier(processes)
    del values, sums
    return replace(rows, reference=np.memmap(file, dtype=np.float32, mode="r", shape=int(bounds[-1])), offsets=offsets)


def _close(kept: Sequence[np.ndarray], computed: Sequence[np.ndarray]) -> bool:
    """Whether log-probs of the same model: other threads or processors round otherwise."""
    difference = np.abs(np.concatenate(kept) - np.concatenate(computed))
    return bool(difference.mean() < _ROUNDING) if difference.size else True


def _open_cache(file: Path, bounds: np.ndarray, processes: Processes) -> tuple[np.memmap, np.memmap]:
    """Map the file's log-probs and checksums; it is made, with checksums that do not fit, unless it has their size.

    bounds: of each row's log-probs, and their number at the end.
    """
    targets, count = int(bounds[-1]), len(bounds) - 1
    if processes.first_here and not (file.is_file() and file.stat().st_size == 4 * (targets + count)):
        advice = "set BYEORI_CACHE to a folder with room"
        with disk_errors(f"the reference's log-probs in {file}", advice=advice):
            file.parent.mkdir(parents=True, exist_ok=True)
            with new_file(file) as temporary:
                np.zeros(targets + count, dtype=np.float32).tofile(temporary)
    barrier(processes)
    mode: Literal["r+", "r"] = "r+" if processes.first_here else "r"
    return (
        np.memmap(file, dtype=np.float32, mode=mode, shape=targets),
        np.memmap(file, dtype=np.uint32, mode=mode, offset=4 * targets, shape=count),
    )


def _compute(
    model: Any, rows: Rows, part: np.ndarray, spans: Sequence[slice], options: Options, processes: Processes
) -> list[np.ndarray]:
    """Return the log-probs of each row's targets, the same on every process."""
    units = [rows.unit(index) for index in part.tolist()]
    numbers = {unit[0].row: place for place, unit in enumerate(units)}
    starts = np.concatenate([[0], np.cumsum([span.stop - span.start for span in spans])])
    flat = np.zeros(starts[-1], dtype=np.float64)
    for batch in pack(units, options, processes):

        def computed(batch: Forest = batch) -> np.ndarray:
            return forward.forest_logprobs(model, batch, plain=options.one_at_a_time).double().cpu().numpy()

        logprobs = oom.attempt(computed, batch.rows, batch.unique_tokens)
        done = 0
        for row in dict.fromkeys(batch.rows):
            place = numbers[row]
            count = starts[place + 1] - starts[place]
            flat[starts[place] : starts[place + 1]] = logprobs[done : done + count]
            done += count
    for batch in idle(units, options, processes):
        forward.forest_logprobs(model, batch, plain=options.one_at_a_time)
    flat = all_reduce_array(flat, processes)
    return [flat[start:stop].astype(np.float32) for start, stop in pairwise(starts)]
