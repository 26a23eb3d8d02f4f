"""A frozen linear layer in 4 or 8 bit, dequantized once in the forward and once in the backward pass.

4 bit is NF4 with double quantisation (QLoRA, Dettmers et al., arXiv:2305.14314): blocks of 64 numbers share a scale,
and blocks of 256 scales share one. 8 bit is int8 with a scale per row; activations are not quantised, so it is closer
to the weights than LLM.int8(), which rounds both. Both by bitsandbytes, on the CPU too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

_BLOCK = 64


class QuantizedLinear(torch.nn.Linear):
    """A frozen linear layer; weight is [n, 1] uint8 (4 bit) or [out, in] int8 (8 bit).

    The weight is quantized as one long row: its blocks are those of bitsandbytes' own layers if `in` is a multiple of
    the block size, and right if it is not (bitsandbytes 0.50 dequantizes such a matrix wrongly on the CPU).
    """

    def __init__(self, linear: torch.nn.Linear, bits: int) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features, self.bits = linear.in_features, linear.out_features, bits
        self.compute_dtype = linear.weight.dtype
        count = self.in_features * self.out_features
        shape = ((count + 1) // 2, 1) if bits == 4 else (self.out_features, self.in_features)
        empty = torch.empty(shape, dtype=torch.uint8 if bits == 4 else torch.int8, device="meta")
        self.weight = torch.nn.Parameter(empty, requires_grad=False)
        self.bias = linear.bias
        for name in ("scales", "scale_scales", "offset", "code", "scale_code"):
            self.register_buffer(name, None, persistent=False)

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """Store the scales of a weight [out, in]; return the quantized weight, which is not stored."""
        from bitsandbytes import functional

        if self.bits == 8:
            quantized, self.scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
            return quantized
        quantized, state = functional.quantize_4bit(
            weight.reshape(-1), blocksize=_BLOCK, compress_statistics=True, quant_type="nf4"
        )
        self.scales, self.offset, self.code = state.absmax, state.offset, state.code
        self.scale_scales, self.scale_code = state.state2.absmax, state.state2.code
        return quantized

    def dequantize(self, quantized: torch.Tensor) -> torch.Tensor:
        """Return the weight [out, in] in the compute type."""
        from bitsandbytes import functional

        if self.bits == 8:
            return functional.int8_vectorwise_dequant(quantized, self.scales).to(self.compute_dtype)
        inner = functional.QuantState(
            absmax=self.scale_scales, code=self.scale_code, blocksize=256, dtype=torch.float32
        )
        state = functional.QuantState(
            absmax=self.scales,
            shape=torch.Size([self.in_features * self.out_features]),
            code=self.code,
            blocksize=_BLOCK,
            quant_type="nf4",
            dtype=self.compute_dtype,
            offset=self.offset,
            state2=inner,
        )
        return functional.dequantize_4bit(quantized, state).view(self.out_features, self.in_features)

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
