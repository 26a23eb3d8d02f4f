"""Numbers in 4 or 8 bit, and opening them.

4 bit is NF4 with double quantisation (QLoRA, Dettmers et al., arXiv:2305.14314): blocks of 64 numbers share a scale,
and blocks of 256 scales share one. 8 bit is int8 with a scale per row; activations are not quantised, so it is closer
to the weights than LLM.int8(), which rounds both. Both by bitsandbytes, on the CPU too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from byeori.kernels import switches
from byeori.support.console import say
from byeori.support.text_files import one_line

BLOCK, BLOCK_OF_SCALES = 64, 256
_BUFFERS = ("scales", "scale_scales", "offset", "code", "scale_code")
_MOST_AT_ONCE = 1 << 30  # numbers; bitsandbytes counts them in 32 bits


class QuantizedWeight(torch.nn.Module):
    """The scales of a frozen weight; its codes are a parameter of whatever has them.

    sizes: (groups, rows, columns). The codes are [n, 1] uint8 (4 bit) or [rows, columns] int8 (8 bit), with the groups
    in front if there are several: a group is quantized as one long row, and begins a block. So blocks are those of
    bitsandbytes' own layers if the columns are a multiple of the block size, and right if they are not (bitsandbytes
    0.50 dequantizes such a matrix wrongly on the CPU).
    """

    def __init__(self, sizes: tuple[int, int, int], bits: int, dtype: torch.dtype) -> None:
        torch.nn.Module.__init__(self)
        self.sizes, self.bits, self.compute_dtype = sizes, bits, dtype
        for name in _BUFFERS:
            self.register_buffer(name, None, persistent=False)

    @property
    def group(self) -> int:
        """How many numbers a group has, with those that fill its last block if another one follows."""
        groups, rows, columns = self.sizes
        count = rows * columns
        return count if groups == 1 or self.bits == 8 else math.ceil(count / BLOCK) * BLOCK

    def empty_codes(self) -> torch.nn.Parameter:
        """Return the parameter of the codes on the meta device."""
        groups, rows, columns = self.sizes
        sides = (math.ceil(self.group / 2), 1) if self.bits == 4 else (rows, columns)
        shape = sides if groups == 1 else (groups, *sides)
        kind = torch.uint8 if self.bits == 4 else torch.int8
        return torch.nn.Parameter(torch.empty(shape, dtype=kind, device="meta"), requires_grad=False)

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """Store the scales of a weight; return its codes, which are not stored."""
        there = weight.device if _quantizes(weight.device, self.bits) else torch.device("cpu")
        numbers = weight.to(there).reshape(self.sizes[0], -1)
        if short := self.group - numbers.shape[1]:
            numbers = F.pad(numbers, (0, short))
        parts = [numbers[first:last] for first, last in self._parts(0, self.sizes[0])]
        codes, *buffers = _quantized(parts, self.bits, self.sizes[2])
        for name, buffer in zip(_BUFFERS, buffers, strict=False):
            setattr(self, name, buffer.to(weight.device))
        return codes.to(weight.device).view(self.empty_codes().shape)

    def open(self, codes: torch.Tensor, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Return the weight [groups, rows, columns] in the compute type, or groups [first, last) of it."""
        _, rows, columns = self.sizes
        last = self.sizes[0] if last is None else last
        opened = [self._open(codes, *part).view(-1, self.group) for part in self._parts(first, last)]
        whole = opened[0] if len(opened) == 1 else torch.cat(opened)
        return whole[:, : rows * columns].reshape(last - first, rows, columns)

    def _parts(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        step = max(1, _MOST_AT_ONCE // self.group)
        return ((at, min(at + step, last)) for at in range(first, last, step))

    def _open(self, codes: torch.Tensor, first: int, last: int) -> torch.Tensor:
        groups, _, columns = self.sizes
        codes = codes.view(groups, -1)[first:last]
        by_library = switches.current().quantized
        if self.bits == 8:
            codes, scales = codes.reshape(-1, columns), self.scales.view(groups, -1)[first:last].reshape(-1)
            if not by_library:
                return (codes.float() * (scales[:, None] / 127)).to(self.compute_dtype)
            from bitsandbytes import functional

            return functional.int8_vectorwise_dequant(codes, scales).to(self.compute_dtype)
        scales = self._scales(by_library).view(groups, -1)[first:last].reshape(-1)
        count = (last - first) * self.group
        return self._by_library(codes, scales, count) if by_library else self._written_out(codes, scales, count)

    def _scales(self, by_library: bool) -> torch.Tensor:
        """Of 4 bit, in float32."""
        if not by_library:
            scales = self.scale_code[self.scales.int()]
            return scales * _repeated(self.scale_scales, BLOCK_OF_SCALES, len(scales)) + self.offset
        from bitsandbytes import functional

        state = functional.QuantState(
            absmax=self.scale_scales, code=self.scale_code, blocksize=BLOCK_OF_SCALES, dtype=torch.float32
        )
        return functional.dequantize_blockwise(self.scales, state) + self.offset

    def _by_library(self, codes: torch.Tensor, scales: torch.Tensor, count: int) -> torch.Tensor:
        from bitsandbytes import functional

        state = functional.QuantState(
            absmax=scales,
            shape=torch.Size([count]),
            code=self.code,
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=self.compute_dtype,
        )
        return functional.dequantize_4bit(codes.reshape(-1, 1), state)

    def _written_out(self, codes: torch.Tensor, scales: torch.Tensor, count: int) -> torch.Tensor:
        """The same by PyTorch's own operations: a byte is two numbers, the first in its high half."""
        byte = torch.arange(256, device=codes.device)
        pairs = torch.stack([self.code[byte >> 4], self.code[byte & 15]], dim=1)
        numbers = pairs.index_select(0, codes.flatten().int()).flatten()[:count]
        numbers *= _repeated(scales, BLOCK, count)
        return numbers.to(self.compute_dtype)


def _repeated(values: torch.Tensor, times: int, count: int) -> torch.Tensor:
    return values.repeat_interleave(times)[:count]


def _quantized(parts: list[torch.Tensor], bits: int, columns: int) -> list[torch.Tensor]:
    """The codes of a weight and what opens them, by bitsandbytes. parts: of its numbers."""
    from bitsandbytes import functional

    if bits == 8:
        found = [functional.int8_vectorwise_quant(part.reshape(-1, columns).to(torch.float16))[:2] for part in parts]
        return [torch.cat(each) for each in zip(*found, strict=True)]
    codes, states = zip(
        *(functional.quantize_4bit(part.reshape(-1), blocksize=BLOCK, quant_type="nf4") for part in parts), strict=True
    )
    scales = torch.cat([state.absmax for state in states])
    offset = scales.mean()
    scale_codes, state = functional.quantize_blockwise(scales - offset, blocksize=BLOCK_OF_SCALES)
    return [torch.cat(codes), scale_codes, state.absmax, offset, states[0].code, state.code]


@functools.cache
def _quantizes(device: torch.device, bits: int) -> bool:
    """Whether bitsandbytes quantizes on a device as on the CPU: tried once. A number between two may go either way."""
    if device.type == "cpu":
        return True
    weight = torch.sin(torch.arange(2**15, dtype=torch.float32)).view(-1, 128)
    try:
        there, here = _quantized([weight.to(device)], bits, 128), _quantized([weight], bits, 128)
        same = float((there[0].cpu() == here[0]).float().mean()) > 0.98
        why = None if same else "gives other numbers here"
    except Exception as error:  # bitsandbytes and what it calls raise nothing of one kind
        why = f"fails here ({one_line(error, 200)})"
    if why:
        say(f"bitsandbytes' {bits} bit quantization on {device} {why}: the CPU quantizes, which takes longer")
    return why is None
