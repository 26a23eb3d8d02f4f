"""Forest attention on the CPU: blocks of queries, as matrix products that keep the matrix units busy.

PyTorch's flash kernel for CPUs computes scores outside of a window too, and its backward pass uses no matrix units.
Here a block of queries is multiplied only with the keys between its first query's window and its last query; the
query heads that share a key head are rows of one matrix. The backward pass recomputes the weights from saved row
statistics (Dao et al., arXiv:2205.14135):

    p = exp(scale (q k^T - max)) / sum     dv = p^T do     dp = do v^T     ds = scale p (dp - sum(p dp))
    dq = ds k                          dk = ds^T q

    D head size, H query heads, G key/value heads, R = H / G, T unique tokens, n a block's queries, m its keys
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from byeori.kernels import device_kind, native, switches
from byeori.kernels.dispatch import wide

# A block ends, at the latest, where a path's length is a multiple of _QUERIES. Its rows and keys are rounded up to
# multiples of _ROWS and _KEYS with neighbours whose weights are 0: a product of a new shape costs 0.25 ms and a third
# of a megabyte, and odd shapes take longer than the next even ones.
_QUERIES, _ROWS, _KEYS = 128, 32, 64

Runs = tuple[tuple[int, int], ...]
Nodes = tuple[tuple[int, int, Runs], ...]


def supports(query: torch.Tensor) -> bool:
    """Return whether `attend` is to be used for these queries."""
    return switches.current().attention and device_kind.kind(query) == "cpu"


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, nodes: Nodes, window: int | None, scale: float
) -> torch.Tensor:
    """Return the attention output [1, T, H, D] of query [1, H, T, D], key and value [1, G, T, D]."""
    _, heads, tokens, size = query.shape
    groups = key.shape[1]
    rows = query.view(groups, heads // groups, tokens, size).transpose(1, 2)
    out = _Blocks.apply(rows, key.squeeze(0), value.squeeze(0), nodes, window, scale)
    return out.transpose(0, 1).reshape(1, tokens, heads, value.shape[-1])


class _Blocks(torch.autograd.Function):
    """query [G, T, R, D], key and value [G, T, D] -> [G, T, R, D]."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        query, key, value, nodes, window, scale = args
        key = key - key.mean(dim=1, keepdim=True)  # the same weights from smaller scores, which round less
        query, value = query.contiguous(), value.contiguous()
        out, sums = query.new_empty(*query.shape[:3], value.shape[-1]), []
        for start, end, path in nodes:
            keys, values = gather(key, path, _KEYS), gather(value, path, _KEYS)
            for block in _blocks(start, end, path, (query.shape[1], keys.shape[1]), window):
                scores = _by_keys(query[:, block.rows].flatten(1, 2), keys[:, block.keys])
                sums.append(_softmax(scores, block, scale, window))
                torch.bmm(scores, values[:, block.keys], out=out[:, block.rows].flatten(1, 2))
        ctx.save_for_backward(query, key, value, *sums)
        ctx.nodes, ctx.window, ctx.scale = nodes, window, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *sums = ctx.saved_tensors
        out = grads[0].contiguous()
        dtype = wide(key)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros_like(states, dtype=dtype) for states in (key, value))
        saved = iter(sums)
        for start, end, path in ctx.nodes:
            keys, values = gather(key, path, _KEYS), gather(value, path, _KEYS)
            alone = len(path) == 1  # then the path's gradients are views of the forest's
            path_keys = gather(grad_key, path, _KEYS) if alone else torch.zeros_like(keys, dtype=dtype)
            path_values = gather(grad_value, path, _KEYS) if alone else torch.zeros_like(values, dtype=dtype)
            for block in _blocks(start, end, path, (query.shape[1], keys.shape[1]), ctx.window):
                q, g = query[:, block.rows].flatten(1, 2), out[:, block.rows].flatten(1, 2)
                weights, grad = _by_keys(q, keys[:, block.keys]), _by_keys(g, values[:, block.keys])
                _softmax_back(weights, grad, next(saved), block, ctx.scale, ctx.window)
                path_values[:, block.keys] += torch.bmm(weights.mT, g)
                path_keys[:, block.keys] += torch.bmm(grad.mT, q)
                torch.bmm(grad, keys[:, block.keys], out=grad_query[:, block.rows].flatten(1, 2))
            if not alone:
                _scatter(grad_key, path_keys, path)
                _scatter(grad_value, path_values, path)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None


@dataclass(frozen=True, slots=True)
class _Block:
    """rows: of the forest; the first `count` are the block's own queries, the others get zeros until the blocks that
    follow write theirs. keys: of the path. first: the first query's column among these."""

    rows: slice
    keys: slice
    first: int
    count: int


