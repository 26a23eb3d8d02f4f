"""Forest attention in bfloat16 on the CPU by tiles (attention.c): one call a layer, forward and back.

A strip of 32 queries meets the tiles of 32 keys that it sees and no others, wherever they lie in the forest, so no keys
are gathered along paths; scores stay float32.

    D, E sizes of heads, H query heads, G key/value heads, n queries, T tokens
"""

from __future__ import annotations

from typing import Any

import torch

from byeori.kernels import native
from byeori.kernels.cpu_attention import Nodes


def takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `attend` is to be used for these, which are on the CPU."""
    return native.tiles() > 0 and all(states.dtype == torch.bfloat16 for states in (query, key, value))


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, nodes: Nodes, window: int | None, scale: float
) -> torch.Tensor:
    """query [n, H, D], key [T, G, D], value [T, G, E] -> [n, H, E]. A node's path ends at its last query."""
    table = torch.tensor([number for start, end, path in nodes for number in (start, end, len(path), *sum(path, ()))])
    found: torch.Tensor = _Tiles.apply(query, key, value, table, len(nodes), window, scale)
    return found


class _Tiles(torch.autograd.Function):
    """As above; nodes: start, end, the number of runs, and their starts and ends, one node after the other."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        query, key, value, nodes, count, window, scale = args
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        out = query.new_empty(*query.shape[:2], value.shape[-1])
        sums = query.new_empty(*query.shape[:2], 2, dtype=torch.float32)
        how = _how(query, key, value, nodes, count, window, scale)
        native.call("attend", query, key, value, out, sums, *how)
        ctx.save_for_backward(query, key, value, sums)
        ctx.how = how
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, sums = ctx.saved_tensors
        found = [torch.empty_like(states) for states in (query, key, value)]
        native.call("attend_back", grads[0].contiguous(), query, key, value, sums, *found, *ctx.how)
        return *found, None, None, None, None


def _how(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    nodes: torch.Tensor,
    count: int,
    window: int | None,
    scale: float,
) -> tuple[Any, ...]:
    tokens, groups, size = key.shape
    return nodes, count, tokens, query.shape[1], groups, size, value.shape[-1], window or tokens, scale
