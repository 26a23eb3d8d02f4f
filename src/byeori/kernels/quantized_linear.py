"""A frozen linear layer in 4 or 8 bit, dequantized once in the forward and once in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from byeori.kernels.quantized_weight import QuantizedWeight


class QuantizedLinear(QuantizedWeight, torch.nn.Linear):
    """A frozen linear layer; weight is [n, 1] uint8 (4 bit) or [out, in] int8 (8 bit)."""

    def __init__(self, linear: torch.nn.Linear, bits: int) -> None:
        super().__init__((1, linear.out_features, linear.in_features), bits, linear.weight.dtype)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = self.empty_codes()
        self.bias = linear.bias

    def dequantize(self, quantized: torch.Tensor) -> torch.Tensor:
        """Return the weight [out, in] in the compute type."""
        return self.open(quantized).view(self.out_features, self.in_features)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """y = x W^T + b."""
        output: torch.Tensor = _Dequantized.apply(input, self.weight, self.bias, self.dequantize)
        return output


class _Dequantized(torch.autograd.Function):
    """A linear layer that saves the quantized weight only: dx = dy W, with W dequantized again."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        x, quantized, bias, ctx.dequantize = args
        ctx.save_for_backward(quantized)
        return F.linear(x, ctx.dequantize(quantized), bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (quantized,) = ctx.saved_tensors
        return grads[0] @ ctx.dequantize(quantized), None, None, None
