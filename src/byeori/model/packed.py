"""Weights as quantized checkpoints store them, and their numbers: what every writer's own loader computes.

    bitsandbytes   weight, weight.absmax, ...                     NF4, FP4 or 8 bit
    GPTQ           qweight, qzeros, scales, g_idx                 2, 3, 4 or 8 bit along the inputs
    AWQ            qweight, qzeros, scales                        4 bit along the outputs, eight of them interleaved
    compressed-    weight_packed, weight_scale, weight_shape      1 to 8 bit along the inputs
      tensors      weight, weight_scale (weight_zero_point)       8 bit: whole numbers or FP8
    FP8            weight, weight_scale_inv                       scales of blocks, rows or the whole weight
    MXFP4          *_blocks, *_scales (gpt-oss); weight_packed    FP4, an exponent for 32 numbers
    NVFP4          weight_packed or weight, weight_scale          FP4, an FP8 scale for 16 numbers and one for all

Nothing but PyTorch is needed, and bitsandbytes for its own format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from byeori.model.fingerprint import Stored, stored_tensors
from byeori.model.opened import FLOATS, Opened, Source, read
from byeori.model.quantize import check_installed
from byeori.support.foreign_files import json_file

_FP8 = ("F8_E4M3", "F8_E5M2")
_FP8_SCALES = ("_scale_inv", "_scale")
_FP8_BLOCKS = (128, 128)  # DeepSeek's, and the default of transformers
_ACTIVATIONS = ("input_scale", "activation_scale", "input_scale_ub", "output_scale", "input_global_scale")
_BNB_STATE = ".quant_state.bitsandbytes__"
_BNB_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True, kw_only=True)
class _Found:
    """A weight that can be opened. name: as if it were not quantized. parts: the tensors that it is made of."""

    name: str
    shape: tuple[int, ...]
    parts: list[str]
    load: Callable[[], torch.Tensor]


def sources(folder: Path, tensors: dict[str, Stored] | None = None) -> dict[str, Source]:
    """Return a checkpoint's tensors by name, those that are stored quantized opened; every name as if none were.

    tensors: of fingerprint.stored_tensors, if they are known.
    """
    tensors = stored_tensors(folder) if tensors is None else tensors
    opened, parts = open_stored(folder, tensors)
    return {name: item for name, item in tensors.items() if name not in parts} | opened


def open_stored(folder: Path, tensors: dict[str, Stored]) -> tuple[dict[str, Opened], set[str]]:
    """Return the quantized weights that can be opened, by name, and the names of what they are made of."""
    config = json_file(folder / "config.json")
    text = config | next((config[key] for key in ("text_config",) if isinstance(config.get(key), dict)), {})
    dtype = FLOATS.get(str(text.get("dtype") or text.get("torch_dtype") or config.get("dtype")), "BF16")
    settings = config.get("quantization_config") or {}
    opened: dict[str, Opened] = {}
    parts: set[str] = set()
    for name in tensors:
        for opener in _OPENERS:
            if found := opener(name, tensors, settings):
                opened[found.name] = Opened(name=found.name, dtype=dtype, shape=found.shape, load=found.load)
                parts.update(found.parts)
                break
    return opened, parts


# ---- which tensors make a weight --------------------------------------------------------------------------------

Tensors = dict[str, Stored]


def _bnb4(name: str, tensors: Tensors, settings: dict[str, Any]) -> _Found | None:
    if name + ".absmax" not in tensors:
        return None
    state = next((key for key in tensors if key.startswith(name + _BNB_STATE)), None)
    if state is None:
        return None
    own = [name, state, *(name + part for part in _BNB_PARTS if name + part in tensors)]
    facts = json.loads(bytes(read(tensors[state]).numpy()))
    load = partial(_open_bnb4, name, {key: tensors[key] for key in own})
    return _Found(name=name, shape=tuple(facts["shape"]), parts=own, load=load)


def _bnb8(name: str, tensors: Tensors, settings: dict[str, Any]) -> _Found | None:
    module = name.removesuffix("weight")
    if tensors[name].dtype != "I8" or not name.endswith(".weight") or module + "SCB" not in tensors:
        return None
    own = [name, *(key for key in (module + "SCB", module + "weight_format") if key in tensors)]
    load = partial(_open_bnb8, tensors[name], tensors[module + "SCB"])
    return _Found(name=name, shape=tensors[name].shape, parts=own, load=load)


def _scaled(name: str, tensors: Tensors, settings: dict[str, Any]) -> _Found | None:
    """FP8, and 8-bit whole numbers of compressed-tensors."""
    stored = tensors[name]
    scale = next((name + key for key in _FP8_SCALES if name + key in tensors), None)
    if name.endswith(_FP8_SCALES) or (stored.dtype not in _FP8 and not (stored.dtype == "I8" and scale)):
        return None
    zero = next((key for key in (name + "_zero_point",) if key in tensors), None)
    own = [name, *filter(None, (scale, zero)), *_of_activations(name, tensors)]
    blocks = settings.get("weight_block_size") or _block_structure(settings) or _FP8_BLOCKS
    scales, zeros = (tensors[key] if key else None for key in (scale, zero))
    return _Found(name=name, shape=stored.shape, parts=own, load=partial(_open_scaled, stored, scales, zeros, blocks))


def _gptq_or_awq(name: str, tensors: Tensors, settings: dict[str, Any]) -> _Found | None:
    module = name.removesuffix("qweight")
    keys = {key: module + key for key in ("qweight", "qzeros", "scales", "g_idx") if module + key in tensors}
    if not name.endswith(".qweight") or not {"qzeros", "scales"} <= set(keys):
        return None
    own = {key: tensors[full] for key, full in keys.items()}
    method = " ".join(str(settings.get(key)) for key in ("quant_method", "packing_format")).lower()
    version = str(settings.get("version") or settings.get("checkpoint_format") or "gptq").lower()
    _groups, outputs = own["scales"].shape
    bits = own["qzeros"].shape[1] * 32 // outputs
    if "awq" in method:
        if version not in ("gemm", "gptq") or own["qweight"].shape[1] * 8 != outputs:
            return None
        shape, load = (outputs, own["qweight"].shape[0]), partial(_open_awq, own)
    elif version in ("gptq", "gptq_v2") and bits in (2, 3, 4, 8):
        less_one = "gptq" in method and version == "gptq"  # the first format stores zero points less one
        inputs = own["g_idx"].shape[0] if "g_idx" in own else own["qweight"].shape[0] * 32 // bits
        shape, load = (outputs, inputs), partial(_open_gptq, own, bits, inputs, int(less_one))
    else:
        return None
    return _Found(name=module + "weight", shape=shape, parts=list(keys.values()), load=load)


def _packed(name: str, tensors: Tensors, settings: dict[str, Any]) -> _Found | None:
    """compressed-tensors: whole numbers of few bits, or FP4."""
    base = name.removesuffix("_packed")
    if base == name or base + "_scale" not in tensors:
        return None
    others = ("_scale", "_shape", "_zero_point", "_g_idx", "_global_scale")
    own = {key: tensors[base + key] for key in others if base + key in tensors} | {"": tensors[name]}
    keys = [name, *(base + key for key in own if key), *_of_activations(base, tensors)]
    rows, words = own[""].shape
    if own[""].dtype == "U8":
        if 2 * words // own["_scale"].shape[-1] not in (16, 32):  # FP6
            return None
        load = partial(_open_fp4, own[""], own["_scale"], own.get("_global_scale"), divided=True)
        return _Found(name=base, shape=(rows, 2 * words), parts=keys, load=load)
    if "_shape" not in own:
        return None
    shape = tuple(int(size) for size in read(own["_shape"]).view(-1))
    bits = next(bits for bits in range(1, 9) if words == -(-shape[1] * bits // 32))
    return _Found(name=base, shape=shape, parts=keys, load=partial(_open_packed, own, bits, shape))


def _mxfp4(name: str, tensors: Tensors, settings: dict[str, Any]) -> _Found | None:
    """gpt-oss: blocks [experts, out, in / 32, 16] of what transformers holds as [experts, in, out]."""
    base = name.removesuffix("_blocks")
    if base == name or base + "_scales" not in tensors or len(tensors[name].shape) != 4:
        return None
    experts, outputs, groups, size = tensors[name].shape
    load = partial(_open_mxfp4, tensors[name], tensors[base + "_scales"])
    shape = (experts, groups * size * 2, outputs)
    return _Found(name=base, shape=shape, parts=[name, base + "_scales"], load=load)


def _nvfp4(name: str, tensors: Tensors, settings: dict[str, Any]) -> _Found | None:
    """As NVIDIA's ModelOpt writes it."""
    scales = [name + "_scale", name + "_scale_2"]
    if tensors[name].dtype != "U8" or not all(key in tensors for key in scales):
        return None
    load = partial(_open_fp4, tensors[name], *(tensors[key] for key in scales), divided=False)
    shape = (tensors[name].shape[0], 2 * tensors[name].shape[1])
    return _Found(name=name, shape=shape, parts=[name, *scales, *_of_activations(name, tensors)], load=load)


