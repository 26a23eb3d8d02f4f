"""Forest attention on a GPU, by PyTorch's flash kernel for sequences of different lengths.

Which sequences the kernel is given says cuda_calls.py. The partial results of a cascade are merged by

    l = log(e^l1 + e^l2),   o = o1 e^(l1 - l) + o2 e^(l2 - l)          o outputs, l log-sum-exp of the scores

and the backward of each call is given the merged o and l, which makes its part of the gradient exact: with
P = e^(S - l) and d = sum(dO * O), dS = P * (dO V^T - d) holds for any subset of the keys.

    T tokens, H query heads, G key/value heads, D head size
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from byeori.kernels import device_kind
from byeori.kernels.cuda_calls import Call, Rows

# The same bits on every run. The kernel's faster backward adds up queries' gradients in the order of arrival.
REPEATABLE = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """forward(q, k, v, call, scale) -> (out [n, H, D], log-sum-exp of the scores [H, n]), n queries.

    backward(grad, q, k, v, out, lse, call, scale) -> gradients of q, k and v.
    """

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the kernel computes these: 16 bit, heads of one size (a multiple of 8 up to 256), a GPU since Ampere."""
    size = query.shape[-1]
    return (
        device_kind.kind(query) == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.dtype == key.dtype == value.dtype
        and value.shape[-1] == size
        and size % 8 == 0
        and size <= 256
        and _modern(query.device)
    )


@functools.cache
def _modern(device: torch.device) -> bool:
    return device.type == "meta" or torch.cuda.get_device_capability(device) >= (8, 0)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    calls: list[Call],
    *,
    scale: float,
    kernel: Kernel | None = None,
) -> torch.Tensor:
    """query [T, H, D], key and value [T, G, D] -> [T, H, D]; `calls` are `cuda_calls.plan(...)`.

    Queries may be those of some tokens alone."""
    out: torch.Tensor = _Attention.apply(query, key, value, calls, scale, kernel or FLASH)
    return out


class _Attention(torch.autograd.Function):
    """All calls in one function: saved are the inputs, the output and one number for each query and head."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        query, key, value, calls, scale, kernel = args
        first, *rest = calls  # the first call's queries are all there are, in order
        out, lse = kernel.forward(query, _take(key, first.keys), _take(value, first.keys), first, scale)
        for call in rest:
            rows = _take(query, call.queries), _take(key, call.keys), _take(value, call.keys)
            part, more = kernel.forward(*rows, call, scale)
            _merge(out, lse, part, more, call.queries)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.rest = calls, scale, kernel
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        calls, scale, kernel = ctx.rest
        first, *rest = calls
        keys, values = _take(key, first.keys), _take(value, first.keys)
        found = kernel.backward(grads[0], query, keys, values, out, lse, first, scale)
        totals = [found[0], _spread(found[1], first, key), _spread(found[2], first, value)]
        for call in rest:
            rows = [_take(states, call.queries) for states in (grads[0], query, out)]
            keys, values = _take(key, call.keys), _take(value, call.keys)
            sums = _take(lse.t(), call.queries).t().contiguous()
            found = kernel.backward(rows[0], rows[1], keys, values, rows[2], sums, call, scale)
            for total, part, where in zip(totals, found, (call.queries, call.keys, call.keys), strict=True):
                _add(total, part, where)
        return totals[0], totals[1], totals[2], None, None, None


def _take(states: torch.Tensor, rows: Rows) -> torch.Tensor:
    return states[rows] if isinstance(rows, slice) else states.index_select(0, rows)


def _add(total: torch.Tensor, part: torch.Tensor, rows: Rows) -> None:
    """Add rows of which none is named twice."""
    if isinstance(rows, slice):
        total[rows] += part
    else:
        total.index_add_(0, rows, part)


def _spread(part: torch.Tensor, call: Call, like: torch.Tensor) -> torch.Tensor:
    """The gradient of all keys from that of the gathered ones; copies of a key are added up in float32."""
    if call.once and len(part) == len(like):
        return part
    if call.once:
        total = torch.zeros_like(like)
        _add(total, part, call.keys)
        return total
    wide = torch.promote_types(part.dtype, torch.float32)
    total = like.new_zeros(like.shape, dtype=wide)
    with _repeatable():
        return total.index_add_(0, call.keys, part.to(wide)).to(like.dtype)


def _merge(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, more: torch.Tensor, rows: Rows) -> None:
    """Bring another set of keys into `out` [T, H, D] and `lse` [H, T]: part [n, H, D], more [H, n]."""
    before = _take(lse.t(), rows)  # [n, H]
    after = torch.logaddexp(before, more.t())
    old, new = (before - after).exp().unsqueeze(-1), (more.t() - after).exp().unsqueeze(-1)
    merged = (_take(out, rows) * old + part * new).to(out.dtype)
    if isinstance(rows, slice):
        out[rows], lse.t()[rows] = merged, after
    else:
        out.index_copy_(0, rows.long(), merged)
        lse.t().index_copy_(0, rows.long(), after)


@contextmanager
def _repeatable() -> Iterator[None]:
    """PyTorch's deterministic algorithms inside, where REPEATABLE; the kernel has no switch of its own.

    torch.use_deterministic_algorithms would change how layers are compiled as well.
    """
    if not REPEATABLE:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


def _left(window: int | None) -> int:
    return -1 if window is None else window - 1  # the kernel counts the tokens before the query


def _flash_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    call: Call,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        call.cu_q,
        call.cu_k,
        call.max_q,
        call.max_k,
        0.0,
        call.causal and call.window is None,
        False,
        scale=scale,
        window_size_left=_left(call.window),
        window_size_right=0 if call.causal else -1,
    )
    return out, lse


def backward_scratch(query: torch.Tensor, key: torch.Tensor, sequences: int) -> list[torch.Tensor]:
    """What the kernel's backward pass holds for itself, as PyTorch allocates it (flash_api.cpp, mha_varlen_bwd).

    For the same bits every time, groups of processors add up queries' gradients in float32 each for themselves.
    """
    heads, size = query.shape[1:]
    wide = 32 if size <= 128 else 64
    rows, splits = len(query) + 128 * sequences, -(-_processors() // (sequences * heads)) if REPEATABLE else 1
    room = [query.new_empty(heads, rows, dtype=torch.float32)]
    room.append(query.new_empty(splits, rows, heads, -(-size // wide) * wide, dtype=torch.float32))
    if key.shape[1] != heads:
        room += [key.new_empty(len(key), heads, size) for _ in range(2)]
    return room


@functools.cache
def _processors() -> int:
    """Of the GPU; where a plan is made without one, those of an H100."""
    return torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 132


def _flash_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    call: Call,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    unused = torch.empty(0, device=query.device)  # the random state of dropout, which there is none of
    scratch = backward_scratch(query, key, len(call.cu_q) - 1) if query.is_meta else []
    with _repeatable():
        found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.ops.aten._flash_attention_backward(
            grad,
            query,
            key,
            value,
            out,
            lse,
            call.cu_q,
            call.cu_k,
            call.max_q,
            call.max_k,
            0.0,
            call.causal and call.window is None,
            unused,
            unused,
            scale=scale,
            window_size_left=_left(call.window),
            window_size_right=0 if call.causal else -1,
        )
    del scratch
    return found


FLASH = Kernel(forward=_flash_forward, backward=_flash_backward)
