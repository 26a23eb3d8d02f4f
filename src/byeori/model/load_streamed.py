"""Weights from the files straight to their final form: quantized to 4 or 8 bit, or the rows of one process.

A model is built empty; its layers are quantized or sharded; then one tensor after the other, or this process's rows of
it, is read from the safetensors files. No process ever holds the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from byeori.distributed.processes import Processes, one_at_a_time
from byeori.errors import ConfigError
from byeori.kernels import forest_attention
from byeori.model import load, load_opened, quantize, sharding
from byeori.model.fingerprint import Stored
from byeori.model.opened import Source
from byeori.model.text_model import auto_class

# read(name, start, end): rows [start, end) of a tensor; end None is the whole tensor
Read = Callable[[str, int, int | None], torch.Tensor]


def load_streamed(
    name: str,
    *,
    dtype: torch.dtype,
    processes: Processes,
    bits: int | None = None,
    offload: bool = False,
    train: Callable[[Any], object] | None = None,
    masters: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Return a causal model in evaluation mode, ready for forest attention, quantized and sharded as given.

    bits: 4, 8, or None for weights in `dtype`. offload: this process's shard stays in the CPU's memory.
    train: chooses which weights are trained. masters: these are held in float32, and gathered in `dtype`.

    Raises:
        ModelError, HubError: if there is no model, its files are damaged, or no layer can be quantized.
        ConfigError: if bitsandbytes is not installed, or the weights are quantized already.
    """
    config = load.load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    stored = load_opened.tensors(load.local_folder(name, revision), config)
    causal = _empty(name, config, dtype, trust_remote_code)
    causal.requires_grad_(False)
    if train is not None:
        train(causal)
    if masters:
        causal.byeori_dtype = dtype
        for parameter in filter(lambda p: p.requires_grad, causal.parameters()):
            parameter.data = parameter.data.float()
    if bits:
        quantize.quantize_layers(causal, bits)
    if processes.sharded:
        sharding.shard(causal, processes, offload=offload, dtype=dtype)
    fill = partial(_fill, causal, device=processes.device, offload=offload, dtype=dtype)
    places = _places(causal, {key: item.shape for key, item in stored.items()})
    if None not in places.values():
        fill(places, _reader(stored))
    else:  # names or layouts that transformers converts, with the whole model in memory
        with one_at_a_time(processes):
            whole = load.load_model(
                name,
                dtype=dtype,
                device=torch.device("cpu"),
                revision=revision,
                trust_remote_code=trust_remote_code,
            ).state_dict()
            places = _places(causal, {key: tuple(tensor.shape) for key, tensor in whole.items()})
            fill(places, lambda key, start, end: whole[key] if end is None else whole[key][start:end])
    forest_attention.register()
    return causal.eval()


def before_quantizing(
    name: str, causal: Any, *, revision: str | None = None, trust_remote_code: bool = False
) -> Callable[[str], torch.Tensor]:
    """Return what reads a parameter of a model from its files, as it was before it was quantized.

    Raises:
        ModelError, HubError: if there is no model, or its files are damaged. ConfigError, by what is returned: if the
            files hold the parameter in another form.
    """
    config = load.load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    stored = load_opened.tensors(load.local_folder(name, revision), config)
    read, prefix = _reader(stored), causal.base_model_prefix + "."

    def weight(key: str) -> torch.Tensor:
        names = (key, key.removeprefix(prefix), prefix + key)
        found = next((name for name in names if name in stored), None)
        if found is None:
            raise ConfigError(f"--lora_init loftq: {name} has no tensor {key} to compare; give another --lora_init")
        return read(found, 0, None)

    return weight


def _empty(name: str, config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The model with its parameters on the meta device; buffers are real, since files may lack them."""
    from accelerate import init_empty_weights

    if load_opened.opens(config):
        del config.quantization_config
    if getattr(config, "quantization_config", None):
        raise ConfigError(
            f"the weights of {name} are quantized already; omit --load_in_4bit, --load_in_8bit and --parallel fsdp"
        )
    try:
        with init_empty_weights(include_buffers=False):
            causal = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:  # any model's code
        raise load.explain(error, name, "weights") from None
    causal.tie_weights()  # every parameter was made anew on the meta device
    wide = tuple(getattr(causal, "_keep_in_fp32_modules_strict", None) or ())
    for key, parameter in causal.named_parameters():
        if any(part in key for part in wide):
            parameter.data = parameter.data.float()
    return causal


def _places(causal: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, str | None]:
    """The stored name of every parameter and persistent buffer; None if no tensor of its shape is stored.

    Stored names may have the prefix of the stack of layers or not; tied weights are stored once.
    """
    prefix = causal.base_model_prefix + "."
    places: dict[str, str | None] = {}
    tied: dict[int, str] = {}
    for path, module in causal.named_modules():
        for short, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or short in module._non_persistent_buffers_set:
                continue
            key = f"{path}.{short}" if path else short
            shape = quantize.stored_shape(module, short, tensor)
            names = (key, key.removeprefix(prefix), prefix + key)
            places[key] = next((name for name in names if shapes.get(name) == shape), None)
            if (name := places[key]) is not None:
                tied[id(tensor)] = name
    tensors = causal.state_dict(keep_vars=True)
    return {key: name or tied.get(id(tensors[key])) for key, name in places.items()}


def _reader(stored: Mapping[str, Source]) -> Read:
    from safetensors import safe_open

    files = {
        path: safe_open(str(path), framework="pt")
        for path in {item.path for item in stored.values() if isinstance(item, Stored)}
    }

    def read(key: str, start: int, end: int | None) -> torch.Tensor:
        source = stored[key]
        if not isinstance(source, Stored):
            return source.load()[start:end]
        file = files[source.path]
        tensor: torch.Tensor = file.get_tensor(key) if end is None else file.get_slice(key)[start:end]
        return tensor

    return read


def _fill(
    causal: Any, places: dict[str, str | None], read: Read, *, device: torch.device, offload: bool, dtype: torch.dtype
) -> None:
    """Replace every empty parameter, and every buffer, by the real one."""
    made: dict[int, tuple[torch.Tensor, torch.nn.Parameter]] = {}  # holds the old one too, so that its id is not reused
    for path, module in causal.named_modules():
        for short, old in module._parameters.items():
            name = places.get(f"{path}.{short}" if path else short)
            if old is None or name is None:
                continue
            if id(old) not in made:
                rows = sharding.shard_of(old, _rows(module, short, old, name, read, device, dtype), offload=offload)
                made[id(old)] = old, torch.nn.Parameter(rows, requires_grad=old.requires_grad)
            module._parameters[short] = made[id(old)][1]
        for short, buffer in module._buffers.items():
            name = places.get(f"{path}.{short}" if path else short)
            if buffer is not None:
                module._buffers[short] = (buffer if name is None else read(name, 0, None).to(buffer.dtype)).to(device)


def _rows(
    module: Any, short: str, old: torch.Tensor, name: str, read: Read, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """This process's rows of a parameter. Quantizing needs the whole of it for a moment."""
    start, end = sharding.rows(old)
    if (held := quantize.holder(module, short)) is not None:
        quantized = held.quantize(read(name, 0, None).to(device, held.compute_dtype))
        return quantized if end is None else quantized[start:end].clone()
    mine = read(name, start, end).to(device)
    return (mine.to(dtype) if old.requires_grad else mine).to(old.dtype)  # masters begin as the weights they stand for
