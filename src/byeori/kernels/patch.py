"""Which accelerations a model gets: they change a step's time, and its result only by rounding.

attention: the CPU's own (cpu_attention.py). kernels: C on a CPU that has a compiler (native.py), Triton on a GPU
(triton_kernels.py). norms, mlp, heads: fused functions (rms_norm.py, gated_mlp.py, qkv_rope.py). last_layer: only the
rows that predict something; needs heads. rare_words: in bfloat16 on a CPU, gradients leave them out (lm_head.py, which
says how far that is from rounding).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from byeori.kernels import (
    bf16_matmul,
    cuda_attention,
    dispatch,
    gated_mlp,
    last_layer,
    native,
    qkv_rope,
    rms_norm,
    switches,
)

PARTS = ("attention", "kernels", "norms", "mlp", "heads", "last_layer", "rare_words")
_CPU_ONLY = ("attention", "rare_words")
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
    if "norms" in chosen:
        rms_norm.fuse_norms(model)
    count = gated_mlp.fuse_mlps(model) if "mlp" in chosen else 0
    count += qkv_rope.fuse_attention(model) if "heads" in chosen else 0
    if "last_layer" in chosen:
        last_layer.prune(model)
    for module, training in modes:
        module.training = training
    return count


@contextmanager
def active(model: Any, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Run a model with its own accelerations inside: its forward pass together with its backward pass.

    dtype, device: what it computes in, and where.
    """
    own = getattr(model, "byeori_switches", None) or switches.Switches()
    with switches.using(own), bf16_matmul.prepared(dtype, device):
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
    if "heads" in chosen and (unknown := qkv_rope.unknown(model)):
        found.append(f"{', '.join(unknown)} has no fused form and runs its own code, which is slower")
    return found
