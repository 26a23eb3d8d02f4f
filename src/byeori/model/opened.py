"""Weights whose numbers come out of quantized ones: of a base that is stored so, or as training in 4 bit held them.

bitsandbytes' or FP8 codes and their scales ──┐
full-precision weights ── quantized again ────┴──> Opened: float32 numbers, one tensor at a time
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from byeori.errors import ModelError
from byeori.model.fingerprint import Stored
from byeori.model.quantize import check_installed

FLOATS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
DTYPES = {code: getattr(torch, name) for name, code in FLOATS.items()}
_BLOCK_BYTES = 8 << 20
_CODES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
_FP8 = ("F8_E4M3", "F8_E5M2")
_BNB_STATE = ".quant_state.bitsandbytes__"
_BNB_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_FP8_SCALES = ("weight_scale_inv", "weight_scale")
_FP8_BLOCKS = (128, 128)  # DeepSeek's, and the default of transformers
_FP8_OTHERS = ("input_scale", "activation_scale", "input_scale_ub", "output_scale")


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A weight that is computed when it is needed. dtype: safetensors' name of the type that it is written in."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]

    @property
    def count(self) -> int:
        return int(torch.Size(self.shape).numel())

    @property
    def size(self) -> int:
        """Bytes in its type."""
        return self.count * BYTES[self.dtype]


Source = Stored | Opened


def read(source: Source) -> torch.Tensor:
    """Return a whole tensor, in the type that it is stored in."""
    if isinstance(source, Opened):
        return source.load()
    parts = [block for *_, block in row_blocks(source)]
    return torch.cat(parts).view(source.shape) if parts else torch.empty(source.shape)


def row_blocks(source: Source, rows_at_once: int | None = None) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield (first row, last row + 1, [elements]) of a tensor; as bytes if torch has no such type.

    Raises:
        ModelError: if a file is cut short.
    """
    rows = source.shape[0] if source.shape else 1
    if isinstance(source, Opened):
        yield 0, rows, source.load().reshape(-1)
        return
    step = rows_at_once or max(1, _BLOCK_BYTES * rows // max(source.size, 1))
    with source.path.open("rb") as file:
        file.seek(source.start)
        for first in range(0, rows if source.size else 0, step):
            last = min(first + step, rows)
            yield first, last, _read(file, source, source.size // rows * (last - first))


def some_rows(source: Source, rows: list[int]) -> torch.Tensor:
    """Return rows [len(rows), columns] of a matrix, without reading the others."""
    if isinstance(source, Opened):
        return source.load()[rows]
    width = source.size // source.shape[0]
    with source.path.open("rb") as file:
        parts = []
        for row in rows:
            file.seek(source.start + row * width)
            parts.append(_read(file, source, width))
    return torch.stack(parts)


def _read(file: Any, stored: Stored, size: int) -> torch.Tensor:
    buffer = bytearray(size)
    if file.readinto(buffer) != size:
        raise ModelError(f"{stored.path} is cut short; copy or download it again")
    return torch.frombuffer(buffer, dtype=DTYPES.get(stored.dtype) or _CODES.get(stored.dtype, torch.uint8))


def longer(source: Source, rows: int) -> Opened:
    """Return an embedding with more rows: new tokens start at the mean of the others, as in training."""

    def load() -> torch.Tensor:
        own = read(source).float()
        return torch.cat([own, own.mean(dim=0).expand(rows - len(own), -1)])

    return Opened(name="embedding", dtype=source.dtype, shape=(rows, *source.shape[1:]), load=load)


# ---- as training in 4 or 8 bit holds them -----------------------------------------------------------------------


def as_trained(source: Source, name: str, bits: int, compute: torch.dtype) -> Opened:
    """Return a weight as training holds it: quantized to 4 or 8 bit, and opened in `compute`."""

    def load() -> torch.Tensor:
        return quantized_again(read(source), name, bits, compute)

    return Opened(name=name, dtype=source.dtype, shape=source.shape, load=load)


def quantized_again(weight: torch.Tensor, name: str, bits: int, compute: torch.dtype) -> torch.Tensor:
    """Return what training in 4 or 8 bit computes with, in float32. weight: of a linear layer, or of all experts.

    Raises:
        ConfigError: if bitsandbytes is not installed.
    """
    from byeori.kernels.quantized_weight import QuantizedWeight

    check_installed(f"opening {name} as training in {bits} bit held it")
    rows, columns = weight.shape[-2:]
    held = QuantizedWeight((weight.shape[0] if weight.dim() == 3 else 1, rows, columns), bits, compute)
    return held.open(held.quantize(weight.to(compute))).view(weight.shape).float()
