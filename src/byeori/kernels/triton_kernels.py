"""The kernels between matrix products on a GPU, in Triton; each is one pass over memory.

Names, arguments and results are those of csrc/kernels.c, which explains them. Tensors hold 16 bit floats or float32;
arithmetic is float32 throughout. No sum depends on the order in which blocks run: the same bits on every run.
"""

# mypy: disallow-untyped-defs=False
# (Triton reads a kernel's annotations, so it has no Python types)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

# Numbers of one tensor in a program, unless a row has more, and in a thread: a load of 16 bytes has 8 in 16 bit.
TILE = 4096
_PER_THREAD = 16


@triton.jit
def _tile(rows, columns, wide, R: tl.constexpr, BLOCK: tl.constexpr):
    """R rows and BLOCK of the first `columns` of [rows, wide]: row and column numbers, offsets, and the mask."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, BLOCK)
    there = (row < rows)[:, None] & (column < columns)[None, :]
    return row, column, row[:, None] * wide + column[None, :], there


@triton.jit
def _norm(x, scale, eps, y, inverse, rows, wide, R: tl.constexpr, BLOCK: tl.constexpr):
    row, column, at, there = _tile(rows, wide, wide, R, BLOCK)
    v = tl.load(x + at, there, other=0.0).to(tl.float32)
    s = tl.load(scale + column, column < wide, other=0.0)
    r = 1.0 / tl.sqrt(tl.sum(v * v, 1) / wide + eps)
    tl.store(y + at, v * r[:, None] * s[None, :], there)
    tl.store(inverse + row, r, row < rows)


@triton.jit
def _norm_back(grad, x, scale, inverse, out, rows, wide, R: tl.constexpr, BLOCK: tl.constexpr):
    row, column, at, there = _tile(rows, wide, wide, R, BLOCK)
    v = tl.load(x + at, there, other=0.0).to(tl.float32)
    s = tl.load(scale + column, column < wide, other=0.0)
    g = tl.load(grad + at, there, other=0.0).to(tl.float32) * s[None, :]
    r = tl.load(inverse + row, row < rows, other=0.0)
    along = tl.sum(g * v, 1) * r * r / wide
    tl.store(out + at, (g - v * along[:, None]) * r[:, None], there)


@triton.jit
def _gate(x, one, three):
    """x sigmoid(x (one + three x^2)) and its slope."""
    square = x * x
    s = 1.0 / (1.0 + tl.exp(-x * (one + three * square)))
    return x * s, s + x * s * (1.0 - s) * (one + 3.0 * three * square)


@triton.jit
def _glu(gate, up, y, one, three, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, at < count, other=0.0).to(tl.float32)
    u = tl.load(up + at, at < count, other=0.0).to(tl.float32)
    act, _ = _gate(g, one, three)
    tl.store(y + at, act * u, at < count)


@triton.jit
def _glu_back(gate, up, y, to_gate, to_up, one, three, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, at < count, other=0.0).to(tl.float32)
    u = tl.load(up + at, at < count, other=0.0).to(tl.float32)
    grad = tl.load(y + at, at < count, other=0.0).to(tl.float32)
    act, slope = _gate(g, one, three)
    tl.store(y + at, act * u, at < count)
    tl.store(to_gate + at, grad * u * slope, at < count)
    tl.store(to_up + at, grad * act, at < count)


@triton.jit
def _mix(v):
    """A permutation of 32-bit numbers (dropout.py)."""
    v = v ^ (v >> 16)
    v = v * tl.full([1], 0x7FEB352D, tl.uint32)
    v = v ^ (v >> 15)
    v = v * tl.full([1], 0x846CA68B, tl.uint32)
    return v ^ (v >> 16)


@triton.jit(do_not_specialize=["seed", "least"])
def _dropout(x, y, scale, seed, least, rows, wide, half, R: tl.constexpr, BLOCK: tl.constexpr):
    row, column, at, there = _tile(rows, half, wide, R, BLOCK)
    drawn = _mix((row[:, None] * half + column[None, :] + seed).to(tl.uint32))
    also = there & (column + half < wide)[None, :]
    one = tl.load(x + at, there, other=0.0).to(tl.float32) * scale
    two = tl.load(x + at + half, also, other=0.0).to(tl.float32) * scale
    tl.store(y + at, tl.where((drawn & 0xFFFF).to(tl.int32) >= least, one, 0.0), there)
    tl.store(y + at + half, tl.where((drawn >> 16).to(tl.int32) >= least, two, 0.0), also)


@triton.jit
def _halves(start, row, column, wide, there):
    """Both halves of rows of `wide` numbers, in float32."""
    at = row[:, None] * wide + column[None, :]
    return (
        tl.load(start + at, there, other=0.0).to(tl.float32),
        tl.load(start + at + wide // 2, there, other=0.0).to(tl.float32),
    )


@triton.jit
def _rope(
    x, cosine, sine, scale, eps, y, inverse, rows, heads, wide, NORM: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr
):
    half = wide // 2
    row, column, at, there = _tile(rows, half, wide, R, BLOCK)
    one, two = _halves(x, row, column, wide, there)
    if NORM:
        r = 1.0 / tl.sqrt(tl.sum(one * one + two * two, 1) / wide + eps)
        tl.store(inverse + row, r, row < rows)
        one = one * r[:, None] * tl.load(scale + column, column < half, other=0.0)[None, :]
        two = two * r[:, None] * tl.load(scale + half + column, column < half, other=0.0)[None, :]
    cos_one, cos_two = _halves(cosine, row // heads, column, wide, there)
    sin_one, sin_two = _halves(sine, row // heads, column, wide, there)
    tl.store(y + at, one * cos_one - two * sin_one, there)
    tl.store(y + at + half, two * cos_two + one * sin_two, there)


@triton.jit
def _rope_back(
    grad, x, cosine, sine, scale, inverse, out, rows, heads, wide,
    NORM: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    half = wide // 2
    row, column, at, there = _tile(rows, half, wide, R, BLOCK)
    a, b = _halves(grad, row, column, wide, there)
    cos_one, cos_two = _halves(cosine, row // heads, column, wide, there)
    sin_one, sin_two = _halves(sine, row // heads, column, wide, there)
    one, two = a * cos_one + b * sin_two, b * cos_two - a * sin_one
    if NORM:
        one = one * tl.load(scale + column, column < half, other=0.0)[None, :]
        two = two * tl.load(scale + half + column, column < half, other=0.0)[None, :]
        x_one, x_two = _halves(x, row, column, wide, there)
        r = tl.load(inverse + row, row < rows, other=0.0)
        along = (tl.sum(one * x_one + two * x_two, 1) * r * r / wide)[:, None]
        one, two = (one - x_one * along) * r[:, None], (two - x_two * along) * r[:, None]
    tl.store(out + at, one, there)
    tl.store(out + at + half, two, there)


@triton.jit
def _online_softmax(logits, ids, own, top, total, fade, scale, count: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row reads its words twice: for the largest logit, then for the weights and their sum."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * count
    column = tl.arange(0, BLOCK)
    mine = tl.load(ids + row)
    here = (mine >= 0) & (mine < count)
    found = tl.load(start + tl.where(here, mine, 0)).to(tl.float32) * scale
    tl.store(own + row, tl.where(here, found, tl.load(own + row)))
    before = tl.load(top + row)
    most = tl.full([BLOCK], -float("inf"), tl.float32)
    for block in range(0, count, BLOCK):
        v = tl.load(start + block + column, block + column < count, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.where(block + column < count, v * scale, -float("inf")))
    highest = tl.maximum(tl.max(most, 0), before)
    summed = tl.zeros([BLOCK], tl.float32)
    for block in range(0, count, BLOCK):
        v = tl.load(start + block + column, block + column < count, other=0.0).to(tl.float32)
        weight = tl.where(block + column < count, tl.exp(v * scale - highest), 0.0)
        summed += weight
        tl.store(start + block + column, weight, block + column < count)
    less = tl.where(before == -float("inf"), 0.0, tl.exp(before - highest))
    tl.store(fade + row, less)
    tl.store(total + row, tl.load(total + row) * less + tl.sum(summed, 0))
    tl.store(top + row, highest)


def call(name: str, *arguments: Any) -> None:
    """Run a kernel with the arguments of csrc/kernels.c, on the current stream."""
    _LAUNCH[name](*arguments)


def _rows(
    kernel: Any, arguments: tuple[Any, ...], rows: int, wide: int, per_thread: int = _PER_THREAD, **options: Any
) -> None:
    """Launch one program for as many rows as make a tile."""
    block = triton.next_power_of_2(wide)
    rows_per_program = max(1, TILE // block)
    kernel[(triton.cdiv(rows, rows_per_program),)](
        *arguments, R=rows_per_program, BLOCK=block, num_warps=_warps(rows_per_program * block // per_thread), **options
    )


def _warps(threads: int) -> int:
    return min(32, max(1, threads // 32))


def _flat(kernel: Any, *arguments: Any) -> None:
    """Launch over all numbers as one row; the last two arguments are rows and columns."""
    *rest, rows, wide = arguments
    count = rows * wide
    kernel[(triton.cdiv(count, TILE),)](*rest, count, BLOCK=TILE, num_warps=_warps(TILE // _PER_THREAD))


def _by_head(kernel: Any, scale: torch.Tensor | None, *arguments: Any) -> None:
    """Launch over heads, in pairs of halves; the last three arguments are tokens, heads and head size."""
    *rest, tokens, heads, wide = arguments
    given = (*rest, tokens * heads, heads, wide)
    _rows(kernel, given, tokens * heads, wide // 2, _PER_THREAD // 2, NORM=scale is not None)


def _by_word(*arguments: Any) -> None:
    *rest, rows, words = arguments
    block = min(2 * TILE, triton.next_power_of_2(words))
    _online_softmax[(rows,)](*rest, words, BLOCK=block, num_warps=_warps(block // _PER_THREAD))


_LAUNCH = {
    "norm": lambda *of: _rows(_norm, of, *of[-2:]),
    "norm_back": lambda *of: _rows(_norm_back, of, *of[-2:]),
    "glu": lambda *of: _flat(_glu, *of),
    "glu_back": lambda *of: _flat(_glu_back, *of),
    "dropout": lambda *of: _rows(_dropout, (*of, half := (of[-1] + 1) // 2), of[-2], half, _PER_THREAD // 2),
    "rope": lambda *of: _by_head(_rope, of[3], *of),
    "rope_back": lambda *of: _by_head(_rope_back, of[4], *of),
    "online_softmax": _by_word,
}
