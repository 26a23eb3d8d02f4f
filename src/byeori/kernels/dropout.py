"""Dropout on an adapter's input, whose mask is made again wherever it is needed: what is kept of it is one number.

A row of d numbers has h = ceil(d / 2) draws of 32 bits, mix(row h + column + seed): the lower 16 bits are for a number
of the row's first half, the upper for that h columns on. It stays where they are at least rate 2^16. mix permutes the
numbers of 32 bits (C. Wellons, "Prospecting for hash functions", lowbias32):

    v ^= v >> 16;  v *= 0x7feb352d;  v ^= v >> 15;  v *= 0x846ca68b;  v ^= v >> 16

C, Triton and PyTorch leave out the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from byeori.kernels import dispatch

_BITS = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Drop:
    """rate: the share that becomes 0, to 2^-16; what stays is divided by 1 less that. seed: below 2^31."""

    rate: float
    seed: int

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, d] with zeros; the same places of all inputs of this shape."""
        rows, wide = x.shape
        least = min(round(self.rate * 2**16), 2**16 - 1)
        scale = 2**16 / (2**16 - least)
        if dispatch.runs(x):
            out = torch.empty_like(x)
            dispatch.call("drop", x, out, scale, self.seed, least, rows, wide)
            return out
        half = (wide + 1) // 2
        drawn = _mixed((torch.arange(rows * half, device=x.device) + self.seed) & _BITS).view(rows, half)
        stays = torch.cat([drawn & 0xFFFF, drawn >> 16], dim=1)[:, :wide] >= least
        return x * stays.to(x.dtype).mul_(scale)


@dataclass(frozen=True, slots=True, eq=False)
class Mask:
    """A mask that is kept, of zeros and 1 / (1 - rate)."""

    keep: torch.Tensor

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, d] with zeros."""
        return x * self.keep.view_as(x)


def drawn(rate: float) -> Drop | None:
    """A new one; None where nothing is dropped.

    The number comes from PyTorch's generator for the CPU, which checkpointing sets back before layers run again.
    """
    return Drop(rate, int(torch.randint(2**31, (), device="cpu"))) if rate else None


def mask(rate: float, x: torch.Tensor) -> Mask | None:
    """The same for layers that torch.compile traces, in which a new number would be a new graph; for x's shape."""
    return Mask(torch.empty_like(x).bernoulli_(1 - rate).div_(1 - rate)) if rate else None


def _mixed(v: torch.Tensor) -> torch.Tensor:
    """Of numbers of 32 bits in int64, in place."""
    v.bitwise_xor_(v >> 16).mul_(0x7FEB352D).bitwise_and_(_BITS)
    v.bitwise_xor_(v >> 15).mul_(0x846CA68B).bitwise_and_(_BITS)
    return v.bitwise_xor_(v >> 16)
