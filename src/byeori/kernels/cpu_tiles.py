"""Forest attention in bfloat16 on the CPU by tiles (csrc/attention.c): one call per layer and direction.

A strip of 32 queries is multiplied with the tiles of 32 keys that it sees and no others, wherever they lie in the
forest, so no keys are gathered along paths; scores stay in float32.

    D, E sizes of heads, H query heads, G key/value heads, n queries, T tokens
"""

from __future__ import annotations

from typing import Any

import torch

from byeori.kernels import cpu_attention, native
from byeori.kernels.cpu_attention import Nodes


def supports(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether `attend` is to be used for these."""
    bf16 = all(states.dtype == torch.bfloat16 for states in (query, key, value))
    return cpu_attention.supports(query) and bf16 and native.tiles() > 0


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, nodes: Nodes, window: int | None, scale: float
) -> torch.Tensor:
    """Return the attention output [n, H, E] of query [n, H, D], key [T, G, D], value [T, G, E].

    A node's path ends at its last query.
    """
    table = torch.tensor([number for start, end, path in nodes for number in (start, end, len(path), *sum(path, ()))])
    output: torch.Tensor = _Tiles.apply(query, key, value, table, len(nodes), window, scale)
    return output


class _Tiles(torch.autograd.Function):
    """As above; nodes: start, end, number of runs, and their starts and ends, one node after the other."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        query, key, value, nodes, count, window, scale = args
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        out = query.new_empty(*query.shape[:2], value.shape[-1])
        sums = query.new_empty(*query.shape[:2], 2, dtype=torch.float32)
        tokens, groups, size = key.shape
        sizes = nodes, count, tokens, query.shape[1], groups, size, value.shape[-1], window or tokens, scale
        native.call("attend", query, key, value, out, sums, *sizes)
        ctx.save_for_backward(query, key, value, sums)
        ctx.sizes = sizes
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, sums = ctx.saved_tensors
        to_inputs = [torch.empty_like(states) for states in (query, key, value)]
        native.call("attend_back", grads[0].contiguous(), query, key, value, sums, *to_inputs, *ctx.sizes)
        return *to_inputs, None, None, None, None
