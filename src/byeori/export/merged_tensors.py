"""Compute the tensors of a merged model, a block of rows at a time.

    base's bytes ──> [rows, columns] in float32 + scale * L R ──> rounded once to the final dtype

Memory: one block of rows and one layer's A and B, however large the model; one whole layer if it is opened from
quantized weights. L and R: see adapter_changes.Change.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from byeori.errors import ModelError
from byeori.export import expert_changes
from byeori.export.adapter_changes import Change
from byeori.export.merge_plan import MergedTensor
from byeori.model.fingerprint import Stored
from byeori.model.opened import DTYPES, Opened, read, row_blocks


def blocks(item: MergedTensor) -> Iterator[torch.Tensor]:
    """Yield one tensor of the merged model as blocks of rows, each [elements] in its final dtype.

    Raises:
        ModelError: if a number is not finite, or a file is cut short.
    """
    if item.dtype not in DTYPES or (item.source.dtype not in DTYPES and not isinstance(item.source, Opened)):
        yield from (block for *_, block in row_blocks(item.source))
        return
    changed = _changed(item, item.change) if item.change else (block for *_, block in row_blocks(item.source))
    for block in changed:
        block = block.to(DTYPES[item.dtype])
        if not bool(torch.isfinite(block).all()):
            cause = "merged" if item.change else "base's"
            raise ModelError(
                f"{item.name} has numbers in its {cause} weights that are not finite as {item.dtype}; "
                "use an earlier checkpoint, another --dtype, or an undamaged base"
            )
        yield block


def _changed(item: MergedTensor, change: Change) -> Iterator[torch.Tensor]:
    lengths = _column_lengths(item, change) if change.magnitude and change.transposed else None
    magnitude = _numbers(change.magnitude, "magnitude", change) if change.magnitude else None
    tokens = _numbers(change.token_rows, "tokens", change) if change.token_rows else None
    for first, last, wide in _added(item, change):
        if magnitude is not None:  # DoRA: every output's weights have a length of their own
            if lengths is not None:
                wide = wide * (magnitude / lengths)
            else:
                wide = wide * (magnitude[first:last] / wide.norm(dim=1)).unsqueeze(1)
        if tokens is not None:
            for place, token in enumerate(change.tokens):
                if first <= token < last:
                    wide[token - first] = tokens[place].to(wide.dtype)
        yield wide.reshape(-1)


def _added(item: MergedTensor, change: Change) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield (first row, last row + 1, rows [n, columns] of W + scale * L R), in float32 or wider."""
    factors = _factors(change)
    whole = change.fused.of(item.name) if change.fused else None
    bias = change.scale * _numbers(change.added, "lora_B's bias", change) if change.added else None
    for first, last, block in row_blocks(item.source):
        wide = block.to(torch.promote_types(block.dtype, torch.float32)).view(last - first, -1)
        if whole is not None:
            wide = wide + whole[first:last].reshape(wide.shape).to(wide.dtype)
        if factors and change.experts:
            left, right = (factor[first:last].to(wide.dtype) for factor in factors)
            stack = wide.view(last - first, left.shape[1], right.shape[2])
            wide = stack.baddbmm(left, right, alpha=change.scale).view(wide.shape)
        elif factors:
            left, right = factors
            wide = wide.addmm(left[first:last].to(wide.dtype), right.to(wide.dtype), alpha=change.scale)
        if bias is not None:
            wide = wide + bias[first:last].to(wide.dtype).unsqueeze(1)
        yield first, last, wide


def _factors(change: Change) -> tuple[torch.Tensor, torch.Tensor] | None:
    """L and R."""
    if not (change.a and change.b):
        return None
    if change.experts:
        return expert_changes.factors(change)
    a, b = _numbers(change.a, "lora_A", change), _numbers(change.b, "lora_B", change)
    return (a.t(), b.t()) if change.transposed else (b, a)


def _column_lengths(item: MergedTensor, change: Change) -> torch.Tensor:
    squares = sum(wide.double().square().sum(0) for *_, wide in _added(item, change))
    assert isinstance(squares, torch.Tensor)
    return squares.sqrt().float()


def _numbers(stored: Stored, what: str, change: Change) -> torch.Tensor:
    """Return a tensor of the adapter in float32, after checking that its numbers are finite."""
    tensor = read(stored)
    if not bool(torch.isfinite(tensor).all()):
        raise ModelError(
            f"{stored.path}: {what} of {change.module} has numbers that are not finite: the run diverged; "
            "use an earlier checkpoint"
        )
    return tensor.float()
