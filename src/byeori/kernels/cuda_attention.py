"""Forest attention on a GPU, by PyTorch's flash kernel for sequences of different lengths.

cuda_calls.py decides on the sequences. The partial results of a cascade are merged by

    l = log(e^l1 + e^l2),   o = o1 e^(l1 - l) + o2 e^(l2 - l)          o outputs, l log-sum-exp of the scores

and the backward pass of each call gets the merged o and l, which makes its part of the gradient exact: with
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

from byeori.kernels import device_kind, switches
from byeori.kernels.cuda_calls import Call, Rows
from byeori.kernels.dispatch import wide

# The same bits on every run; the kernel's faster backward pass sums queries' gradients in no fixed order.
DETERMINISTIC = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """forward(q, k, v, call, scale) -> (out [n, H, D], log-sum-exp of the scores [H, n]), n queries.

    backward(grad, q, k, v, out, lse, call, scale) -> gradients of q, k and v.
    """

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def supports(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether the kernel accepts these: 16 bit, one head size (a multiple of 8 up to 256), Ampere or newer."""
    size = query.shape[-1]
    return (
        switches.current().flash
        and device_kind.kind(query) == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.dtype == key.dtype == value.dtype
        and value.shape[-1] == size
        and size % 8 == 0
        and size <= 256
        and ampere(query.device)
    )


def ampere(device: torch.device) -> bool:
    """Return whether a GPU, or the one that a rehearsal stands for, is an Ampere or newer."""
    return device_kind.capability(device) >= 8


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    calls: list[Call],
    *,
    scale: float,
    kernel: Kernel | None = None,
) -> torch.Tensor:
    """Return the attention output [T, H, D] of query [T, H, D], key and value [T, G, D].

    calls: of `cuda_calls.plan`. Queries may be those of some tokens alone.
    """
    out: torch.Tensor = _Attention.apply(query, key, value, calls, scale, kernel or FLASH)
    return out


class _Attention(torch.autograd.Function):
    """All calls in one function, which saves the inputs, the output and one number per query and head."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        query, key, value, calls, scale, kernel = args
        first, *rest = calls  # the first call has all queries, in order
        out, lse = kernel.forward(query, _take(key, first.keys), _take(value, first.keys), first, scale)
        for call in rest:
            rows = _take(query, call.queries), _take(key, call.keys), _take(value, call.keys)
            part, more = kernel.forward(*rows, call, scale)
            _merge(out, lse, part, more, call.queries)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.options = calls, scale, kernel
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        calls, scale, kernel = ctx.options
        first, *rest = calls
        keys, values = _take(key, first.keys), _take(value, first.keys)
        parts = kernel.backward(grads[0], query, keys, values, out, lse, first, scale)
        totals = [parts[0], _spread(parts[1], first, key), _spread(parts[2], first, value)]
        for call in rest:
            rows = [_take(states, call.queries) for states in (grads[0], query, out)]
            keys, values = _take(key, call.keys), _take(value, call.keys)
            sums = _take(lse.t(), call.queries).t().contiguous()
            parts = kernel.backward(rows[0], rows[1], keys, values, rows[2], sums, call, scale)
            for total, part, where in zip(totals, parts, (call.queries, call.keys, call.keys), strict=True):
                _add(total, part, where)
        return totals[0], totals[1], totals[2], None, None, None


def _take(states: torch.Tensor, rows: Rows) -> torch.Tensor:
    return states[rows] if isinstance(rows, slice) else states.index_select(0, rows)


def _add(total: torch.Tensor, part: torch.Tensor, rows: Rows) -> None:
    """Add to rows, none of which occurs twice."""
    if isinstance(rows, slice):
        total[rows] += part
    else:
        total.index_add_(0, rows, part)


def _spread(part: torch.Tensor, call: Call, like: torch.Tensor) -> torch.Tensor:
    """The gradient of all keys from that of the gathered ones; copies of a key are summed in float32."""
    if call.once and len(part) == len(like):
        return part
    if call.once:
        total = torch.zeros_like(like)
        _add(total, part, call.keys)
        return total
    total = like.new_zeros(like.shape, dtype=wide(part))
    with _deterministic():
        return total.index_add_(0, call.keys, part.to(total.dtype)).to(like.dtype)


def _merge(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, more: torch.Tensor, rows: Rows) -> None:
    """Merge the result for another set of keys into out [T, H, D] and lse [H, T]: part [n, H, D], more [H, n]."""
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
def _deterministic() -> Iterator[None]:
    """Use PyTorch's deterministic algorithms inside, if DETERMINISTIC; the kernel has no switch of its own.

    torch.use_deterministic_algorithms would also change how layers are compiled.
    """
    if not DETERMINISTIC:
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


def _sequences(call: Call) -> tuple[Any, ...]:
    return call.cu_q, call.cu_k, call.max_q, call.max_k, 0.0, call.causal and call.window is None


def _window(call: Call) -> dict[str, int]:
    """The kernel counts the tokens before and after a query; -1 is no limit."""
    left = -1 if call.window is None else call.window - 1
    return {"window_size_left": left, "window_size_right": 0 if call.causal else -1}


def _flash_forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *states, call, scale = args
    flash = torch.ops.aten._flash_attention_forward
    out, lse, *_ = flash(*states, *_sequences(call), False, scale=scale, **_window(call))
    return out, lse


def backward_scratch(query: torch.Tensor, key: torch.Tensor, sequences: int) -> list[torch.Tensor]:
    """Return the backward pass's scratch memory as PyTorch allocates it (flash_api.cpp, mha_varlen_bwd).

    To be deterministic, groups of multiprocessors sum queries' gradients in float32 each on their own.
    """
    heads, size = query.shape[1:]
    columns = 32 if size <= 128 else 64
    rows, splits = len(query) + 128 * sequences, -(-_multiprocessors() // (sequences * heads)) if DETERMINISTIC else 1
    room = [query.new_empty(heads, rows, dtype=torch.float32)]
    room.append(query.new_empty(splits, rows, heads, -(-size // columns) * columns, dtype=torch.float32))
    if key.shape[1] != heads:
        room += [key.new_empty(len(key), heads, size) for _ in range(2)]
    return room


@functools.cache
def _multiprocessors() -> int:
    """Those of the GPU; of an H100 if a plan is made without one."""
    return torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 132


def _flash_backward(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *states, call, scale = args
    query, key = states[1:3]
    unused = torch.empty(0, device=query.device)  # the random state of dropout, which is off
    scratch = backward_scratch(query, key, len(call.cu_q) - 1) if query.is_meta else []
    flash = torch.ops.aten._flash_attention_backward
    with _deterministic():
        to_query, to_key, to_value = flash(*states, *_sequences(call), unused, unused, scale=scale, **_window(call))
    del scratch
    return to_query, to_key, to_value


FLASH = Kernel(forward=_flash_forward, backward=_flash_backward)
