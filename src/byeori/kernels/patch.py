"""What makes a training step faster without changing its result but by rounding; each part can be measured alone.

attention: the CPU's own (cpu_attention.py). kernels: C on a CPU where there is a compiler (native.py), Triton on a GPU
(gpu_kernels.py). norms, mlp, heads: fused functions (norm.py, mlp.py, heads.py). last_layer: only the rows that predict
something; needs heads. rare_words: in bfloat16 on a CPU, gradients leave them out (logprobs.py, which says how far that
is from rounding).
"""

from __future__ import annotations

from typing import Any

import torch

from byeori.config import SPEED
from byeori.kernels import cpu_attention, dispatch, gated_mlp, last_layer, lm_head, native, qkv_rope, rms_norm

_OF_A_CPU = ("attention", "rare_words")
# On a GPU the other functions move three times what the models' own code does where PyTorch's operations make them up.
_WITHOUT_TRITON = ["norms"]


def parts(wanted: list[str], device: torch.device) -> list[str]:
    """The parts that a setting means on a device."""
    if wanted == ["off"]:
        return []
    if wanted == ["auto"]:
        if device.type == "cuda" and torch.cuda.is_available() and not dispatch.triton_is_here():
            return list(_WITHOUT_TRITON)
        return [part for part in SPEED if device.type == "cpu" or part not in _OF_A_CPU]
    return list(wanted)


def everywhere(chosen: list[str]) -> None:
    """Switch what every model of this process uses."""
    cpu_attention.switch("attention" in chosen)
    native.switch("kernels" in chosen)
    lm_head.switch("rare_words" in chosen)


def fuse(model: Any, chosen: list[str]) -> int:
    """Give the model's layers the fused functions; returns how many attention and feed-forward modules took one.

    Attention that drops weights runs its own code while it trains.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # what a layer that drops something computes is looked at without that
    if "norms" in chosen:
        rms_norm.fuse_norms(model)
    count = gated_mlp.fuse_mlps(model) if "mlp" in chosen else 0
    count += qkv_rope.fuse_heads(model) if "heads" in chosen else 0
    if "last_layer" in chosen:
        last_layer.prune(model)
    for module, training in modes:
        module.training = training
    return count
