"""A forest's numbers on the device that computes, in two copies; on a GPU from pinned memory, so that nobody waits.

T tokens, M targets
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from byeori.batch.forest import Forest
from byeori.model import attention, cuda_calls
from byeori.objective.record import Targets


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """ids, positions: [1, T]. index, target_ids: [M], as Forest's target_index and target_ids. layout: for attention.

    index_of_rows: [M], the same as index where the hidden states are those of layout.rows alone.
    targets: what the objective is given beside the log-probs.
    """

    forest: Forest
    ids: torch.Tensor
    positions: torch.Tensor
    index: torch.Tensor
    index_of_rows: torch.Tensor
    target_ids: torch.Tensor
    targets: Targets
    layout: attention.Layout


def place(forest: Forest, device: torch.device, windows: Collection[int | None] = ()) -> Placed:
    """Bring a forest to the device, without waiting for what the device is doing.

    windows: of the model's layers; a GPU's attention is then planned here, not when a layer first meets it.
    """
    rows, index_of_rows = np.unique(forest.target_index, return_inverse=True)
    columns = [forest.token_ids, forest.positions, forest.target_index, forest.target_ids, forest.target_owner]
    ids, positions, index, target_ids, owner, short, at = _move([*columns, index_of_rows, rows], np.int64, device)
    reference = [] if forest.reference is None else [forest.reference]
    weights, *references = _move([forest.target_weight, *reference], np.float32, device)
    layout = attention.layout(forest, at)
    if device.type == "cuda":
        for window in windows:
            layout.plans[window] = cuda_calls.plan(layout.tree, layout.nodes, window=window, device=device)
    return Placed(
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


def _move(columns: list[np.ndarray], dtype: Any, device: torch.device) -> list[torch.Tensor]:
    host = torch.from_numpy(np.concatenate([column.astype(dtype, copy=False) for column in columns]))
    return list(cuda_calls.to_device(host, device).split([len(column) for column in columns]))


def windows(config: Any) -> set[int | None]:
    """The attention windows of a model's layers, None for full attention, as far as its configuration tells."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    kinds = set(getattr(text, "layer_types", None) or ())
    return {window if kind == "sliding_attention" else None for kind in kinds} if kinds else {window}