_OPENERS = (_bnb4, _bnb8, _scaled, _gptq_or_awq, _packed, _mxfp4, _nvfp4)


def _of_activations(name: str, tensors: Tensors) -> list[str]:
    module = name.removesuffix("weight")
    return [module + other for other in _ACTIVATIONS if module + other in tensors]


def _block_structure(settings: dict[str, Any]) -> Sequence[int] | None:
    groups = (settings.get("config_groups") or {}).values()
    weights = [group.get("weights") or {} for group in groups if isinstance(group, dict)]
    return next((each["block_structure"] for each in weights if each.get("block_structure")), None)


# ---- their numbers ----------------------------------------------------------------------------------------------


def unpacked(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return [rows, count] numbers of so many bits, lowest first, from [rows, words] of 32 bits."""
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        return ((words[..., None] >> shifts) & (2**bits - 1)).flatten(1)[:, :count]
    at = torch.arange(count) * bits
    wide = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))
    low, high = wide[:, at // 32] >> at % 32, wide[:, at // 32 + 1] << 32 - at % 32
    return (low | high) & (2**bits - 1)


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


def _open_scaled(codes: Stored, scales: Stored | None, zeros: Stored | None, blocks: Sequence[int]) -> torch.Tensor:
    """Scales are one, one a row, one a group of columns, or one a block, the last of which may be cut."""
    weight = read(codes).float()

    def spread(stored: Stored) -> torch.Tensor:
        numbers = read(stored)
        found = numbers.float() if numbers.dtype != torch.uint8 else _exponents(numbers)
        if found.dim() < weight.dim():
            found = found.reshape(*found.shape, *[1] * (weight.dim() - found.dim()))
        for axis, length in enumerate(weight.shape):
            count = found.shape[axis]
            if count not in (1, length):
                block = int(blocks[axis - weight.dim()]) if axis >= weight.dim() - 2 else 0
                size = block if block and -(-length // block) == count else -(-length // count)
                found = found.repeat_interleave(size, axis).narrow(axis, 0, length)
        return found

    if zeros is not None:
        weight = weight - spread(zeros)
    return weight if scales is None else weight * spread(scales)


def _open_gptq(stored: dict[str, Stored], bits: int, inputs: int, offset: int) -> torch.Tensor:
    scales = read(stored["scales"]).float()
    codes = unpacked(read(stored["qweight"]).t(), bits, inputs)
    zeros = (unpacked(read(stored["qzeros"]), bits, scales.shape[1]) + offset) & (2**bits - 1)
    group = read(stored["g_idx"]).long() if "g_idx" in stored else torch.arange(inputs) // -(-inputs // len(scales))
    return (codes - zeros[group].t()) * scales[group].t()


def _open_awq(stored: dict[str, Stored]) -> torch.Tensor:
    """Eight outputs lie in one word in the order 0 2 4 6 1 3 5 7."""
    scales = read(stored["scales"]).float()
    outputs = scales.shape[1]
    order = torch.arange(outputs).view(-1, 8)[:, _AWQ_ORDER].flatten()
    codes, zeros = (unpacked(read(stored[key]), 4, outputs)[:, order] for key in ("qweight", "qzeros"))
    size = len(codes) // len(scales)
    return ((codes - zeros.repeat_interleave(size, 0)) * scales.repeat_interleave(size, 0)).t().contiguous()


def _open_packed(stored: dict[str, Stored], bits: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Codes are above half of their range; zero points are packed along the outputs."""
    scales, codes = read(stored["_scale"]).float(), unpacked(read(stored[""]), bits, shape[1])
    scales = scales.view(-1, scales.shape[-1] if scales.dim() else 1)
    group = read(stored["_g_idx"]).long() if "_g_idx" in stored else torch.tensor([-1])
    if int(group.min()) < 0:
        group = torch.arange(shape[1]) // -(-shape[1] // scales.shape[1])
    if "_zero_point" in stored:
        zeros = unpacked(read(stored["_zero_point"]).t(), bits, shape[0]).t()[:, group]
    else:
        zeros = torch.tensor(2 ** (bits - 1))
    return (codes - zeros) * scales[:, group]


def _exponents(scales: torch.Tensor) -> torch.Tensor:
    return torch.ldexp(torch.ones(scales.shape), scales.int() - 127)


def _fp4(codes: torch.Tensor) -> torch.Tensor:
    """[..., n] bytes -> [..., 2 n], the lower half first."""
    values = torch.tensor([*_FP4, *(-value for value in _FP4)])
    return torch.stack([values[(codes & 15).int()], values[(codes >> 4).int()]], dim=-1).flatten(-2)


def _open_fp4(codes: Stored, scales: Stored, whole: Stored | None, *, divided: bool) -> torch.Tensor:
    """whole: the scale of all scales, which compressed-tensors divides by and ModelOpt multiplies with."""
    numbers, weight = read(scales), _fp4(read(codes))
    scale = _exponents(numbers) if numbers.dtype == torch.uint8 else numbers.float()
    if whole is not None:
        factor = read(whole).float().view(-1)
        scale = scale / factor if divided else scale * factor
    return weight * scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)


def _open_mxfp4(blocks: Stored, scales: Stored) -> torch.Tensor:
    weight = _fp4(read(blocks)) * _exponents(read(scales))[..., None]
    return weight.flatten(2).transpose(1, 2).contiguous()