def _blocks(start: int, end: int, path: Runs, sizes: tuple[int, int], window: int | None) -> Iterator[_Block]:
    """The blocks of a node. sizes: the number of rows of the forest, and of keys of the gathered path."""
    length = sum(stop - begin for begin, stop in path)
    shift = length - end  # from a query's row of the forest to its position on the path
    at = start
    while at < end:
        stop = min(end, (at + shift) // _QUERIES * _QUERIES + _QUERIES - shift)
        low = 0 if window is None else max(0, at + shift - window + 1) // _KEYS * _KEYS
        rows = slice(at, min(sizes[0], at + _round_up(stop - at, _ROWS)))
        yield _Block(rows, slice(low, min(sizes[1], _round_up(stop + shift, _KEYS))), at + shift - low, stop - at)
        at = stop


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _by_keys(rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """rows [G, n R, D], keys [G, m, D] -> [G, n R, m]. For several groups PyTorch transposes the keys by a copy."""
    return torch.mm(rows[0], keys[0].mT)[None] if len(rows) == 1 else torch.bmm(rows, keys.mT)


def gather(states: torch.Tensor, path: Runs, more: int = 0) -> torch.Tensor:
    """Return the states [.., T, D] along a path, and of up to `more` tokens after it."""
    runs = (*path[:-1], (path[-1][0], path[-1][1] + more))
    if len(runs) == 1:
        return states[..., runs[0][0] : runs[0][1], :]
    return torch.cat([states[..., start:end, :] for start, end in runs], dim=-2)


def _scatter(total: torch.Tensor, part: torch.Tensor, path: Runs) -> None:
    """Add the gradient of a path's keys to that of the forest's."""
    position = 0
    for start, end in path:
        total[:, start:end] += part[:, position : position + end - start]
        position += end - start


def _softmax(scores: torch.Tensor, block: _Block, scale: float, window: int | None) -> torch.Tensor:
    """Overwrite scores [G, n R, m] with softmax(scale * scores); return the row statistics [G, n R, 2]: the largest
    score, and one over the denominator relative to it.

    R neighbouring rows are the heads of a query. It sees `window` columns up to its own.
    """
    if native.supports(scores):
        sums = scores.new_empty(*scores.shape[:2], 2, dtype=torch.float32)
        native.call("softmax", scores, sums, scale, *_sizes(scores, block, window))
        return sums
    seen = scores.to(wide(scores)).masked_fill_(_unseen(scores, block, window), -torch.inf)
    most = seen.amax(dim=-1, keepdim=True)
    part = seen.sub_(most).mul_(scale).exp_().sum(dim=-1, keepdim=True).reciprocal_()
    scores.copy_(seen.mul_(part))
    scores[:, _own(scores, block) :] = 0
    return torch.cat([most, part], dim=-1)


def _softmax_back(
    scores: torch.Tensor, grad: torch.Tensor, sums: torch.Tensor, block: _Block, scale: float, window: int | None
) -> None:
    """Overwrite the scores with the weights, and the gradient of the weights with that of the scores."""
    if native.supports(scores, grad):
        native.call("softmax_back", scores, grad, sums, scale, *_sizes(scores, block, window))
        return
    seen = scores.to(wide(scores)).masked_fill_(_unseen(scores, block, window), -torch.inf)
    most, part = sums.split(1, dim=-1)
    weights, slope = seen.sub_(most).mul_(scale).exp_().mul_(part), grad.to(wide(grad))
    mean = (weights * slope).sum(dim=-1, keepdim=True)
    grad.copy_((slope - mean).mul_(weights).mul_(scale))
    scores.copy_(weights)
    for states in (scores, grad):
        states[:, _own(scores, block) :] = 0


def _sizes(scores: torch.Tensor, block: _Block, window: int | None) -> tuple[int, ...]:
    """The kernels' sizes: rows, columns, rows of a group, those of them that count, heads, first column, window."""
    groups, rows, columns = scores.shape
    own = _own(scores, block)
    return groups * rows, columns, rows, own, own // block.count, block.first, columns if window is None else window


def _own(scores: torch.Tensor, block: _Block) -> int:
    """The number of rows of a group that count: the heads of the block's own queries."""
    return scores.shape[1] // (block.rows.stop - block.rows.start) * block.count


def _unseen(scores: torch.Tensor, block: _Block, window: int | None) -> torch.Tensor:
    rows, columns = scores.shape[1:]
    queries = block.rows.stop - block.rows.start
    own = torch.arange(queries, device=scores.device).repeat_interleave(rows // queries)[:, None] + block.first
    column = torch.arange(columns, device=scores.device)[None, :]
    own = own.clamp(max=columns - 1)  # rows that do not count see something, so that they are not NaN
    return (column > own) if window is None else (column > own) | (column <= own - window)
