"""How much memory a run uses, and keeping the heap from growing."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from pathlib import Path

import torch

from byeori.support import cgroups

_M_MMAP_THRESHOLD = -3  # malloc.h
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # the second since PyTorch 2.9


def expand_segments() -> None:
    """Let PyTorch's allocator grow its segments on a GPU, unless the user has configured it.

    Micro-batches of different lengths leave holes in segments of fixed size: 8B QLoRA in torchtune held 16.4 GiB
    without this and 10.8 with it (meta-pytorch/torchtune, issue 1185). Call it before the first allocation.
    """
    if torch.cuda.is_available() and not any(name in os.environ for name in _ALLOCATOR):
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"


def expandable_segments() -> bool:
    """Return whether the allocator's segments may grow; True where nothing is configured, as `expand_segments` does."""
    values = [os.environ[name] for name in _ALLOCATOR if name in os.environ]
    return not values or any("expandable_segments:True" in value.replace(" ", "") for value in values)


def reset_peak(device: torch.device) -> None:
    """Start to measure the peak again: a notebook's process has many runs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # Linux; elsewhere the peak stays that of the process
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory used since `reset_peak`: allocated on the GPU, or resident in this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: its peak
        return peak_memory_bytes(torch.device("cpu"))


def total_bytes() -> int:
    """Return the memory of the machine, or of this process's container."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    granted = cgroups.memory()
    return min(total, granted[0]) if granted else total


def available_bytes(device: torch.device) -> int:
    """Return the memory that a run can still use on this device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    granted = cgroups.memory()
    left = granted[1] if granted else total_bytes()
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return min(left, int(line.split()[1]) * 1024)
    return left


def keep_large_blocks_apart() -> None:
    """Let glibc map every block of 1 MiB and more on its own, and return it to the system when it is freed.

    Weights that are dequantized from 4 bit for a moment leave holes in the heap, which doubled its size. Without
    quantized weights this would cost a fifth of the speed for nothing.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(_M_MMAP_THRESHOLD, 2**20)


def give_back(device: torch.device, *, above: int = 0) -> None:
    """Return free pages to the system if this process holds more than `above` bytes.

    Micro-batches of different lengths leave holes in glibc's heap; but a page that is returned has to be fetched and
    cleared again, which takes up to a quarter of a step's time.
    """
    if device.type == "cpu" and sys.platform == "linux" and resident_bytes() > above:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


class Pages:
    """When a run returns free pages: if it holds more than `limit`, and before a micro-batch larger than any so far.

    The holes that smaller ones left are too small for that one, and the heap would grow in addition to them.
    """

    def __init__(self, device: torch.device, *, limit: int) -> None:
        self._device, self._limit, self._largest = device, limit, 0

    def before(self, tokens: int) -> None:
        """Call this before a step. tokens: of its largest micro-batch."""
        give_back(self._device, above=0 if tokens > self._largest else self._limit)
        self._largest = max(self._largest, tokens)
