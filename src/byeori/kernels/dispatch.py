"""Kernels that do in one pass over memory what PyTorch does in several: C on a CPU, Triton on a GPU.

Their names and arguments are those of kernels.c. Callers ask first, and use PyTorch's own operations where there is no
kernel.
"""

from __future__ import annotations

import functools
import hashlib
from importlib.util import find_spec
from pathlib import Path

import torch

from byeori.kernels import device_kind, native

_GPU_STORES = (torch.bfloat16, torch.float16, torch.float32)


def runs(*tensors: torch.Tensor) -> bool:
    """Whether the kernels take these tensors: contiguous ones of one type that they know.

    Layers that torch.compile traces are fused by it.
    """
    if device_kind.kind(tensors[0]) != "cuda":
        return native.runs(*tensors)
    first = tensors[0]
    return (
        native.on()
        and not torch.compiler.is_compiling()
        and first.dtype in _GPU_STORES
        and native.alike(*tensors)
        and (first.is_meta or triton_is_here())
    )


def call(name: str, *arguments: torch.Tensor | float | None) -> None:
    """Run a kernel; nothing in a rehearsal, where there are no numbers."""
    first = next(each for each in arguments if isinstance(each, torch.Tensor))
    if first.is_meta:
        return
    if first.is_cuda:
        from byeori.kernels import triton_kernels

        triton_kernels.call(name, *arguments)
    else:
        native.call(name, *arguments)


def sources() -> str:
    """A hash of the kernels' code, of both kinds."""
    triton = Path(__file__).with_name("triton_kernels.py").read_bytes()
    return hashlib.sha256(native.sources().encode() + triton).hexdigest()


@functools.cache
def triton_is_here() -> bool:
    """It comes with PyTorch for GPUs on Linux."""
    return find_spec("triton") is not None
