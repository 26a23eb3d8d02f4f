"""What makes a training step faster without changing its result but by rounding; each part can be measured alone.

attention: the CPU's own (cpu_attention.py). kernels: C code where there is a compiler (native.py). norms, mlp, heads:
fused functions (norm.py, mlp.py, heads.py). last_layer: only the rows that predict something; needs heads.
rare_words: in bfloat16 on a CPU, gradients leave them out (logprobs.py, which says how far that is from rounding).
"""

from __future__ import annotations

from typing import Any

import torch

from byeori.config import SPEED
from byeori.model import cpu_attention, heads, last_layer, logprobs, mlp, native, norm


def parts(wanted: list[str], device: torch.device) -> list[str]:
    """The parts that a setting means on a device; `auto` is all on a CPU, and on a GPU what was measured there."""
    if wanted == ["off"]:
        return []
    if wanted == ["auto"]:
        return list(SPEED) if device.type == "cpu" else ["norms"]
    return list(wanted)


def everywhere(chosen: list[str]) -> None:
    """Switch what every model of this process uses."""
    cpu_attention.switch("attention" in chosen)
    native.switch("kernels" in chosen)
    logprobs.switch("rare_words" in chosen)


def fuse(model: Any, chosen: list[str]) -> None:
    """Give the model's layers the fused functions; where dropout is on, they run their own code while they train."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # what a layer with dropout computes is looked at without it
    if "norms" in chosen:
        norm.fuse_norms(model)
    if "mlp" in chosen:
        mlp.fuse_mlps(model)
    if "heads" in chosen:
        heads.fuse_heads(model)
    if "last_layer" in chosen:
        last_layer.prune(model)
    for module, training in modes:
        module.training = training
