"""Adapters that start from the base's own weights: PiSSA (arXiv:2404.02948), OLoRA (arXiv:2406.01775), MiCA.

PiSSA and OLoRA take the start B0 A0 of an adapter out of the base, which is then another base that servers do not have,
and which the type of the weights rounds. Here the base stays as it is, and the start is subtracted beside it:

    y = x W^T + s x (B A - B0 A0)^T = x W^T + s x ([B, -B0] [A; A0])^T

A and B are trained, A0 and B0 are not. What is saved is [A; A0] and [B, -B0], the plain LoRA of twice the rank that
PEFT's conversion gives (`path_initial_model_for_weight_conversion`). The matrices A0 and B0 are PEFT's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.utils import parametrize

from byeori.errors import ConfigError
from byeori.kernels.quantized_linear import QuantizedLinear

_OWN, _START = "parametrizations.weight.original", "parametrizations.weight.0.start"


class _Beside(torch.nn.Module):
    """A weight's trained part, and behind it the start that is not trained: dim 0 of A, dim 1 of B."""

    start: torch.Tensor

    def __init__(self, start: torch.Tensor, dim: int) -> None:
        super().__init__()
        self.register_buffer("start", start)
        self.dim = dim

    def forward(self, own: torch.Tensor) -> torch.Tensor:
        return torch.cat([own, self.start.to(own.dtype)], dim=self.dim)


