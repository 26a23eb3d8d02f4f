"""A GGUF file in fewer bits: blocks by llama.cpp's own code, inside xllamacpp, in the mixes of its llama-quantize.

    model.gguf ── every matrix: float32 ── ggml_quantize_chunk ──> model-Q4_K_M.gguf

A mix keeps some matrices in more bits: the head, and values and second feed-forward matrices of the first, the last and
every third layer between (llama.cpp's src/llama-quant.cpp, llama_tensor_get_type).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from byeori.errors import ModelError

MIXES = {"q4_k_m": ("Q4_K", "Q6_K"), "q5_k_m": ("Q5_K", "Q6_K"), "q6_k": ("Q6_K", "Q6_K")}
"""A mix's name -> the type of most matrices, and of those that are kept in more bits."""

_FILE_TYPES = {"q4_k_m": "MOSTLY_Q4_K_M", "q5_k_m": "MOSTLY_Q5_K_M", "q6_k": "MOSTLY_Q6_K"}
# for rows that are no multiple of 256 long
_SHORT_ROWS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_KEPT = re.compile(
    r"_norm|ffn_gate_inp|ssm_conv1d|shortconv\.conv|time_mix_(first|w1|w2|decay_w1|decay_w2|lerp_fused)|position_embd|"
    r"token_types|indexer|altup|laurel|per_layer_model_proj"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What decides a mix. values, downs: names of matrices in the order of layers. has_head: if not, it is tied."""

    values: list[str]
    downs: list[str]
    has_head: bool
    experts: int


def quantize(source: Path, out: Path, mix: str, on_progress: Callable[[int, int], None]) -> None:
    """Write a GGUF file of float weights in one of the MIXES. on_progress: called with (matrices done, total).

    Raises:
        ModelError: if xllamacpp does not have llama.cpp's function; the sentence has llama-quantize's command.
    """
    import gguf

    chunk = _function(source, out, mix)
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(None, _text(reader, "general.architecture"))
    _copy_fields(reader, writer, int(getattr(gguf.LlamaFileType, _FILE_TYPES[mix])))
    model = layout_of(reader)
    kinds = {tensor.name: type_of(tensor, mix, model) for tensor in reader.tensors}
    for tensor in reader.tensors:
        kind = tensor.tensor_type if kinds[tensor.name] is None else kinds[tensor.name]
        shape = [int(length) for length in tensor.shape[::-1]]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        stored = [*shape[:-1], shape[-1] // block * size] if block > 1 else shape
        dtype = np.dtype(np.uint8) if block > 1 else tensor.data.dtype
        writer.add_tensor_info(tensor.name, stored, dtype, prod(shape) // block * size, raw_dtype=kind)
    writer.write_header_to_file(path=out)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for number, tensor in enumerate(reader.tensors, 1):  # one in memory at a time
        kind = kinds[tensor.name]
        writer.write_tensor_data(np.array(tensor.data) if kind is None else _blocks(chunk, tensor, kind))
        on_progress(number, len(reader.tensors))
    writer.close()


def _blocks(chunk: Any, tensor: Any, kind: Any) -> Any:
    """Return the bytes of a tensor in blocks, [rows, bytes of a row]."""
    import gguf

    columns = int(tensor.shape[0])
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(-1, columns)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    values = np.ascontiguousarray(values)
    found = np.empty((len(values), columns // block * size), dtype=np.uint8)
    chunk(int(kind), values.ctypes.data, found.ctypes.data, 0, len(values), columns, None)
    return found


def _function(source: Path, out: Path, mix: str) -> Any:
    """Return llama.cpp's ggml_quantize_chunk."""
    try:
        from xllamacpp import xllamacpp

        function = ctypes.CDLL(xllamacpp.__file__).ggml_quantize_chunk
    except (ImportError, OSError, AttributeError):
        raise ModelError(
            f"--quantize {mix} needs llama.cpp's code, which this xllamacpp does not offer; export without --quantize, "
            f"then run llama-quantize {source.name} {out.name} {mix.upper()}"
        ) from None
    whole, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [ctypes.c_int, pointer, pointer, whole, whole, whole, pointer]
    function.restype = ctypes.c_size_t
    return function


def type_of(tensor: Any, mix: str, model: Layout) -> Any:
    """Return the type of a tensor in a mix; None for one that stays as it is."""
    import gguf

    name = tensor.name
    if len(tensor.shape) < 2 or not name.endswith(".weight") or _KEPT.search(name) or int(tensor.shape[1]) == 1:
        return None
    most, better = MIXES[mix]
    head = name == ("output.weight" if model.has_head else "token_embd.weight")
    place = next((names for names in (model.values, model.downs) if name in names), None)
    if head or (place and _more_bits(place.index(name), len(place))):
        most = better
    elif "attn_qkv" in name:
        most = {"Q4_K": "Q5_K", "Q5_K": "Q6_K"}.get(most, most)
    if model.experts == 8 and name.endswith(("attn_v.weight", "attn_k.weight")):
        most = "Q8_0"
    elif model.experts == 8 and name.endswith("attn_output.weight"):
        most = "Q5_K" if mix == "q4_k_m" else most
    kind = getattr(gguf.GGMLQuantizationType, most)
    columns = int(tensor.shape[0])
    if columns % gguf.GGML_QUANT_SIZES[kind][0] and most in _SHORT_ROWS:
        kind = getattr(gguf.GGMLQuantizationType, _SHORT_ROWS[most])
    return kind if columns % gguf.GGML_QUANT_SIZES[kind][0] == 0 else None


def _more_bits(index: int, count: int) -> bool:
    eighth = count // 8
    return index < eighth or index >= 7 * count // 8 or (index - eighth) % 3 == 2


def layout_of(reader: Any) -> Layout:
    """Return what decides a mix for a file."""
    names = [tensor.name for tensor in reader.tensors]

    def of_layers(part: str) -> list[str]:
        found = [(re.match(r"blk\.(\d+)\.", name), name) for name in names if name.endswith(f".{part}.weight")]
        return [name for _, name in sorted((int(match.group(1)), name) for match, name in found if match)]

    field = reader.fields.get(f"{_text(reader, 'general.architecture')}.expert_count")
    return Layout(
        values=of_layers("attn_v"),
        downs=of_layers("ffn_down") + of_layers("ffn_down_exps"),
        has_head="output.weight" in names,
        experts=int(field.contents()) if field else 0,
    )


def _text(reader: Any, name: str) -> str:
    return str(reader.fields[name].contents())


def _copy_fields(reader: Any, writer: Any, file_type: int) -> None:
    """Copy every field of the header but those that the writer makes itself."""
    import gguf

    for name, field in reader.fields.items():
        if name == "general.architecture" or name.startswith("GGUF."):
            continue
        value = file_type if name == "general.file_type" else field.contents()
        kind = field.types[0]
        inside = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, kind, sub_type=inside)
