"""Weights from the files straight to where they stay: packed to 4 or 8 bit, or the rows of one process.

A model is first built empty; its layers are packed or sharded; then one tensor after the other, or this process's rows
of it, is read from the safetensors files. No process ever holds the whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from byeori.distributed.processes import Processes, one_at_a_time
from byeori.errors import ConfigError
from byeori.kernels import bf16_matmul, forest_attention
from byeori.kernels.quantized_linear import QuantizedLinear
from byeori.model import fingerprint, load, quantize, sharding

# read(name, start, end): rows [start, end) of a tensor; end None is the whole tensor
Read = Callable[[str, int, int | None], torch.Tensor]


def load_streamed(
    name: str,
    *,
    dtype: torch.dtype,
    processes: Processes,
    bits: int | None = None,
    offload: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """A causal model in evaluation mode, ready for forest attention, packed and sharded as asked for.

    bits: 4, 8, or None to leave the weights as they are. offload: this process's shard stays in the CPU's memory.

    Raises:
        ModelError, HubError: no model there, damaged files, or nothing in it to pack.
        ConfigError: bitsandbytes is not installed, or the weights are quantised already.
    """
    causal = _empty(name, dtype, revision, trust_remote_code)
    if bits:
        quantize.pack_layers(causal, bits)
    if processes.sharded:
        sharding.shard(causal, processes, offload=offload)
    place = partial(_fill, causal, device=processes.device, offload=offload)
    stored = fingerprint.stored_tensors(load.local_folder(name, revision))
    places = _places(causal, {key: item.shape for key, item in stored.items()})
    if None not in places.values():
        place(places, _reader(stored))
    else:  # other names or layouts than the model's: transformers converts them, with the whole model in memory
        with one_at_a_time(processes):
            whole = load.load_model(
                name,
                dtype=dtype,
                device=torch.device("cpu"),
                revision=revision,
                trust_remote_code=trust_remote_code,
            ).state_dict()
            places = _places(causal, {key: tuple(tensor.shape) for key, tensor in whole.items()})
            place(places, lambda key, start, end: whole[key] if end is None else whole[key][start:end])
    forest_attention.register()
    bf16_matmul.prepare(dtype, processes.device)
    return causal.eval()


def _empty(name: str, dtype: torch.dtype, revision: str | None, trust_remote_code: bool) -> Any:
    """The model with its parameters on the meta device; buffers, which no file may hold, are real."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = load.load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None):
        raise ConfigError(
            f"the weights of {name} are quantised already; leave --load_in_4bit, --load_in_8bit and --parallel fsdp out"
        )
    try:
        with init_empty_weights(include_buffers=False):
            causal = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:  # as many kinds as there are models
        raise load.explain(error, name, "weights") from None
    causal.tie_weights()  # every parameter was made anew on the meta device
    wide = tuple(getattr(causal, "_keep_in_fp32_modules_strict", None) or ())
    for key, parameter in causal.named_parameters():
        if any(part in key for part in wide):
            parameter.data = parameter.data.float()
    return causal


def _places(causal: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, str | None]:
    """The stored name of every parameter and persistent buffer; None where no tensor of its shape is there.

    A model's files may lack or have the prefix of its stack of layers; tied weights are stored once.
    """
    prefix = causal.base_model_prefix + "."
    found: dict[str, str | None] = {}
    tied: dict[int, str] = {}
    for path, module in causal.named_modules():
        for short, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or short in module._non_persistent_buffers_set:
                continue
            key = f"{path}.{short}" if path else short
            packed = isinstance(module, QuantizedLinear) and short == "weight"
            shape = (module.out_features, module.in_features) if packed else tuple(tensor.shape)
            names = (key, key.removeprefix(prefix), prefix + key)
            found[key] = next((name for name in names if shapes.get(name) == shape), None)
            if (name := found[key]) is not None:
                tied[id(tensor)] = name
    tensors = causal.state_dict(keep_vars=True)
    return {key: name or tied.get(id(tensors[key])) for key, name in found.items()}


def _reader(stored: dict[str, fingerprint.Stored]) -> Read:
    from safetensors import safe_open

    files = {path: safe_open(str(path), framework="pt") for path in {item.path for item in stored.values()}}

    def read(key: str, start: int, end: int | None) -> torch.Tensor:
        file = files[stored[key].path]
        tensor: torch.Tensor = file.get_tensor(key) if end is None else file.get_slice(key)[start:end]
        return tensor

    return read


def _fill(causal: Any, places: dict[str, str | None], read: Read, *, device: torch.device, offload: bool) -> None:
    """Replace every empty parameter, and every buffer, by the real one."""
    made: dict[int, tuple[torch.Tensor, torch.nn.Parameter]] = {}  # the old one is kept so that its id stays its own
    for path, module in causal.named_modules():
        for short, old in module._parameters.items():
            name = places.get(f"{path}.{short}" if path else short)
            if old is None or name is None:
                continue
            if id(old) not in made:
                rows = sharding.shard_of(old, _rows(module, old, name, read, device), offload=offload)
                made[id(old)] = old, torch.nn.Parameter(rows, requires_grad=False)
            module._parameters[short] = made[id(old)][1]
        for short, buffer in module._buffers.items():
            name = places.get(f"{path}.{short}" if path else short)
            if buffer is not None:
                module._buffers[short] = (buffer if name is None else read(name, 0, None).to(buffer.dtype)).to(device)


def _rows(module: Any, old: torch.Tensor, name: str, read: Read, device: torch.device) -> torch.Tensor:
    """What this process keeps of a parameter. Packing needs the whole of it, for a moment."""
    start, end = sharding.rows(old)
    if isinstance(module, QuantizedLinear) and old is module.weight:
        packed = module.pack(read(name, 0, None).to(device, module.opened_dtype))
        return packed if end is None else packed[start:end].clone()
    return read(name, start, end).to(device, old.dtype)
