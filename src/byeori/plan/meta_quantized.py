"""Linear layers as training in 4 or 8 bit stores them, for a rehearsal: the sizes of their numbers, on the meta device.

    n weights in 4 bit: n / 2 bytes of NF4, n / 64 one-byte scales, n / 16,384 four-byte scales of these, small tables
    in 8 bit:           n bytes, and a four-byte scale for each row

Needs nothing of bitsandbytes, which a machine that only plans may not have.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from byeori.kernels import quantized_linear
from byeori.model import quantize

_BLOCK, _SCALES = 64, 256


class MetaQuantizedLinear(quantized_linear.QuantizedLinear):
    """A frozen linear layer with its weight in 4 or 8 bit. weight_count: how many numbers the weight has."""

    def __init__(self, linear: torch.nn.Linear, bits: int = 4) -> None:
        super().__init__(linear, bits)
        self.weight_count = linear.weight.numel()
        if bits == 8:
            self.scales = torch.empty(self.out_features, dtype=torch.float32, device="meta")
            return
        blocks = math.ceil(self.weight_count / _BLOCK)
        self.scales = torch.empty(blocks, dtype=torch.uint8, device="meta")
        sizes = {"scale_scales": math.ceil(blocks / _SCALES), "offset": 1, "code": 16, "scale_code": 256}
        for name, count in sizes.items():
            setattr(self, name, torch.empty(count, dtype=torch.float32, device="meta"))

    def dequantize(self, quantized: torch.Tensor) -> torch.Tensor:
        """The weight [out, in] in the compute type; scales of 4 bit, and weights of 8 bit, are in float32 before."""
        if self.bits == 8:  # bitsandbytes: quantized * scales * (1 / 127)
            return (quantized * self.scales[:, None] * 1.0).to(self.compute_dtype)
        scales = torch.empty_like(self.scales, dtype=torch.float32)
        weight = torch.empty(self.out_features, self.in_features, dtype=self.compute_dtype, device=scales.device)
        del scales
        return weight


def quantize_layers(causal: Any, bits: int = 4, kind: type[MetaQuantizedLinear] = MetaQuantizedLinear) -> int:
    """Replace every plain linear layer but the output embedding; returns how many."""
    layers = quantize.plain_layers(causal)
    for parent, name, child in layers:
        setattr(parent, name, kind(child, bits))
    return len(layers)
