"""What layers keep for the backward pass, in the CPU's memory: copied there and back while the GPU computes.

Copies run on a stream of their own. An activation stays on the GPU until its copy is done, for which the stream that
computes waits only before it starts on the layer after the next; the last two stay. On the way back, the
activation that is needed next is fetched while a layer works on its own. The host waits for neither.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

_LEAST = 2**20  # bytes; what is smaller stays where it is
_LEAVING = 2  # activations on the GPU whose copies may be under way


class Link:
    """The way between a GPU and the CPU's memory."""

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()

    def takes(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is moved: an activation on a GPU, and not a small one."""
        return tensor.is_cuda and not isinstance(tensor, torch.nn.Parameter) and tensor.nbytes >= _LEAST

    def room(self, like: torch.Tensor) -> torch.Tensor:
        """An empty tensor in memory of the CPU that the GPU can reach by itself."""
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> Any:
        """Start a copy behind everything that is queued so far; returns what to wait for."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def wait(self, copied: Any) -> None:
        """Let what is queued from here on wait for a copy."""
        torch.cuda.current_stream().wait_event(copied)


@dataclass(kw_only=True, slots=True)
class _Item:
    """here: the tensor on the GPU, while it is there. copied: what to wait for before it is used or freed."""

    there: torch.Tensor
    device: torch.device
    here: torch.Tensor | None
    copied: Any


class _Shelf:
    """What one forward pass keeps, in the order in which it was put there; taken away from the end."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._items: list[_Item] = []
        self._leaving: deque[_Item] = deque()

    def put(self, tensor: torch.Tensor) -> torch.Tensor | int:
        if not self._link.takes(tensor):
            return tensor
        while len(self._leaving) >= _LEAVING:
            item = self._leaving.popleft()
            self._link.wait(item.copied)  # its memory is free for what is queued after this
            item.here = None
        there = self._link.room(tensor)
        copied = self._link.copy(tensor, there)
        item = _Item(there=there, device=tensor.device, here=tensor, copied=copied)
        self._items.append(item)
        self._leaving.append(item)
        return len(self._items) - 1

    def take(self, kept: torch.Tensor | int) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        self._leaving.clear()
        tensor = self._fetch(kept)
        self._link.wait(self._items[kept].copied)
        self._items[kept].here = None
        if kept:
            self._fetch(kept - 1)
        return tensor

    def _fetch(self, index: int) -> torch.Tensor:
        item = self._items[index]
        if item.here is None:
            item.here = torch.empty_like(item.there, device=item.device)
            item.copied = self._link.copy(item.there, item.here)
        return item.here

    def __del__(self) -> None:
        """A pass that failed leaves copies under way: their memory is free after them."""
        for item in self._items:
            if item.here is not None:
                self._link.wait(item.copied)


def keep_away(module: torch.nn.Module, link: Link | None = None) -> None:
    """Let what the module's forward pass keeps lie in the CPU's memory until the backward pass needs it."""
    way, entered = link or Link(), list[Any]()

    def enter(*_: Any) -> None:
        shelf = _Shelf(way)
        entered.append(saved_tensors_hooks(shelf.put, shelf.take))
        entered[-1].__enter__()

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(lambda *_: entered.pop().__exit__(None, None, None), always_call=True)
