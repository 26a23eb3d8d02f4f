"""Which accelerations a model gets: they change a step's time, and its result only by rounding.

attention: the CPU's own (cpu_attention.py). kernels: C on a CPU that has a compiler (native.py), Triton on a GPU
(triton_kernels.py). norms, mlp, heads: fused functions (rms_norm.py, gated_mlp.py, qkv_rope.py). last_layer: only the
rows that predict something; needs heads. rare_words: in bfloat16 on a CPU, gradients leave them out (lm_head.py, which
says how far that is from rounding).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from byeori.kernels import (
    bf16_matmul,
    cuda_attention,
    cuda_calls,
    device_kind,
    dispatch,
    gated_mlp,
    grouped_experts,
    last_layer,
    lora_linear,
    native,
    qkv_rope,
    rms_norm,
    switches,
)
from byeori.kernels.quantized_linear import QuantizedLinear

PARTS = ("attention", "kernels", "norms", "mlp", "heads", "last_layer", "rare_words")
_CPU_ONLY = ("attention", "rare_words")
_FORWARDS = {
    "norms": rms_norm.fused_forward,
    "mlp": gated_mlp.fused_forward,
    "heads": qkv_rope.fused_forward,
    "last_layer": last_layer.fused_forward,
    "lora": lora_linear.fused_forward,
    "experts": grouped_experts.fused_forward,
}
_HEADS = "byeori_attention"  # by which the last layer knows that its heads are fused
_KERNEL = "kernels."  # before the name of one that is given up alone
_COMPILED = "_compiled_call_impl"  # of torch.nn.Module
# Without Triton the other functions move three times as much memory on a GPU as the models' own code.
_WITHOUT_TRITON = ["norms"]


def parts(wanted: list[str], device: torch.device) -> list[str]:
    """Return the accelerations that a --speed setting means on a device."""
    if wanted == ["off"]:
        return []
    if wanted == ["auto"]:
        if device.type == "cuda" and torch.cuda.is_available() and not dispatch.has_triton():
            return list(_WITHOUT_TRITON)
        return [part for part in PARTS if device.type == "cpu" or part not in _CPU_ONLY]
    return list(wanted)


def fuse(model: Any, chosen: list[str]) -> int:
    """Give a model these accelerations; return how many attention and feed-forward modules were fused.

    Attention with dropout on its weights runs its own code while it trains.
    """
    model.byeori_switches = switches.Switches(
        attention="attention" in chosen, kernels="kernels" in chosen, rare_words="rare_words" in chosen
    )
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # modules are compared with their fused forms, so nothing may be dropped
    # by PyTorch's own operations: a kernel that fails on this machine must not end a comparison of formulas
    with switches.using(switches.Switches(attention=False, kernels=False, rare_words=False, flash=False)):
        if "norms" in chosen:
            rms_norm.fuse_norms(model)
        count = gated_mlp.fuse_mlps(model) if "mlp" in chosen else 0
        count += qkv_rope.fuse_attention(model) if "heads" in chosen else 0
        if "last_layer" in chosen:
            last_layer.prune(model)
    for module, training in modes:
        module.training = training
    return count


def in_use(model: Any) -> list[str]:
    """Return the accelerations that a model has now: PARTS, and those that others gave it.

    lora: lora_linear.py. flash: a GPU's attention. quantized: bitsandbytes. offload: activation_offload.py. compile.
    """
    own, kind, modules = _switches(model), device_kind.kind(next(model.parameters())), list(model.modules())
    there = {
        "kernels": True,
        **dict.fromkeys(_CPU_ONLY, kind == "cpu"),
        "flash": kind == "cuda",
        "quantized": any(type(module) is QuantizedLinear for module in modules),
        "offload": kind == "cuda" and any("byeori_offload" in module.__dict__ for module in modules),
    }
    on = [name for name, is_there in there.items() if is_there and getattr(own, name)]
    bound = {getattr(module.__dict__.get("forward"), "__func__", None) for module in modules}
    compiled = ["compile"] if any(module.__dict__.get(_COMPILED) for module in modules) else []
    return on + [part for part, forward in _FORWARDS.items() if forward in bound] + compiled


@contextmanager
def without(model: Any, parts: Collection[str]) -> Iterator[None]:
    """Run a model without some accelerations inside: modules run their own code again."""
    before = _switches(model)
    removed = drop(model, parts)
    try:
        yield
    finally:
        model.byeori_switches = before
        for module, taken in removed:
            module.__dict__.update(taken)


def drop(model: Any, parts: Collection[str]) -> list[tuple[Any, dict[str, Any]]]:
    """Give up some accelerations for good, or single kernels (`kernels.norm`).

    Returns the modules that run their own code, and what they ran before.
    """
    removed, given_up = [], {*parts, *(["last_layer"] if "heads" in parts else [])}  # which needs the heads
    forwards = {forward for part, forward in _FORWARDS.items() if part in given_up}
    for module in model.modules():
        names = ["forward", _HEADS] if getattr(module.__dict__.get("forward"), "__func__", None) in forwards else []
        names += [_COMPILED] if "compile" in given_up else []
        if taken := {name: module.__dict__.pop(name) for name in names if name in module.__dict__}:
            removed.append((module, taken))
    own = _switches(model)
    kernels = own.without | {part.removeprefix(_KERNEL) for part in parts if part.startswith(_KERNEL)}
    off = {name: False for name in given_up if hasattr(own, name)}
    model.byeori_switches = replace(own, without=kernels, **off)
    return removed


def _switches(model: Any) -> switches.Switches:
    return getattr(model, "byeori_switches", None) or switches.Switches()


@contextmanager
def active(model: Any, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Run a model with its own accelerations inside: its forward pass together with its backward pass.

    dtype, device: what it computes in, and where.
    """
    with switches.using(_switches(model)), bf16_matmul.prepared(dtype, device):
        yield


def notes(model: Any, chosen: list[str], dtype: torch.dtype, device: torch.device) -> list[str]:
    """Return a sentence for each acceleration in `chosen` that cannot be used here, and why."""
    found = []
    if device.type == "cpu":
        if "kernels" in chosen and (problem := native.problem()):
            found.append(f"The C kernels are off: {problem}. PyTorch's own operations are used, which are slower")
        if bf16_matmul.needed(dtype, device):
            found.append("This processor has no bfloat16 instructions: products are computed in float32")
    elif device.type == "cuda":
        if chosen and not dispatch.has_triton():
            found.append("The fused GPU kernels are off: Triton is not installed; pip install triton")
        if not cuda_attention.ampere(device):
            found.append("Flash attention is off: it needs an Ampere GPU or newer; PyTorch's attention is used")
        if why := cuda_calls.pinning_problem():
            found.append(f"Copies from pinned memory are off: they fail here ({why}). Each step waits for its copies")
    if "heads" in chosen and (unknown := qkv_rope.unknown(model)):
        found.append(f"{', '.join(unknown)} has no fused form and runs its own code, which is slower")
    return found