def begin(
    model: Any, init: str, use_dora: bool = False, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Give a new adapter the start that depends on the base's weights; on the meta device only its shape.

    init: default, gaussian and orthogonal depend on none. use_dora: the lengths of rows of weights that PEFT cannot
    read, quantized or sharded, are computed here.

    Raises:
        ConfigError: if a layer is too small for the rank.
    """
    takes_out, mica = init.startswith("pissa") or init == "olora", init == "mica"
    layers = {name: layer for name, layer in adapted_layers(model).items() if "Linear" in type(layer).__name__}
    for done, (name, layer) in enumerate(layers.items()):
        unread = use_dora and (isinstance(layer.base_layer, QuantizedLinear) or _is_sharded(layer.base_layer.weight))
        if takes_out or mica or unread:
            with _whole(layer):
                if takes_out or mica:
                    _first_values(layer, init, name)
                if unread:
                    _lengths(layer)
        if takes_out:
            _widen(layer)
        on_progress(done + 1, len(layers))
    if takes_out:
        _record_twice(next(iter(model.peft_config.values())), model, layers)
    if mica:
        next(iter(model.peft_config.values())).init_lora_weights = "mica"


def adapted_layers(model: Any) -> dict[str, Any]:
    """Return the layers that have an adapter of A and B, by their names in the base model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = model.get_base_model().named_modules()
    return {name: layer for name, layer in found if isinstance(layer, BaseTunerLayer) and hasattr(layer, "lora_A")}


@contextmanager
def readable(model: Any, use_dora: bool) -> Iterator[None]:
    """Let PEFT read the shapes of quantized weights inside, which it does for DoRA; `begin` computes the lengths."""
    layers = [module for module in model.modules() if use_dora and isinstance(module, QuantizedLinear)]
    kept = [layer._parameters["weight"] for layer in layers]
    for layer, weight in zip(layers, kept, strict=True):
        blank = torch.ones(1, device=weight.device).expand(layer.out_features, layer.in_features)
        layer._parameters["weight"] = torch.nn.Parameter(blank, requires_grad=False)
    try:
        yield
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            layer._parameters["weight"] = weight


@contextmanager
def _whole(layer: Any) -> Iterator[None]:
    """Give a layer its whole weight in float32 inside, whatever holds it; changes of it are forgotten."""
    base = layer.base_layer
    weight = base.weight.to(_adapter(layer)[0].weight.device)
    if _is_sharded(weight):
        weight = weight.full_tensor()
    if isinstance(base, QuantizedLinear):
        weight = base.dequantize(weight)
    layer.base_layer = torch.nn.Module()
    layer.base_layer.weight = torch.nn.Parameter(weight.detach().to(torch.float32, copy=True), requires_grad=False)
    try:
        yield
    finally:
        layer.base_layer = base


def _is_sharded(weight: torch.Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(weight, DTensor)


def _adapter(layer: Any) -> tuple[Any, Any]:
    """The modules of A and B."""
    name = layer.active_adapters[0]
    return layer.lora_A[name], layer.lora_B[name]


def _first_values(layer: Any, init: str, name: str) -> None:
    adapter = layer.active_adapters[0]
    rank, most = layer.r[adapter], min(layer.in_features, layer.out_features)
    if rank > most:
        raise ConfigError(
            f"--lora_init {init} starts {name} from {most} singular vectors, fewer than the rank {rank}; give --lora_r "
            f"or its --rank_pattern {most} or less"
        )
    if _adapter(layer)[0].weight.is_meta:
        return
    if init == "olora":
        layer.olora_init(adapter)
    elif init == "mica":
        layer.mica_init(adapter)
        layer.frozen_peft_weight_names = {adapter: ("lora_B",)}
        layer.set_adapter([adapter])
    else:
        layer.pissa_init(adapter, init)


def _lengths(layer: Any) -> None:
    """DoRA's m: the length of every row of W + s B A."""
    adapter = layer.active_adapters[0]
    a, b = (part.weight for part in _adapter(layer))
    if not a.is_meta:
        layer.lora_magnitude_vector[adapter].update_layer(
            base_layer=layer.base_layer, lora_A=a, lora_B=b, scaling=layer.scaling[adapter]
        )


def _widen(layer: Any) -> None:
    """Put the first A and B behind the ones that are trained, where they are subtracted."""
    a, b = _adapter(layer)
    for module, dim, sign in ((a, 0, 1), (b, 1, -1)):
        start = _Beside(module.weight.detach() * sign, dim)
        parametrize.register_parametrization(module, "weight", start, unsafe=True)
    layer.r[layer.active_adapters[0]] *= 2


def _record_twice(config: Any, model: Any, widened: dict[str, Any]) -> None:
    """Write the rank and the scale of what is saved into the adapter's configuration; s stays."""
    kept = {name: layer for name, layer in adapted_layers(model).items() if name not in widened}
    scale = 2**0.5 if config.use_rslora else 2
    ranks = {name: layer.r[layer.active_adapters[0]] for name, layer in kept.items()}
    alphas = {name: layer.lora_alpha[layer.active_adapters[0]] for name, layer in kept.items()}
    config.r, config.lora_alpha = 2 * config.r, whole_number(scale * config.lora_alpha)
    config.rank_pattern = ranks | {name: 2 * rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = alphas | {name: whole_number(scale * alpha) for name, alpha in config.alpha_pattern.items()}


def whole_number(value: float) -> float | int:
    """Return it as an int if it is whole: servers expect that of lora_alpha."""
    return int(value) if float(value).is_integer() else value


def tensors(model: Any) -> list[torch.Tensor]:
    """Return all tensors of the adapter, trained or not."""
    return [tensor for name, tensor in model.state_dict().items() if "lora_" in name]


# ---- the names of what is saved -------------------------------------------------------------------------------------


def joined(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a model's state with A and B as they compute: the trained part and the start in one matrix."""
    out = {}
    for name, tensor in state.items():
        module = name.removesuffix(_OWN)
        if module != name:
            out[f"{module}weight"] = torch.cat([tensor, state[module + _START].to(tensor.dtype)], dim=_dim(name))
        elif not name.endswith(_START):
            out[name] = tensor
    return out


def split(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors, named as in its file; those with a start under their names in this model."""
    if not any(name.endswith(_OWN) for name, _ in model.named_parameters()):
        return tensors
    out, adapter = {}, next(iter(model.peft_config))
    for name, tensor in tensors.items():
        module = name.removesuffix("weight")
        if module.endswith((".lora_A.", ".lora_B.")):
            half, dim = tensor.shape[_dim(name)] // 2, _dim(name)
            parts = tensor.split([half, tensor.shape[dim] - half], dim)
            out[f"{module}{adapter}.{_OWN}"], out[f"{module}{adapter}.{_START}"] = parts
        else:
            out[name] = tensor
    return out


def _dim(name: str) -> int:
    return 0 if ".lora_A." in name else 1
