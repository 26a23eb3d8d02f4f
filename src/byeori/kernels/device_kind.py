"""The kind of device that a tensor stands for: its own, or on the meta device the one that a rehearsal plans for.

Code that chooses a kernel by device asks here, so that a rehearsal chooses what the run will.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_REHEARSED: ContextVar[str] = ContextVar("rehearsed", default="cpu")


def kind(tensor: torch.Tensor) -> str:
    """Return cpu, cuda, ... for a tensor."""
    return kind_of(tensor.device)


def kind_of(device: torch.device) -> str:
    """Return cpu, cuda, ... for a device."""
    return _REHEARSED.get() if device.type == "meta" else device.type


@contextmanager
def stand_for(device: str) -> Iterator[None]:
    """Let tensors on the meta device stand for this kind of device inside."""
    token = _REHEARSED.set(device)
    try:
        yield
    finally:
        _REHEARSED.reset(token)
