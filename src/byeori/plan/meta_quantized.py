"""Weights as training in 4 or 8 bit stores them, for a rehearsal: the sizes of their numbers, on the meta device.

    n weights in 4 bit: n / 2 bytes of NF4, n / 64 one-byte scales, n / 16,384 four-byte scales of these, small tables
    in 8 bit:           n bytes, and a four-byte scale for each row

Needs nothing of bitsandbytes, which a machine that only plans may not have.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from byeori.kernels.quantized_linear import QuantizedLinear
from byeori.kernels.quantized_weight import BLOCK, BLOCK_OF_SCALES, QuantizedWeight
from byeori.model import quantize


class MetaQuantizedWeight(QuantizedWeight):
    """Scales on the meta device. weight_count: how many numbers the weight has."""

    def __init__(self, sizes: tuple[int, int, int], bits: int, dtype: torch.dtype) -> None:
        super().__init__(sizes, bits, dtype)
        groups, rows, columns = sizes
        self.weight_count = groups * rows * columns
        if bits == 8:
            self.scales = torch.empty(groups * rows, dtype=torch.float32, device="meta")
            return
        blocks = groups * math.ceil(self.group / BLOCK)
        self.scales = torch.empty(blocks, dtype=torch.uint8, device="meta")
        tables = {"scale_scales": math.ceil(blocks / BLOCK_OF_SCALES), "offset": 1, "code": 16, "scale_code": 256}
        for name, count in tables.items():
            setattr(self, name, torch.empty(count, dtype=torch.float32, device="meta"))

    def open(self, codes: torch.Tensor, first: int = 0, last: int | None = None) -> torch.Tensor:
        """The weight in the compute type; scales of 4 bit, and weights of 8 bit, are in float32 before."""
        groups, rows, columns = self.sizes
        groups = (groups if last is None else last) - first
        if self.bits == 8:  # bitsandbytes: codes * scales * (1 / 127)
            scales = self.scales[: groups * rows].view(groups, rows, 1)
            return (codes.view(self.sizes)[:groups] * scales * 1.0).to(self.compute_dtype)
        scales = torch.empty_like(self.scales, dtype=torch.float32)
        weight = torch.empty(groups, rows, columns, dtype=self.compute_dtype, device=scales.device)
        del scales
        return weight


class MetaQuantizedLinear(QuantizedLinear, MetaQuantizedWeight):
    """A frozen linear layer with its weight in 4 or 8 bit."""


def quantize_layers(causal: Any, bits: int = 4, kind: type[QuantizedLinear] = MetaQuantizedLinear) -> None:
    """Put empty codes in place of the weights that a run quantizes."""
    quantize.replace_layers(causal, bits, kind, MetaQuantizedWeight)
