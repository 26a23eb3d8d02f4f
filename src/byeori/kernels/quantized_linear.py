"""A frozen linear layer in 4 or 8 bit, dequantized once in the forward and once in the backward pass.

4 bit is NF4 with double quantisation (QLoRA, Dettmers et al., arXiv:2305.14314): blocks of 64 numbers share a scale,
and blocks of 256 scales share one. 8 bit is int8 with a scale per row; activations are not quantised, so it is closer
to the weights than LLM.int8(), which rounds both. Both by bitsandbytes, on the CPU too.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from byeori.kernels import switches
from byeori.support.console import say
from byeori.support.text_files import one_line

_BLOCK, _BLOCK_OF_SCALES = 64, 256
_BUFFERS = ("scales", "scale_scales", "offset", "code", "scale_code")


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
        for name in _BUFFERS:
            self.register_buffer(name, None, persistent=False)

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """Store the scales of a weight [out, in]; return the quantized weight, which is not stored."""
        there = weight.device if _quantizes(weight.device, self.bits) else torch.device("cpu")
        quantized, *buffers = _quantized(weight.to(there), self.bits)
        for name, buffer in zip(_BUFFERS, buffers, strict=False):
            setattr(self, name, buffer.to(weight.device))
        return quantized.to(weight.device)

    def dequantize(self, quantized: torch.Tensor) -> torch.Tensor:
        """Return the weight [out, in] in the compute type."""
        if not switches.current().quantized:
            return self._written_out(quantized)
        from bitsandbytes import functional

        if self.bits == 8:
            return functional.int8_vectorwise_dequant(quantized, self.scales).to(self.compute_dtype)
        inner = functional.QuantState(
            absmax=self.scale_scales, code=self.scale_code, blocksize=_BLOCK_OF_SCALES, dtype=torch.float32
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

    def _written_out(self, quantized: torch.Tensor) -> torch.Tensor:
        """The same by PyTorch's own operations: a byte is two numbers, the first in its high half."""
        if self.bits == 8:
            return (quantized.float() * (self.scales[:, None] / 127)).to(self.compute_dtype)
        scales = self.scale_code[self.scales.int()] * _repeated(self.scale_scales, _BLOCK_OF_SCALES, len(self.scales))
        byte = torch.arange(256, device=quantized.device)
        pairs = torch.stack([self.code[byte >> 4], self.code[byte & 15]], dim=1)
        count = self.in_features * self.out_features
        numbers = pairs.index_select(0, quantized.flatten().int()).flatten()[:count]
        numbers *= _repeated(scales + self.offset, _BLOCK, count)
        return numbers.to(self.compute_dtype).view(self.out_features, self.in_features)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """y = x W^T + b."""
        output: torch.Tensor = _Dequantized.apply(input, self.weight, self.bias, self.dequantize)
        return output


def _repeated(values: torch.Tensor, times: int, count: int) -> torch.Tensor:
    return values.repeat_interleave(times)[:count]


def _quantized(weight: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """The quantized weight and the buffers of its layer, by bitsandbytes."""
    from bitsandbytes import functional

    if bits == 8:
        return list(functional.int8_vectorwise_quant(weight.to(torch.float16))[:2])
    quantized, state = functional.quantize_4bit(
        weight.reshape(-1), blocksize=_BLOCK, compress_statistics=True, quant_type="nf4"
    )
    return [quantized, state.absmax, state.state2.absmax, state.offset, state.code, state.state2.code]


@functools.cache
def _quantizes(device: torch.device, bits: int) -> bool:
    """Whether bitsandbytes quantizes on a device as on the CPU: tried once. A number between two may go either way."""
    if device.type == "cpu":
        return True
    weight = torch.sin(torch.arange(2**15, dtype=torch.float32)).view(-1, 128)
    try:
        there, here = _quantized(weight.to(device), bits), _quantized(weight, bits)
        same = float((there[0].cpu() == here[0]).float().mean()) > 0.98
        why = None if same else "gives other numbers here"
    except Exception as error:  # its library, or a kernel that is not in it
        why = f"fails here ({one_line(error, 200)})"
    if why:
        say(f"bitsandbytes' {bits} bit quantization on {device} {why}: the CPU quantizes, which takes longer")
    return why is None


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
