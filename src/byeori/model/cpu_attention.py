"""Forest attention on the CPU: blocks of queries, written out as matrix products that keep the matrix units busy.

PyTorch's flash kernel for CPUs computes all of a window's mask, and its backward pass knows no matrix units. Here a
block of queries meets only the keys between its first query's window and its last query; the query heads that share a
key head are rows of one matrix. The weights are made again in the backward pass from the saved logarithms of their
denominators (Dao et al., arXiv:2205.14135):

    p = exp(scale q k^T - log-sum)     dv = p^T do     dp = do v^T     ds = scale p (dp - sum(p dp))
    dq = ds k                          dk = ds^T q

    D head size, H query heads, G key/value heads, R = H / G, T unique tokens, n a block's queries, m its keys
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from byeori.model import native, target

# Queries of a block. Where blocks end, and the first key rounded down, are multiples of these along a path, so that
# few shapes occur: a matrix product of a new shape costs a millisecond once.
_QUERIES, _FIRST_KEY = 128, 64

Runs = tuple[tuple[int, int], ...]
Nodes = tuple[tuple[int, int, Runs], ...]


_on = True


def switch(on: bool) -> None:
    """Let the CPU's attention go through here, or through PyTorch's scaled_dot_product_attention."""
    global _on
    _on = on


def takes(query: torch.Tensor) -> bool:
    """Whether `attend` is to be used for these queries."""
    return _on and target.kind(query) == "cpu"


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, nodes: Nodes, window: int | None, scale: float
) -> torch.Tensor:
    """query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D]."""
    _, heads, tokens, size = query.shape
    groups = key.shape[1]
    rows = query[0].view(groups, heads // groups, tokens, size).transpose(1, 2)
    out = _Blocks.apply(rows, key[0], value[0], nodes, window, scale)
    return out.transpose(0, 1).reshape(1, tokens, heads, value.shape[-1])


class _Blocks(torch.autograd.Function):
    """query [G, T, R, D], key and value [G, T, D] -> [G, T, R, D]."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        query, key, value, nodes, window, scale = args
        key = key - key.mean(dim=1, keepdim=True)  # no weight changes, but scores are smaller, and so is their rounding
        query, value = query.contiguous(), value.contiguous()
        out, sums = query.new_empty(*query.shape[:3], value.shape[-1]), []
        for start, end, path in nodes:
            keys, values = gather(key, path), gather(value, path)
            for rows, seen, first in _blocks(start, end, keys.shape[1], window):
                scores = torch.bmm(query[:, rows].flatten(1, 2), keys[:, seen].mT)
                sums.append(_softmax(scores, scale, query.shape[2], first, window))
                torch.bmm(scores, values[:, seen], out=out[:, rows].flatten(1, 2))
        ctx.save_for_backward(query, key, value, *sums)
        ctx.nodes, ctx.window, ctx.scale = nodes, window, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *sums = ctx.saved_tensors
        out = grads[0].contiguous()
        wide = torch.promote_types(key.dtype, torch.float32)
        to_query = torch.empty_like(query)
        to_key, to_value = (torch.zeros_like(states, dtype=wide) for states in (key, value))
        left = iter(sums)
        for start, end, path in ctx.nodes:
            keys, values = gather(key, path), gather(value, path)
            alone = len(path) == 1  # then the sums over the path are parts of those over the forest
            in_keys = gather(to_key, path) if alone else torch.zeros_like(keys, dtype=wide)
            in_values = gather(to_value, path) if alone else torch.zeros_like(values, dtype=wide)
            for rows, seen, first in _blocks(start, end, keys.shape[1], ctx.window):
                q, g = query[:, rows].flatten(1, 2), out[:, rows].flatten(1, 2)
                weights, grad = torch.bmm(q, keys[:, seen].mT), torch.bmm(g, values[:, seen].mT)
                _softmax_back(weights, grad, next(left), ctx.scale, query.shape[2], first, ctx.window)
                in_values[:, seen] += torch.bmm(weights.mT, g)
                in_keys[:, seen] += torch.bmm(grad.mT, q)
                torch.bmm(grad, keys[:, seen], out=to_query[:, rows].flatten(1, 2))
            if not alone:
                _scatter(to_key, in_keys, path)
                _scatter(to_value, in_values, path)
        return to_query, to_key.to(key.dtype), to_value.to(value.dtype), None, None, None


