"""Which weights are quantized to 4 or 8 bit, and what takes their place (kernels/quantized_linear.py, _experts.py)."""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections.abc import Callable
from typing import Any

import torch

from byeori.errors import ConfigError
from byeori.kernels import quantized_experts
from byeori.kernels.quantized_linear import QuantizedLinear
from byeori.kernels.quantized_weight import QuantizedWeight
from byeori.model import experts

BITSANDBYTES = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")
"""Methods of checkpoints whose layers are bitsandbytes' own, which train as they are."""


def check_installed(flag: str) -> None:
    """Import bitsandbytes, without the warnings of kernels that nothing here uses.

    Raises:
        ConfigError: if bitsandbytes, which the flag needs, is not installed.
    """
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ConfigError(f"{flag} needs bitsandbytes; pip install '.[quant]' in byeori's checkout") from None
    finally:
        logger.setLevel(level)


def stored(config: Any) -> tuple[str, int] | None:
    """Return how a model's files hold its weights, and in how many bits training does; None if not quantized.

    16 bits for all but bitsandbytes' own checkpoints: other weights are opened when they are loaded (load_opened.py).
    """
    found = getattr(config, "quantization_config", None)
    if not found:
        return None
    values: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    method = str(values.get("quant_method") or "unknown").split(".")[-1].lower()
    if method in BITSANDBYTES:
        return method, 8 if values.get("load_in_8bit") else 4
    return method, 16


def plain_layers(causal: Any) -> list[tuple[Any, str, torch.nn.Linear]]:
    """Return every plain linear layer but the head and those whose weight other code reads: (parent, name, layer).

    Its type as well: code that turns its input into that of the weight would make bytes of it.
    """
    head = causal.get_output_embeddings()
    return [
        (parent, name, child)
        for parent in causal.modules()
        for name, child in parent.named_children()
        if type(child) is torch.nn.Linear and child is not head and not reads_weight(parent, name, "device|shape")
    ]


def reads_weight(parent: Any, name: str, harmless: str = "dtype|device|shape") -> bool:
    """Return whether a module's code computes with the weight of a layer inside it, past the layer's own forward.

    harmless: what it may read of the weight.
    """
    return re.search(rf"\bself\.{name}\.weight(?!\.({harmless})\b)", _source(parent.__class__)) is not None


@functools.cache
def _source(kind: Any) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # made at run time
        return ""


def has_layers(causal: Any) -> bool:
    """Return whether a model has weights that can be quantized."""
    return bool(plain_layers(causal) or experts.stacks(causal))


def refuse_without_layers(causal: Any, bits: int) -> None:
    """Raise unless the model has a layer that can be quantized.

    Raises:
        ConfigError: if it has none.
    """
    if not has_layers(causal):
        raise ConfigError(f"{type(causal).__name__} has no plain linear layers to quantize; omit --load_in_{bits}bit")


def quantize_layers(causal: Any, bits: int) -> None:
    """Replace every plain linear layer by an empty QuantizedLinear, and the weights of experts by empty codes.

    Raises:
        ConfigError: if the model has none of them, or bitsandbytes is not installed.
    """
    check_installed(f"--load_in_{bits}bit")
    refuse_without_layers(causal, bits)
    replace_layers(causal, bits, QuantizedLinear, QuantizedWeight)


def quantize_loaded(causal: Any, bits: int) -> None:
    """Quantize a model that has its weights.

    Raises:
        ConfigError: as `quantize_layers`.
    """
    weights = dict(causal.named_parameters())
    quantize_layers(causal, bits)
    for path, module in causal.named_modules():
        for name in list(module._parameters):
            if (held := holder(module, name)) is not None:
                codes = held.quantize(weights[f"{path}.{name}"].detach())
                module._parameters[name] = torch.nn.Parameter(codes, requires_grad=False)


def replace_layers(
    causal: Any,
    bits: int,
    linear: Callable[[torch.nn.Linear, int], torch.nn.Module],
    weight: Callable[[tuple[int, int, int], int, torch.dtype], QuantizedWeight],
) -> None:
    """Put codes in place of the weights. linear, weight: make what holds a layer, and the experts of one."""
    for parent, name, child in plain_layers(causal):
        setattr(parent, name, linear(child, bits))
    for _, module, name, parameter in experts.stacks(causal):
        quantized_experts.hold(module, name, weight(tuple(parameter.shape), bits, parameter.dtype))


def holder(module: Any, name: str) -> QuantizedWeight | None:
    """Return what quantizes and opens a parameter of a module, None if it is not quantized."""
    if isinstance(module, QuantizedLinear):
        return module if name == "weight" else None
    return quantized_experts.scales_of(module, name)


def stored_shape(module: Any, name: str, parameter: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of a parameter as it was before it was quantized."""
    held = holder(module, name)
    if held is None:
        return tuple(parameter.shape)
    return held.sizes[isinstance(module, QuantizedLinear) :]
