"""Adapters that start from the base's own weights: PiSSA (arXiv:2404.02948), OLoRA (arXiv:2406.01775), MiCA, LoftQ
(arXiv:2310.08659), or from what rows give its layers: EVA (arXiv:2410.07170).

PiSSA and OLoRA take the start B0 A0 of an adapter out of the base, which is then another base that servers do not have,
and which the type of the weights rounds. Here the base stays as it is, and the start is subtracted beside it:

    y = x W^T + s x (B A - B0 A0)^T = x W^T + s x ([B, -B0] [A; A0])^T

A and B are trained, A0 and B0 are not. What is saved is [A; A0] and [B, -B0], the plain LoRA of twice the rank that
PEFT's conversion gives (`path_initial_model_for_weight_conversion`). The matrices A0 and B0 are PEFT's own.

LoftQ's start makes up for what quantizing loses, W - Q. It stays in the model that is trained, Q + s B A, and is left
out of what is saved, which belongs to W: W + s (B A - B0 A0).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.utils import parametrize

from byeori.data.tokenize import Example
from byeori.errors import ConfigError
from byeori.kernels.quantized_linear import QuantizedLinear

_OWN, _START = "parametrizations.weight.original", "parametrizations.weight.0.start"
_MOST_KEPT, _MOST_BATCHES = 16, 1000  # batches of EVA, which goes over them until its vectors stay

Batch = Mapping[str, torch.Tensor]


class _Beside(torch.nn.Module):
    """A weight's trained part, and behind it the start that is not trained: dim 0 of A, dim 1 of B."""

    start: torch.Tensor

    def __init__(self, start: torch.Tensor, dim: int) -> None:
        super().__init__()
        self.register_buffer("start", start)
        self.dim = dim

    def forward(self, own: torch.Tensor) -> torch.Tensor:
        return torch.cat([own, self.start.to(own.dtype)], dim=self.dim)


class _Remembered(_Beside):
    """The trained part alone; the start is only saved."""

    def forward(self, own: torch.Tensor) -> torch.Tensor:
        return own


def begin(
    model: Any,
    init: str,
    use_dora: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    batches: Sequence[Batch] = (),
    stored: Callable[[str], torch.Tensor] | None = None,
) -> None:
    """Give a new adapter the start that depends on the base's weights; on the meta device only its shape.

    init: default, gaussian and orthogonal depend on none. use_dora: the lengths of rows of weights that PEFT cannot
    read, quantized or sharded, are computed here. batches: EVA's, [rows, tokens] each of input_ids, attention_mask and
    labels; without any the adapter starts as it is. stored: a parameter of the base by its name, before it was
    quantized; LoftQ's.

    Raises:
        ConfigError: if a layer is too small for the rank, or EVA's vectors keep changing.
    """
    takes_out, mica = init.startswith("pissa") or init == "olora", init == "mica"
    if init == "loftq":
        _begin_loftq(model, stored, on_progress)
    if init == "eva" and batches:
        _begin_eva(model, batches)
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
            _keep_start(layer, _Beside)
            layer.r[layer.active_adapters[0]] *= 2
        on_progress(done + 1, len(layers))
    if takes_out:
        _record_twice(next(iter(model.peft_config.values())), model, layers)
    if mica:
        next(iter(model.peft_config.values())).init_lora_weights = "mica"


def _begin_loftq(
    model: Any, stored: Callable[[str], torch.Tensor] | None, on_progress: Callable[[int, int], None]
) -> None:
    """B A is the best approximation of W - Q of its rank, whatever the scale."""
    found = adapted_layers(model).items()
    layers = {name: layer for name, layer in found if isinstance(layer.base_layer, QuantizedLinear)}
    for done, (name, layer) in enumerate(layers.items()):
        a, b = _adapter(layer)
        _check_rank(layer, "loftq", name)
        if stored is not None and not a.weight.is_meta:
            with _whole(layer):
                held = layer.base_layer.weight
            lost = stored(f"{name}.weight").to(held.device, torch.float32) - held
            u, s, v = torch.linalg.svd(lost, full_matrices=False)
            root = s[: len(a.weight)].sqrt()
            a.weight.data.copy_(root[:, None] * v[: len(root)])
            b.weight.data.copy_(u[:, : len(root)] * root / layer.scaling[layer.active_adapters[0]])
        _keep_start(layer, _Remembered)
        on_progress(done + 1, len(layers))
    _record_twice(next(iter(model.peft_config.values())), model, layers)


@torch.no_grad()
def _begin_eva(model: Any, batches: Sequence[Batch]) -> None:
    """A's rows are the main directions of what a layer gets at trained tokens, by PEFT's own code; ranks stay."""
    from peft import EvaConfig, get_eva_state_dict

    config = next(iter(model.peft_config.values()))
    config.eva_config = EvaConfig(rho=1.0)
    try:
        found = get_eva_state_dict(
            model,
            _UntilItStays(batches),
            forward_fn=lambda model, inputs: model(  # without labels, whose loss is not needed
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
            ),
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )
    finally:
        config.eva_config = None
    for name, layer in adapted_layers(model).items():
        if (vectors := found.get(f"base_model.model.{name}")) is not None:
            _adapter(layer)[0].weight.copy_(vectors)


def batches(rows: Iterator[Example], *, rank: int, device: torch.device) -> list[Batch]:
    """Return at most 16 batches for EVA, each of as many rows as have four trained tokens per rank.

    Raises:
        ConfigError: if all rows together have fewer trained tokens than the rank.
    """
    made, group = list[list[Example]](), list[Example]()
    for row in rows:
        group.append(row)
        if sum(each.target_count for each in group) >= 4 * rank:
            made, group = [*made, group], []
        if len(made) == _MOST_KEPT:
            break
    made = made or ([group] if sum(each.target_count for each in group) >= rank else [])
    if not made:
        raise ConfigError(
            f"--lora_init eva: the rows have fewer trained tokens than the rank {rank}; give a smaller one"
        )
    return [_batch(group, device) for group in made]


def _batch(rows: list[Example], device: torch.device) -> Batch:
    longest = max(len(row.token_ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for place, row in enumerate(rows):
        ids[place, : len(row.token_ids)], mask[place, : len(row.token_ids)] = torch.tensor(row.token_ids), 1
        for start, end in row.targets:
            labels[place, start:end] = ids[place, start:end]
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


class _UntilItStays:
    """The batches over and over; PEFT's loop has no end of its own."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches, self.given = batches, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            if self.given == _MOST_BATCHES:
                raise ConfigError(
                    f"--lora_init eva: the main directions still change after {_MOST_BATCHES} batches; give a smaller "
                    "--lora_r or another --lora_init"
                )
            self.given += 1
            yield batch


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


def _check_rank(layer: Any, init: str, name: str) -> None:
    rank, most = layer.r[layer.active_adapters[0]], min(layer.in_features, layer.out_features)
    if rank > most:
        raise ConfigError(
            f"--lora_init {init} starts {name} from {most} singular vectors, fewer than the rank {rank}; give --lora_r "
            f"or its --rank_pattern {most} or less"
        )


def _first_values(layer: Any, init: str, name: str) -> None:
    adapter = layer.active_adapters[0]
    _check_rank(layer, init, name)
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


def _keep_start(layer: Any, kind: type[_Beside]) -> None:
    """Put the first A and B behind the ones that are trained, where they are subtracted."""
    a, b = _adapter(layer)
    for module, dim, sign in ((a, 0, 1), (b, 1, -1)):
        start = kind(module.weight.detach() * sign, dim)
        parametrize.register_parametrization(module, "weight", start, unsafe=True)


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
