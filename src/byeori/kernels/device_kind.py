"""The kind of device that a tensor stands for: its own, or on the meta device the one that a rehearsal plans for.

Code that chooses a kernel by device asks here, so that a rehearsal chooses what the run will.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_REHEARSED: ContextVar[tuple[str, float]] = ContextVar("rehearsed", default=("cpu", 0.0))


def kind(tensor: torch.Tensor) -> str:
    """Return cpu, cuda, ... for a tensor."""
    return kind_of(tensor.device)


def kind_of(device: torch.device) -> str:
    """Return cpu, cuda, ... for a device."""
    return _REHEARSED.get()[0] if device.type == "meta" else device.type


def capability(device: torch.device) -> float:
    """Return the compute capability of a GPU, 8.6 for (8, 6); on the meta device that of the planned one."""
    if device.type == "meta":
        return _REHEARSED.get()[1]
    major, minor = torch.cuda.get_device_capability(device)
    return major + minor / 10


@contextmanager
def stand_for(device: str, capability: float = 8.0) -> Iterator[None]:
    """Let tensors on the meta device stand for this kind of device inside. capability: of a GPU."""
    token = _REHEARSED.set((device, capability))
    try:
        yield
    finally:
        _REHEARSED.reset(token)
