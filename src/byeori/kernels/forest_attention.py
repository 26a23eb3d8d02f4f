"""Attention on a forest: every token attends to its own path from the root.

One function is registered with transformers' attention interface; the layout travels as a keyword argument through
the model's layers. Queries of a node see the keys of its ancestors, all of them, and of the node itself causally.

    D head size, H query heads, G key/value heads, T unique tokens, n a node's queries, m its path's keys (m >= n)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from byeori.batch.forest import Forest
from byeori.kernels import cpu_attention, cpu_tiles, cuda_attention, cuda_calls, device_kind

NAME = "byeori_forest"


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What attention needs to know of a forest; made once a micro-batch and shared by all layers.

    nodes: (start, end) of the queries and the (start, end) runs of the keys, root first, the node itself last.
    masks: (node, window) -> [n, m], added to the scores; made when a layer first needs it.
    tree: the forest's own nodes. plans: window -> the GPU kernel's calls; made when a layer first needs them.
    calls: how often attention ran; 0 after a forward pass means that the model does not use the interface.
    rows: the rows of the hidden states that predict something [n], ascending, where the model computes; with others
    among them that fill up their number. row_numbers: the same on the host.
    others: what the last layer's keys and values are made of [T, d], where its queries are those of `rows` alone.
    """

    nodes: tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...]
    rows: torch.Tensor
    row_numbers: list[int]
    others: torch.Tensor | None = None
    tree: tuple[tuple[int, int, int], ...] = ()
    masks: dict[tuple[int, int | None], torch.Tensor] = field(default_factory=dict)
    plans: dict[int | None, list[cuda_calls.Call]] = field(default_factory=dict)
    calls: list[int] = field(default_factory=lambda: [0])


def layout(forest: Forest, numbers: list[int] | None = None, rows: torch.Tensor | None = None) -> Layout:
    """The paths of a forest's nodes. numbers and rows: the layout's row_numbers and rows; without them those of the
    targets, on the CPU."""
    paths: list[tuple[tuple[int, int], ...]] = []
    for start, end, parent in forest.nodes:
        above = paths[parent] if parent >= 0 else ()
        if above and above[-1][1] == start:  # a first child lies right behind its parent: one run, no copy
            paths.append((*above[:-1], (above[-1][0], end)))
        else:
            paths.append((*above, (start, end)))
    nodes = tuple((start, end, path) for (start, end, _), path in zip(forest.nodes, paths, strict=True))
    numbers = sorted(set(forest.target_index.tolist())) if numbers is None else numbers
    rows = torch.tensor(numbers) if rows is None else rows
    return Layout(nodes=nodes, rows=rows, row_numbers=numbers, tree=forest.nodes)


def of_rows(whole: Layout, others: torch.Tensor) -> Layout:
    """The layout whose queries are `rows` alone: every run of neighbours is a node, its path ends at the last."""
    nodes, at = [], 0
    rows = whole.row_numbers
    for _, end, path in whole.nodes:
        while at < len(rows) and rows[at] < end:
            stop = at + 1
            while stop < len(rows) and rows[stop] == rows[stop - 1] + 1 and rows[stop] < end:
                stop += 1
            nodes.append((at, stop, (*path[:-1], (path[-1][0], rows[stop - 1] + 1))))
            at = stop
    return Layout(nodes=tuple(nodes), rows=whole.rows, row_numbers=rows, others=others, calls=whole.calls)


@torch.compiler.disable
def forest_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    forest_layout: Layout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of transformers' interface: query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D].

    softcap: scores become softcap * tanh(scores / softcap). s_aux: a score per head [H] that takes its share of the
    softmax and has no value (attention sinks). dropout: a query on a shared prefix draws one mask for all branches.

    Raises:
        RuntimeError: called without a layout.
    """
    if forest_layout is None:
        raise RuntimeError("forest attention was called without a layout")
    forest_layout.calls[0] += 1
    window = sliding_window or None
    ordinary = softcap is None and s_aux is None
    if ordinary and not dropout and cuda_attention.takes(query, key, value):
        return _on_gpu(query, key, value, forest_layout, window, scaling), None
    if ordinary and not dropout and cpu_attention.takes(query):
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        if cpu_tiles.takes(query, key, value):
            q, k, v = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
            return cpu_tiles.attend(q, k, v, forest_layout.nodes, window, scale)[None], None
        return cpu_attention.attend(query, key, value, forest_layout.nodes, window, scale), None
    masks = [_mask(forest_layout, index, window, query) for index in range(len(forest_layout.nodes))]
    outputs = []
    for (start, end, path), mask in zip(forest_layout.nodes, masks, strict=True):
        keys, values = cpu_attention.gather(key, path), cpu_attention.gather(value, path)
        queries = query[:, :, start:end]
        if ordinary:
            outputs.append(_attend(queries, keys, values, mask, scaling, dropout))
        else:
            outputs.append(_attend_by_hand(queries, keys, values, mask, scaling, dropout, softcap, s_aux))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _on_gpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    forest: Layout,
    window: int | None,
    scaling: float | None,
) -> torch.Tensor:
    if window not in forest.plans:
        forest.plans[window] = cuda_calls.plan(forest.tree, forest.nodes, window=window, device=query.device)
    q, k, v = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return cuda_attention.attend(q, k, v, forest.plans[window], scale=scale)[None]


def _mask(forest: Layout, index: int, window: int | None, like: torch.Tensor) -> torch.Tensor | None:
    """0 where a query sees a key, else -inf: [n, m] in the type of `like`; None where plain causal is the same."""
    start, end, path = forest.nodes[index]
    n, m = end - start, sum(stop - begin for begin, stop in path)
    if window is not None and m <= window:
        window = None
    if window is None and n == m:
        return None
    if (index, window) not in forest.masks:
        back = torch.arange(m - n, m, device=like.device)[:, None] - torch.arange(m, device=like.device)[None, :]
        seen = (back >= 0) if window is None else (back >= 0) & (back < window)
        forest.masks[index, window] = like.new_zeros(n, m).masked_fill_(~seen, float("-inf"))
    return forest.masks[index, window]


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    if (
        query.is_meta and device_kind.kind(query) == "cuda"
    ):  # a rehearsal: a GPU keeps the output and a number for each row
        scaled = torch.ops.aten._scaled_dot_product_flash_attention
        found: torch.Tensor = scaled(query, key, value, dropout, mask is None, scale=scaling)[0]
        return found
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
    )


def _attend_by_hand(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """What scaled_dot_product_attention does not offer: capped scores (Gemma 2) and sinks (gpt-oss)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = torch.full_like(scores[0, 0], float("-inf")).triu_(1)
    scores = scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=_wide(scores.dtype)).to(value.dtype)[..., : key.shape[2]]
    return F.dropout(weights, dropout) @ value


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def register() -> None:
    """Make the function known to transformers under NAME."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, forest_attention)
