"""Weights whose numbers come out of quantized ones: of a base that is stored so, or as training in 4 bit held them.

bitsandbytes' or FP8 codes and their scales ──┐
full-precision weights ── quantized again ────┴──> Opened: float32 numbers, one tensor at a time
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from byeori.errors import ModelError
from byeori.export.adapter_changes import FLOATS
from byeori.model.fingerprint import Stored
from byeori.model.quantize import check_installed
from byeori.support.foreign_files import json_file

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


# ---- as training in 4 or 8 bit holds them -----------------------------------------------------------------------


def as_trained(source: Stored, name: str, bits: int, compute: torch.dtype) -> Opened:
    """Return a full-precision weight as training holds it: quantized to 4 or 8 bit, and opened in `compute`."""

    def load() -> torch.Tensor:
        from byeori.kernels.quantized_linear import QuantizedLinear

        check_installed(f"opening {name} as training in {bits} bit held it")
        with torch.device("meta"):
            linear = torch.nn.Linear(source.shape[1], source.shape[0], bias=False, dtype=compute)
        layer = QuantizedLinear(linear, bits)
        return layer.dequantize(layer.quantize(read(source).to(compute))).float()

    return Opened(name=name, dtype=source.dtype, shape=source.shape, load=load)


# ---- as they are stored -----------------------------------------------------------------------------------------


def open_stored(folder: Path, tensors: dict[str, Stored]) -> tuple[dict[str, Opened], set[str]]:
    """Return the quantized weights that can be opened, by name, and the names of what only belongs to them."""
    config = json_file(folder / "config.json")
    text = config | next((config[key] for key in ("text_config",) if isinstance(config.get(key), dict)), {})
    dtype = FLOATS.get(str(text.get("dtype") or text.get("torch_dtype") or config.get("dtype")), "BF16")
    blocks = (config.get("quantization_config") or {}).get("weight_block_size") or _FP8_BLOCKS
    opened: dict[str, Opened] = {}
    parts: set[str] = set()
    for name, stored in tensors.items():
        module = name.removesuffix("weight")
        if state := next((key for key in tensors if key.startswith(name + _BNB_STATE)), None):
            own = [state, *(name + part for part in _BNB_PARTS if name + part in tensors)]
            facts = json.loads(bytes(read(tensors[state]).numpy()))
            shape, load = tuple(facts["shape"]), partial(_open_bnb4, name, {key: tensors[key] for key in [name, *own]})
        elif name.endswith(".weight") and stored.dtype == "I8" and module + "SCB" in tensors:
            own = [module + "SCB", *(key for key in (module + "weight_format",) if key in tensors)]
            shape, load = stored.shape, partial(_open_bnb8, stored, tensors[module + "SCB"])
        elif name.endswith(".weight") and stored.dtype in _FP8:
            scale = next((module + key for key in _FP8_SCALES if module + key in tensors), None)
            own = [key for key in (scale, *(module + other for other in _FP8_OTHERS)) if key in tensors]
            shape, load = stored.shape, partial(_open_fp8, stored, tensors[scale] if scale else None, blocks)
        else:
            continue
        parts.update(own)
        opened[name] = Opened(name=name, dtype=dtype, shape=shape, load=load)
    return opened, parts


def _open_bnb4(name: str, stored: dict[str, Stored]) -> torch.Tensor:
    check_installed(f"opening {name}, which is stored in 4 bit,")
    from bitsandbytes import functional

    parts = {key.removeprefix(name + "."): read(item) for key, item in stored.items() if key != name}
    state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
    shape, state.dtype = tuple(state.shape), torch.float32
    state.shape = torch.Size([torch.Size(shape).numel()])  # as one row: bitsandbytes 0.50 is wrong for some widths
    return functional.dequantize_4bit(read(stored[name]).view(-1, 1), state).view(shape).float()


def _open_bnb8(codes: Stored, scales: Stored) -> torch.Tensor:
    return read(codes).float() * (read(scales).float().view(-1, 1) / 127)


def _open_fp8(codes: Stored, scales: Stored | None, blocks: Sequence[int]) -> torch.Tensor:
    """Scales are one, one a row, or one a block of rows and columns, the last of which may be cut."""
    weight = read(codes).float()
    if scales is None:
        return weight
    scale = read(scales).float()
    if scale.dim() < weight.dim():
        scale = scale.reshape(*scale.shape, *[1] * (weight.dim() - scale.dim()))
    for axis, length in enumerate(weight.shape):
        if scale.shape[axis] not in (1, length):
            scale = scale.repeat_interleave(int(blocks[axis]), axis).narrow(axis, 0, length)
    return weight * scale
