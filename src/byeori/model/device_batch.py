"""A forest's tensors on the device, in two copies; to a GPU from pinned memory, so that neither side waits.

T tokens, M targets
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from byeori.batch.forest import Forest
from byeori.kernels import cuda_calls, device_kind, forest_attention
from byeori.losses.base import Targets
from byeori.model.text_model import text_config

# On a CPU, idle tokens fill a forest up to a multiple of these, and idle rows those of the last layer, if at most one
# token in _AT_MOST is idle. bfloat16 products take up to a tenth longer over 2,047 rows than over 2,048, and each new
# shape costs time and memory once.
_MULTIPLES, _AT_MOST, _LAST_ROWS = (64, 16), 32, 16


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceBatch:
    """ids, positions: [1, T], on a CPU followed by idle tokens that predict nothing and that no other token sees.
    index, target_ids: [M], as Forest's target_index and target_ids. layout: for attention.
    index_of_rows: [M], the index into the hidden states if they are those of layout.rows alone.
    targets: what the objective gets besides the log-probs.
    """

    forest: Forest
    ids: torch.Tensor
    positions: torch.Tensor
    index: torch.Tensor
    index_of_rows: torch.Tensor
    target_ids: torch.Tensor
    targets: Targets
    layout: forest_attention.Layout


def place(forest: Forest, device: torch.device, windows: Collection[int | None] = ()) -> DeviceBatch:
    """Copy a forest to the device, without waiting for the device.

    windows: of the model's layers; a GPU's attention is then planned here, not in the first layer.
    """
    whole, rows = forest, np.unique(forest.target_index)
    if device_kind.kind_of(device) == "cpu":
        whole = _with_idle_tokens(forest)
        rows = _with_idle_rows(rows, whole.unique_tokens)
    index_of_rows = np.searchsorted(rows, forest.target_index)
    columns = [whole.token_ids, whole.positions, forest.target_index, forest.target_ids, forest.target_owner]
    ids, positions, index, target_ids, owner, short, at = _move([*columns, index_of_rows, rows], np.int64, device)
    reference = [] if forest.reference is None else [forest.reference]
    weights, *references = _move([forest.target_weight, *reference], np.float32, device)
    layout = forest_attention.layout(whole, rows.tolist(), at)
    if device.type == "cuda":
        for window in windows:
            layout.plans[window] = cuda_calls.plan(layout.tree, layout.nodes, window=window, device=device)
    return DeviceBatch(
        forest=forest,
        ids=ids[None],
        positions=positions[None],
        index=index,
        index_of_rows=short,
        target_ids=target_ids,
        targets=Targets(
            weights=weights,
            owner=owner,
            examples=len(forest.rows),
            reference=references[0] if references else None,
        ),
        layout=layout,
    )


def _with_idle_tokens(forest: Forest) -> Forest:
    """The forest followed by a tree of idle tokens, if that costs little."""
    tokens = forest.unique_tokens
    idle = next((count for multiple in _MULTIPLES if (count := _missing(tokens, multiple, tokens))), 0)
    if not idle:
        return forest
    return replace(
        forest,
        token_ids=np.concatenate([forest.token_ids, np.repeat(forest.token_ids[:1], idle)]),
        positions=np.concatenate([forest.positions, np.arange(idle)]),
        nodes=(*forest.nodes, (tokens, tokens + idle, -1)),
    )


def _with_idle_rows(rows: np.ndarray, tokens: int) -> np.ndarray:
    """The rows and, if that costs little, some of the other tokens'; ascending."""
    others = np.setdiff1d(np.arange(tokens), rows)
    return np.sort(np.concatenate([rows, others[len(others) - _missing(len(rows), _LAST_ROWS, tokens) :]]))


def _missing(count: int, multiple: int, tokens: int) -> int:
    """What a count lacks to a multiple; 0 if that is more than the tokens allow."""
    missing = -count % multiple
    return missing if missing * _AT_MOST <= tokens else 0


def _move(columns: list[np.ndarray], dtype: Any, device: torch.device) -> list[torch.Tensor]:
    host = torch.from_numpy(np.concatenate([column.astype(dtype, copy=False) for column in columns]))
    return list(cuda_calls.to_device(host, device).split([len(column) for column in columns]))


def windows(config: Any) -> set[int | None]:
    """Return the attention windows of a model's layers by its configuration, None for full attention."""
    text = text_config(config)
    window = getattr(text, "sliding_window", None)
    types = set(getattr(text, "layer_types", None) or ())
    return {window if each == "sliding_attention" else None for each in types} if types else {window}
