"""Dropout on an adapter's input, whose mask is made again wherever it is needed: what is kept of it is one number.

Number i of the input stays where mix(mix(i) + seed), of 31 bits, is at least rate 2^31; mix is a permutation of the
numbers of 32 bits (C. Wellons, "Prospecting for hash functions", lowbias32):

    v ^= v >> 16;  v *= 0x7feb352d;  v ^= v >> 15;  v *= 0x846ca68b;  v ^= v >> 16

C, Triton and PyTorch leave out the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from byeori.model import kernels

_BITS = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Drop:
    """rate: the share that becomes 0; what stays is divided by 1 - rate. seed: below 2^31."""

    rate: float
    seed: int

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, d] with zeros; the same places of all inputs of this shape."""
        threshold, scale = round(self.rate * 2**31), 1 / (1 - self.rate)
        if kernels.runs(x):
            out = torch.empty_like(x)
            kernels.call("drop", x, out, scale, self.seed, threshold, *x.shape)
            return out
        index = torch.arange(x.numel(), device=x.device)
        stays = _mixed(_mixed(index).add_(self.seed).bitwise_and_(_BITS)) >> 1 >= threshold
        return x * stays.view_as(x).to(x.dtype).mul_(scale)


@dataclass(frozen=True, slots=True, eq=False)
class Mask:
    """A mask that is kept, of zeros and 1 / (1 - rate)."""

    keep: torch.Tensor

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, d] with zeros."""
        return x * self.keep.view_as(x)


def drawn(rate: float, x: torch.Tensor) -> Drop | Mask | None:
    """A new one for inputs of x's shape; None where nothing is dropped.

    The number comes from PyTorch's generator for the CPU, which checkpointing sets back before layers run again.
    """
    if not rate:
        return None
    if torch.compiler.is_compiling():  # a new number would be a new graph
        return Mask(torch.empty_like(x).bernoulli_(1 - rate).div_(1 - rate))
    return Drop(rate, int(torch.randint(2**31, (), device="cpu")))


def _mixed(v: torch.Tensor) -> torch.Tensor:
    """Of numbers of 32 bits in int64, in place."""
    v.bitwise_xor_(v >> 16).mul_(0x7FEB352D).bitwise_and_(_BITS)
    v.bitwise_xor_(v >> 15).mul_(0x846CA68B).bitwise_and_(_BITS)
    return v.bitwise_xor_(v >> 16)