def _blocks(start: int, end: int, keys: int, window: int | None) -> Iterator[tuple[slice, slice, int]]:
    """Queries of the forest, the keys of the path that any of them sees, and the first query's column among these."""
    shift = keys - end  # from a query's place in the forest to its place on the path
    at = start
    while at < end:
        stop = min(end, (at + shift) // _QUERIES * _QUERIES + _QUERIES - shift)
        low = 0 if window is None else max(0, at + shift - window + 1) // _FIRST_KEY * _FIRST_KEY
        yield slice(at, stop), slice(low, stop + shift), at + shift - low
        at = stop


def gather(states: torch.Tensor, path: Runs) -> torch.Tensor:
    """The states [.., T, D] along a path."""
    if len(path) == 1:
        return states[..., path[0][0] : path[0][1], :]
    return torch.cat([states[..., start:end, :] for start, end in path], dim=-2)


def _scatter(total: torch.Tensor, part: torch.Tensor, path: Runs) -> None:
    """Add the gradient of a path's keys to that of the forest's."""
    position = 0
    for start, end in path:
        total[:, start:end] += part[:, position : position + end - start]
        position += end - start


def _softmax(scores: torch.Tensor, scale: float, heads: int, first: int, window: int | None) -> torch.Tensor:
    """Write softmax(scale * scores) over scores [G, n R, m]; returns its sums [G, n R, 2]: the largest score, and the
    logarithm of the denominator relative to it.

    first: the first query's column; the next R rows are its heads, and it sees `window` columns up to its own.
    """
    groups, rows, columns = scores.shape
    if native.runs(scores):
        sums = scores.new_empty(groups, rows, 2, dtype=torch.float32)
        limit = columns if window is None else window
        native.call("softmax", scores, sums, scale, groups * rows, columns, rows // heads, heads, first, limit)
        return sums
    seen = scores.to(_wide(scores)).masked_fill_(_unseen(scores, heads, first, window), -torch.inf)
    most = seen.amax(dim=-1, keepdim=True)
    total = seen.sub_(most).mul_(scale).logsumexp(dim=-1, keepdim=True)
    scores.copy_(seen.sub_(total).exp_())
    return torch.cat([most, total], dim=-1)


def _softmax_back(
    scores: torch.Tensor,
    grad: torch.Tensor,
    sums: torch.Tensor,
    scale: float,
    heads: int,
    first: int,
    window: int | None,
) -> None:
    """Write the weights over the scores, and the gradient of the scores over that of the weights."""
    groups, rows, columns = scores.shape
    if native.runs(scores, grad):
        limit = columns if window is None else window
        native.call(
            "softmax_back", scores, grad, sums, scale, groups * rows, columns, rows // heads, heads, first, limit
        )
        return
    seen = scores.to(_wide(scores)).masked_fill_(_unseen(scores, heads, first, window), -torch.inf)
    most, total = sums.split(1, dim=-1)
    weights, wide = seen.sub_(most).mul_(scale).sub_(total).exp_(), grad.to(_wide(grad))
    mean = (weights * wide).sum(dim=-1, keepdim=True)
    grad.copy_((wide - mean).mul_(weights).mul_(scale))
    scores.copy_(weights)


def _unseen(scores: torch.Tensor, heads: int, first: int, window: int | None) -> torch.Tensor:
    rows, columns = scores.shape[1:]
    own = torch.arange(first, first + rows // heads, device=scores.device).repeat_interleave(heads)[:, None]
    column = torch.arange(columns, device=scores.device)[None, :]
    return (column > own) if window is None else (column > own) | (column <= own - window)


def _wide(states: torch.Tensor) -> torch.dtype:
    return torch.promote_types(states.dtype, torch.float32)
