"""Out of memory: the micro-batch is split and the step is computed again, on all processes, with the same result.

A backward pass that fails half-way leaves gradients behind, so the whole step starts again from none. The smaller size
is kept for the rest of the run, and is part of its checkpoints: a resumed run adds up in the same order.

Where weights are sharded the other processes wait for a layer of the failed pass, and no process can leave it alone.
The run ends with a checkpoint and a note of the smaller size, and goes on from both: by itself where byeori or torchrun
--max-restarts started its processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from byeori.distributed import processes as parallel
from byeori.distributed.processes import Processes
from byeori.errors import TrainingError
from byeori.train import memory

T = TypeVar("T")
NOTE = ".micro_batches_halved"
_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")


class NoRoom(TrainingError):
    """The rows do not fit in memory together; row: the first of them, or the only one. alone: it is the only one."""

    def __init__(self, rows: Sequence[int], tokens: int) -> None:
        self.rows, self.tokens = list(dict.fromkeys(rows)), tokens
        self.row, self.alone = self.rows[0], len(self.rows) == 1
        super().__init__(
            alone(self.row)
            if self.alone
            else f"{len(self.rows)} rows ({tokens} tokens) do not fit in memory together; lower --micro_batch_tokens"
        )


def alone(row: int) -> str:
    """The sentence for a row that cannot be split."""
    return (
        f"row {row + 1} does not fit in memory, even alone; lower --cutoff_len, or give --gradient_checkpointing True "
        "or --load_in_4bit True"
    )


def ran_out(error: Exception) -> bool:
    """Whether an error says that memory ran out: of the GPU, or of the machine."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def remember(output_dir: Path, halvings: int) -> None:
    """Note the size of micro-batches for the run that goes on from here; any process can."""
    (output_dir / NOTE).write_text(str(halvings), encoding="utf-8")


def remembered(output_dir: Path) -> int:
    """The size that an earlier attempt noted: how often micro-batches are halved."""
    note = output_dir / NOTE
    return int(note.read_text(encoding="utf-8")) if note.is_file() else 0


def attempt(compute: Callable[[], T], rows: Sequence[int], tokens: int) -> T:
    """`compute()` over a micro-batch of these rows and so many tokens.

    Raises:
        NoRoom: it ran out of memory; what it held is free again.
    """
    try:
        return compute()
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
    raise NoRoom(rows, tokens)  # outside of the handler, which holds on to everything that the failed pass computed


def summed(
    compute: Callable[[dict[str, torch.Tensor], int], None],
    names: Sequence[str],
    processes: Processes,
    *,
    halvings: int,
    on_split: Callable[[int, NoRoom | None], None],
) -> dict[str, float]:
    """What `compute` adds to the named numbers, summed over all processes; again with smaller micro-batches, until
    every process has room.

    compute: is given the numbers, on the device in float64, and how often micro-batches are halved; they are read once,
    because reading makes the host wait until everything before it is done. on_split: is told the new number, and why
    where it was this process that had no room.

    Raises:
        NoRoom: a row does not fit alone, here or on another process; or weights are sharded and rows do not fit.
    """
    while True:
        numbers = torch.zeros(len(names), dtype=torch.float64, device=processes.device)
        trouble, mine = [0.0] * processes.world, None
        try:
            compute(dict(zip(names, numbers, strict=True)), halvings)
        except NoRoom as error:
            if processes.sharded:  # the others wait in the middle of this pass for a layer's rows
                raise
            mine = error
            trouble[processes.rank] = error.row + 1.0 if error.alone else -1.0
        totals = parallel.add_up([*numbers.tolist(), *trouble], processes)
        trouble = totals[len(names) :]
        if not any(trouble):
            return dict(zip(names, totals, strict=False))
        if max(trouble) > 0:
            raise NoRoom([int(max(trouble)) - 1], 0)
        memory.give_back(processes.device)
        if processes.device.type == "cuda":
            torch.cuda.empty_cache()  # what lies between the holes is of no use to a smaller micro-batch
        halvings += 1
        on_split(halvings, mine)
