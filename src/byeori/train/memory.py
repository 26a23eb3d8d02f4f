"""How much memory a run takes, and keeping that from growing."""

from __future__ import annotations

import ctypes
import resource
import sys

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory used so far: allocated on the GPU, or resident in this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def give_back(device: torch.device) -> None:
    """Return free pages to the system: micro-batches of ever different lengths leave glibc's heap full of holes."""
    if device.type == "cpu" and sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
