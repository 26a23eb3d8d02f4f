"""What wraps a model's layers: activation checkpointing and torch.compile."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from byeori.kernels import forest_attention
from byeori.model import activation_offload

# Seconds. Compiling takes about 30 s and saves about a fifth, so shorter runs would take longer.
_COMPILE_PAYS_AFTER = 300.0

# FLOP/s that a run is assumed to reach, only to decide whether compiling pays.
_ASSUMED_SPEED = {"cpu": 3e11, "cuda": 2e14}


def recompute_layers(causal: Any, kind: str, link: activation_offload.Link | None = None) -> None:
    """Turn on activation checkpointing (Chen et al., arXiv:1604.06174): layers save only their inputs and run twice.

    kind: none; full; selective, every other layer, so half of the work for half of the memory; or offload, full with
    the saved inputs in the CPU's memory. link: how they are copied there. It replaces what was turned on before.
    """
    activation_offload.stop(causal.base_model)
    if kind == "none":
        causal.gradient_checkpointing_disable()
        return
    causal.gradient_checkpointing_enable(_checkpoints())
    causal.disable_input_require_grads()  # re-entrant checkpoints need it; here it would only extend the backward pass
    if kind == "selective":
        for layer in layers(causal)[1::2]:
            layer.gradient_checkpointing = False
    if kind == "offload":
        activation_offload.offload(causal.base_model, link)


@contextmanager
def recomputed(causal: Any) -> Iterator[None]:
    """Recompute every layer inside, where the model's code can: of all layers only their inputs are kept at once."""
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    modules = [module for module in causal.modules() if hasattr(module, names[0])]
    before = [{name: module.__dict__[name] for name in names if name in module.__dict__} for module in modules]
    if getattr(causal, "supports_gradient_checkpointing", False):
        causal.gradient_checkpointing_enable(_checkpoints())
    try:
        yield
    finally:
        for module, values in zip(modules, before, strict=True):
            for name in names:
                module.__dict__.pop(name, None)
            module.__dict__.update(values)


def _checkpoints() -> dict[str, Any]:
    return {"use_reentrant": False, "context_fn": forest_attention.recompute_contexts}


def compiling_pays(model: torch.nn.Module, tokens: int, device: torch.device) -> bool:
    """Return whether `--compile auto` compiles: there is a compiler, and the run is long enough.

    tokens: of the whole run on this process; a LoRA step takes about 4 FLOP per weight and token.
    """
    if device.type == "cpu" and not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        return False
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    weights = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in tables)
    return 4.0 * weights * tokens / _ASSUMED_SPEED[device.type] > _COMPILE_PAYS_AFTER


def compile_layers(causal: Any) -> int:
    """Compile the decoder's layers, each kind once and for every length; return how many layers there are."""
    compiled = layers(causal)
    for layer in compiled:
        layer.compile(dynamic=True)
    return len(compiled)


def layers(causal: Any) -> list[Any]:
    """Return the decoder's layers; sharding makes their class a subclass."""
    kinds = set(getattr(causal, "_no_split_modules", None) or ())
    return [module for module in causal.modules() if kinds & {kind.__name__ for kind in type(module).__mro__}]


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled layers uncompiled inside, for evaluation, which would compile them once more."""
    with torch.compiler.set_stance("force_eager"):
        yield
