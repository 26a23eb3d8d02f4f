"""Dropout on an adapter's input whose mask is recomputed wherever it is needed; only its seed is saved.

A row of d numbers has h = ceil(d / 2) draws of 32 bits, mix(row h + column + seed): the lower 16 bits are for a number
of the row's first half, the upper for the one h columns further on. It stays if they are at least rate 2^16. mix is a
permutation of 32-bit numbers (C. Wellons, "Prospecting for hash functions", lowbias32):

    v ^= v >> 16;  v *= 0x7feb352d;  v ^= v >> 15;  v *= 0x846ca68b;  v ^= v >> 16

C, Triton and PyTorch drop the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from byeori.kernels import dispatch

_BITS = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class SeededDropout:
    """rate: the share that becomes 0, to 2^-16; the rest is divided by 1 - rate. seed: below 2^31."""

    rate: float
    seed: int

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [T, d] with zeros, in the same places for all inputs of this shape."""
        rows, columns = x.shape
        least = min(round(self.rate * 2**16), 2**16 - 1)
        scale = 2**16 / (2**16 - least)
        if dispatch.supports(x, kernel="dropout"):
            out = torch.empty_like(x)
            dispatch.call("dropout", x, out, scale, self.seed, least, rows, columns)
            return out
        half = (columns + 1) // 2
        draws = _mix((torch.arange(rows * half, device=x.device) + self.seed) & _BITS).view(rows, half)
        stays = torch.cat([draws & 0xFFFF, draws >> 16], dim=1)[:, :columns] >= least
        return x * stays.to(x.dtype).mul_(scale)


@dataclass(frozen=True, slots=True, eq=False)
class DropoutMask:
    """A mask that is saved, of zeros and 1 / (1 - rate)."""

    keep: torch.Tensor

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [T, d] with zeros."""
        return x * self.keep.view_as(x)


def draw(rate: float) -> SeededDropout | None:
    """Return dropout with a new seed, or None at rate 0.

    The seed comes from PyTorch's CPU generator, which checkpointing resets before layers run again.
    """
    return SeededDropout(rate, int(torch.randint(2**31, (), device="cpu"))) if rate else None


def draw_mask(rate: float, x: torch.Tensor) -> DropoutMask | None:
    """The same for layers that torch.compile traces, where every seed would be a new graph; for x's shape."""
    return DropoutMask(torch.empty_like(x).bernoulli_(1 - rate).div_(1 - rate)) if rate else None


def _mix(v: torch.Tensor) -> torch.Tensor:
    """Permute 32-bit numbers, stored as int64, in place."""
    v.bitwise_xor_(v >> 16).mul_(0x7FEB352D).bitwise_and_(_BITS)
    v.bitwise_xor_(v >> 15).mul_(0x846CA68B).bitwise_and_(_BITS)
    return v.bitwise_xor_(v >> 16)
