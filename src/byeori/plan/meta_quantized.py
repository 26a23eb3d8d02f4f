"""Linear layers as 4-bit training stores them, for a rehearsal: the sizes of their numbers, on the meta device.

    n weights: n / 2 bytes of NF4, n / 64 one-byte scales, n / 16,384 four-byte scales of these, and small tables

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
    """A frozen linear layer with its weight in 4 bit. weight_count: how many numbers the weight has."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear, 4)
        self.weight_count = linear.weight.numel()
        blocks = math.ceil(self.weight_count / _BLOCK)
        self.scales = torch.empty(blocks, dtype=torch.uint8, device="meta")
        sizes = {"scale_scales": math.ceil(blocks / _SCALES), "offset": 1, "code": 16, "scale_code": 256}
        for name, count in sizes.items():
            setattr(self, name, torch.empty(count, dtype=torch.float32, device="meta"))

    def dequantize(self, quantized: torch.Tensor) -> torch.Tensor:
        """The weight [out, in] in the compute type; its scales are dequantized to float32 for it."""
        scales = torch.empty_like(self.scales, dtype=torch.float32)
        weight = torch.empty(self.out_features, self.in_features, dtype=self.compute_dtype, device=scales.device)
        del scales
        return weight


def quantize_layers(causal: Any, kind: type[MetaQuantizedLinear] = MetaQuantizedLinear) -> int:
    """Replace every plain linear layer but the output embedding; returns how many."""
    layers = quantize.plain_layers(causal)
    for parent, name, child in layers:
        setattr(parent, name, kind(child))
    return len(layers)
