"""Compute the tensors of a merged model, a block of rows at a time.

    base's bytes ──> [rows, columns] in float32 + scale * L R ──> rounded once to the final dtype

Memory: one block of rows and one layer's A and B, however large the model. L and R: see merge_plan.Change.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from byeori.errors import ModelError
from byeori.export.merge_plan import FLOATS, Change, MergedTensor
from byeori.model.fingerprint import Stored

_BLOCK_BYTES = 8 << 20
_DTYPES = {code: getattr(torch, name) for name, code in FLOATS.items()}


def blocks(item: MergedTensor) -> Iterator[torch.Tensor]:
    """Yield one tensor of the merged model as blocks of rows, each [elements] in its final dtype.

    Raises:
        ModelError: if a number is not finite, or a file is cut short.
    """
    factors = _factors(item.change) if item.change else None
    for first, last, block in _row_blocks(item.source):
        if item.source.dtype not in _DTYPES:
            yield block
            continue
        if item.change and factors:
            left, right = factors
            wide = block.to(torch.promote_types(block.dtype, torch.float32)).view(last - first, -1)
            block = wide.addmm(left[first:last].to(wide.dtype), right.to(wide.dtype), alpha=item.change.scale).view(-1)
        block = block.to(_DTYPES[item.dtype])
        if not bool(torch.isfinite(block).all()):
            cause = "merged" if item.change else "base's"
            raise ModelError(
                f"{item.name} has numbers in its {cause} weights that are not finite as {item.dtype}; "
                "use an earlier checkpoint, another --dtype, or an undamaged base"
            )
        yield block


def _row_blocks(stored: Stored) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield (first row, last row + 1, [elements]) of a stored tensor; as bytes if its dtype is not a float."""
    rows = stored.shape[0] if stored.shape else 1
    step = max(1, _BLOCK_BYTES * rows // max(stored.size, 1))
    with stored.path.open("rb") as file:
        file.seek(stored.start)
        for first in range(0, rows if stored.size else 0, step):
            last = min(first + step, rows)
            buffer = bytearray(stored.size // rows * (last - first))
            if file.readinto(buffer) != len(buffer):
                raise ModelError(f"{stored.path} is cut short; copy or download it again")
            yield first, last, torch.frombuffer(buffer, dtype=_DTYPES.get(stored.dtype, torch.uint8))


def _factors(change: Change) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return L [rows, r] and R [r, columns] in float32, or None if the change is only a whole tensor."""
    if change.a is None or change.b is None:
        return None
    factors = []
    for letter, stored in (("A", change.a), ("B", change.b)):
        tensor = torch.cat([block for *_, block in _row_blocks(stored)]).view(stored.shape)
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                f"{stored.path}: lora_{letter} of {change.module} has numbers that are not finite: the run diverged; "
                "use an earlier checkpoint"
            )
        factors.append(tensor.float())
    a, b = factors
    return (a.t(), b.t()) if change.transposed else (b, a)
