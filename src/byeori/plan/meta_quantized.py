"""Linear layers as 4-bit training holds them, for a rehearsal: the sizes of their numbers, on the meta device.

    n numbers: n / 2 bytes of NF4, n / 64 one-byte scales, n / 16,384 four-byte scales of these, and small tables

Here nothing of bitsandbytes is needed, which a machine that only plans may not have.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from byeori.kernels import quantized_linear
from byeori.model import quantize

_BLOCK, _SCALES = 64, 256


class Packed(quantized_linear.QuantizedLinear):
    """A frozen linear layer, its weight in 4 bit. numbers: how many the weight has."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear, 4)
        self.numbers = linear.weight.numel()
        blocks = math.ceil(self.numbers / _BLOCK)
        sizes = {"scales": blocks, "scale_scales": math.ceil(blocks / _SCALES), "offset": 1, "code": 16}
        for name, count in (sizes | {"scale_code": 256}).items():
            dtype = torch.uint8 if name == "scales" else torch.float32
            setattr(self, name, torch.empty(count, dtype=dtype, device="meta"))

    def open(self, packed: torch.Tensor) -> torch.Tensor:
        """The weight [out, in] in the compute type; its scales are opened to float32 on the way."""
        scales = torch.empty_like(self.scales, dtype=torch.float32)
        opened = torch.empty(self.out_features, self.in_features, dtype=self.opened_dtype, device=scales.device)
        del scales
        return opened


def pack_layers(causal: Any, kind: type[Packed] = Packed) -> int:
    """Put a Packed in the place of every plain linear layer but the output embedding; returns how many."""
    found = quantize.plain_layers(causal)
    for parent, name, child in found:
        setattr(parent, name, kind(child))
    return len(found)
