"""Out of memory: micro-batches are split and the step is computed again, on all processes, with the same result.

A backward pass that fails half-way leaves gradients behind, so the whole step starts again without any. The smaller
size stays for the rest of the run and is part of its checkpoints: a resumed run sums in the same order.

If weights are sharded, the other processes wait for a layer of the failed pass and cannot leave it. The run then ends
with a checkpoint and a note of the smaller size, and goes on from both: by itself if byeori or torchrun --max-restarts
started its processes.

On a CPU nothing fails: memory is granted before it is there, and the kernel ends the process that uses it. So each
layer asks first how much is left (`watched`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import torch

from byeori.distributed.processes import Processes, all_reduce_sum
from byeori.errors import TrainingError, no_memory
from byeori.train import memory

T = TypeVar("T")
NOTE = ".micro_batches_halved"
_CPU = torch.device("cpu")
_LEAST = 256 * 2**20  # bytes that are left alone
# What was free in each layer of a pass so far; None outside of one, and where it cannot be split.
_FREE: ContextVar[list[int] | None] = ContextVar("free", default=None)


class NoRoom(TrainingError):
    """The rows do not fit in memory together. row: the first of them. alone: whether it is the only one."""

    def __init__(self, rows: Sequence[int], tokens: int) -> None:
        self.rows, self.tokens = list(dict.fromkeys(rows)), tokens
        self.row, self.alone = self.rows[0], len(self.rows) == 1
        super().__init__(
            f"row {self.row + 1} does not fit in memory, even alone; lower --cutoff_len, or give "
            "--gradient_checkpointing True or --load_in_4bit True"
            if self.alone
            else f"{len(self.rows)} rows ({tokens} tokens) do not fit in memory together; lower --micro_batch_tokens"
        )


def ran_out(error: Exception) -> bool:
    """Whether an error means that the memory of the GPU or of the machine ran out."""
    return isinstance(error, torch.OutOfMemoryError) or no_memory(error)


def remember(output_dir: Path, halvings: int) -> None:
    """Note how often micro-batches are halved, for the next attempt; any process may write it."""
    (output_dir / NOTE).write_text(str(halvings), encoding="utf-8")


def remembered(output_dir: Path) -> int:
    """Return how often micro-batches are halved, as an earlier attempt noted."""
    try:
        return max(0, int((output_dir / NOTE).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return 0


def attempt(compute: Callable[[], T], rows: Sequence[int], tokens: int) -> T:
    """Return compute(), which runs a micro-batch of these rows and this many tokens.

    Raises:
        NoRoom: if it ran out of memory; what it held is free again.
    """
    pass_ = _FREE.set([] if len(set(rows)) > 1 else None)
    try:
        return compute()
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
    finally:
        _FREE.reset(pass_)
    raise NoRoom(rows, tokens)  # outside the handler, which keeps everything alive that the failed pass computed


@contextmanager
def watched(layers: Sequence[torch.nn.Module], device: torch.device) -> Iterator[None]:
    """End a pass of several rows inside where a layer may not find the memory that it needs.

    That is: less is left than twice what the layer before took, and the pass took more than is left. Compiled layers
    do not ask.
    """
    watching = [layer for layer in layers if device.type == "cpu" and not layer.__dict__.get("_compiled_call_impl")]
    hooks = [layer.register_forward_pre_hook(_ask) for layer in watching]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _ask(*_: Any) -> None:
    seen = _FREE.get()
    if seen is None:
        return
    seen.append(free := memory.available_bytes(_CPU))
    if free < max(_LEAST, 2 * (seen[-2:][0] - free)) and seen[0] - free > free:
        raise MemoryError(f"not enough memory: {free / 2**20:.0f} MiB are left in the middle of a pass")


def summed(
    compute: Callable[[dict[str, torch.Tensor], int], None],
    names: Sequence[str],
    processes: Processes,
    *,
    halvings: int,
    on_split: Callable[[int, NoRoom | None], None],
) -> dict[str, float]:
    """Return what `compute` adds to the named numbers, summed over all processes; computed again with smaller
    micro-batches until every process has room.

    compute: is given the numbers, float64 on the device, and how often micro-batches are halved. They are read once,
    because reading makes the host wait for the device. on_split: is given the new number of halvings, and the error if
    it was this process that had no room.

    Raises:
        NoRoom: if a row does not fit alone, here or on another process; or if weights are sharded and rows do not fit.
    """
    while True:
        numbers = torch.zeros(len(names), dtype=torch.float64, device=processes.device)
        trouble, mine = [0.0] * processes.world, None
        try:
            compute(dict(zip(names, numbers, strict=True)), halvings)
        except NoRoom as error:
            if processes.sharded:  # the others wait for a layer in the middle of this pass
                raise
            mine = error
            trouble[processes.rank] = error.row + 1.0 if error.alone else -1.0
        totals = all_reduce_sum([*numbers.tolist(), *trouble], processes)
        trouble = totals[len(names) :]
        if not any(trouble):
            return dict(zip(names, totals, strict=False))
        if max(trouble) > 0:
            raise NoRoom([int(max(trouble)) - 1], 0)
        memory.give_back(processes.device)
        if processes.device.type == "cuda":
            torch.cuda.empty_cache()  # cached blocks of the old sizes are of no use to a smaller micro-batch
        halvings += 1
        on_split(halvings, mine)
