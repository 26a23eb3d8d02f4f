"""Full fine-tuning: which of a model's own weights are trained, and the files that they are saved in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from byeori.distributed.processes import local, whole
from byeori.errors import ConfigError, ModelError
from byeori.model import load, sharding, skeleton
from byeori.support import layer_ranges


def unfreeze(causal: Any, layers: str | None) -> Any:
    """Let the text decoder's weights be trained, or those of some of its layers; everything else is frozen.

    layers: as layer_ranges.parse reads them. Returns the model.

    Raises:
        ConfigError: if it has no such layers, or holds weights in less than 16 bit.
    """
    causal.requires_grad_(False)
    stack, head = load.parts(causal)
    if layers is None:
        modules = [stack, head.module]
    else:
        every = skeleton.layers_of(causal)
        try:
            modules = [every[number] for number in layer_ranges.parse(layers, len(every))]
        except ValueError as error:
            raise ConfigError(f"--train_layers: {error}") from None
    for module in modules:
        for parameter in module.parameters():
            if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
                raise ConfigError(
                    "--finetune full: the weights of this model are stored quantized and cannot be trained; give the "
                    "model in 16 bit, or leave it out to train an adapter"
                )
            parameter.requires_grad_(True)
    return causal


def is_full(model: Any) -> bool:
    """Return whether a model's own weights are trained, not an adapter's."""
    return not hasattr(model, "peft_config")


def state(model: Any, dtype: torch.dtype, *, keep: bool = True) -> dict[str, torch.Tensor]:
    """Return copies of all weights on the CPU by their names in the model; tied ones are one tensor.

    dtype: that trained weights are saved in. keep: False on a process that only helps to gather sharded weights.
    """
    copies: dict[int, torch.Tensor] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in copies:
            value = whole(tensor.detach())
            value = value.to(dtype) if tensor.requires_grad else value
            copies[id(tensor)] = value.to("cpu", copy=True).contiguous() if keep else value.new_empty(0)
        tensors[name] = copies[id(tensor)]
    return tensors


def write(folder: Path, model: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Write a model's weights as transformers does, in files of at most 5 GB with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    with load.quiet():
        model.save_pretrained(str(folder), state_dict=tensors)


@torch.no_grad()
def load_state(model: Any, folder: Path) -> None:
    """Copy the weights of a folder that `write` filled into the model's.

    Raises:
        ModelError: if they are missing, damaged, or those of another model.
    """
    there = load.load_model(str(folder), dtype=load.compute_dtype(model), device=torch.device("cpu")).state_dict()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if name not in there or there[name].shape != parameter.shape:
                raise ModelError(f"{folder} has no {name} of the shape {list(parameter.shape)}; it is of another model")
            start, end = sharding.rows(parameter)
            local(parameter).copy_(there[name][start:end])
