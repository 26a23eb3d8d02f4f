"""Kernels that do in one pass over memory what PyTorch does in several: C on a CPU, Triton on a GPU.

Names and arguments are those of csrc/kernels.c. Callers ask `supports` first, and use PyTorch's own operations where
there is no kernel.
"""

from __future__ import annotations

import functools
import hashlib
from importlib.util import find_spec
from pathlib import Path

import torch

from byeori.kernels import device_kind, native, switches

KERNELS = ("norm", "glu", "rope", "online_softmax", "dropout")
"""What can be given up alone: a kernel together with the one of its backward pass."""

_CUDA_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def supports(*tensors: torch.Tensor, kernel: str) -> bool:
    """Return whether a kernel accepts these tensors: contiguous, and all of one type that the kernels know.

    kernel: one of KERNELS. Layers that torch.compile traces are fused by the compiler instead.
    """
    first = tensors[0]
    if kernel in switches.current().without:
        return False
    if device_kind.kind(first) != "cuda":
        return native.supports(*tensors)
    return (
        switches.current().kernels
        and not torch.compiler.is_compiling()
        and first.dtype in _CUDA_DTYPES
        and native.same_layout(*tensors)
        and (first.is_meta or has_triton())
    )


def call(name: str, *arguments: torch.Tensor | float | None) -> None:
    """Run a kernel; nothing on the meta device, where a rehearsal has no numbers."""
    first = next(each for each in arguments if isinstance(each, torch.Tensor))
    if first.is_meta:
        return
    if first.is_cuda:
        from byeori.kernels import triton_kernels

        triton_kernels.call(name, *arguments)
    else:
        native.call(name, *arguments)


def sources() -> str:
    """Return a hash of the code of all kernels."""
    triton = Path(__file__).with_name("triton_kernels.py").read_bytes()
    return hashlib.sha256(native.sources().encode() + triton).hexdigest()


@functools.cache
def has_triton() -> bool:
    """Return whether Triton is installed; it comes with PyTorch for GPUs on Linux."""
    return find_spec("triton") is not None


def wide(states: torch.Tensor) -> torch.dtype:
    """Return the type to compute in: float32, or float64 for float64."""
    return torch.promote_types(states.dtype, torch.float32)
