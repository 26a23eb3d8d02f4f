"""Activations that layers save for the backward pass, in the CPU's memory: copied there and back during computation.

Copies run on a stream of their own. An activation stays on the GPU until its copy is done; the computing stream waits
for that only before it starts on the layer after the next, so the last two stay. In the backward pass the activation
that is needed next is fetched while a layer computes. The host waits for neither.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from byeori.kernels import cuda_calls, switches

LEAST = 2**20  # bytes; smaller tensors stay on the GPU
_COPYING = 2  # activations on the GPU whose copies may be in progress


class Link:
    """Copies between a GPU and the CPU's memory; without the model's `offload` switch everybody waits for each."""

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()

    def accepts(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor is moved: an activation on a GPU, and not a small one."""
        return tensor.is_cuda and not isinstance(tensor, torch.nn.Parameter) and tensor.nbytes >= LEAST

    def empty_like(self, like: torch.Tensor) -> torch.Tensor:
        """Return an empty tensor in pinned memory."""
        pinned = switches.current().offload and not cuda_calls.pinning_problem()
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=pinned)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> Any:
        """Queue a copy after everything queued so far; return the event to wait for, None if it is made already."""
        if not switches.current().offload:
            target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def wait(self, copied: Any) -> None:
        """Let everything queued from here on wait for a copy."""
        if copied is not None:
            torch.cuda.current_stream().wait_event(copied)


@dataclass(kw_only=True, slots=True)
class _Item:
    """on_gpu: the tensor on the GPU, while it is there. copied: the event to wait for before it is used or freed."""

    on_cpu: torch.Tensor
    device: torch.device
    on_gpu: torch.Tensor | None
    copied: Any


class _Stack:
    """The activations of one forward pass in order; the backward pass takes them from the end."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._items: list[_Item] = []
        self._copying: deque[_Item] = deque()

    def put(self, tensor: torch.Tensor) -> torch.Tensor | int:
        if not self._link.accepts(tensor):
            return tensor
        while len(self._copying) >= _COPYING:
            item = self._copying.popleft()
            self._link.wait(item.copied)  # its memory is free for everything queued after this
            item.on_gpu = None
        on_cpu = self._link.empty_like(tensor)
        copied = self._link.copy(tensor, on_cpu)
        item = _Item(on_cpu=on_cpu, device=tensor.device, on_gpu=tensor, copied=copied)
        self._items.append(item)
        self._copying.append(item)
        return len(self._items) - 1

    def take(self, saved: torch.Tensor | int) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        self._copying.clear()
        tensor = self._fetch(saved)
        self._link.wait(self._items[saved].copied)
        self._items[saved].on_gpu = None
        if saved:
            self._fetch(saved - 1)
        return tensor

    def _fetch(self, index: int) -> torch.Tensor:
        item = self._items[index]
        if item.on_gpu is None:
            item.on_gpu = torch.empty_like(item.on_cpu, device=item.device)
            item.copied = self._link.copy(item.on_cpu, item.on_gpu)
        return item.on_gpu

    def __del__(self) -> None:
        """A failed pass leaves copies in progress: their memory is free after them."""
        for item in self._items:
            if item.on_gpu is not None:
                self._link.wait(item.copied)


def offload(module: torch.nn.Module, link: Link | None = None) -> None:
    """Hold the activations of a module's forward pass in the CPU's memory until the backward pass needs them."""
    link, entered = link or Link(), list[Any]()

    def enter(*_: Any) -> None:
        stack = _Stack(link)
        entered.append(saved_tensors_hooks(stack.put, stack.take))
        entered[-1].__enter__()

    module.byeori_offload = (
        module.register_forward_pre_hook(enter),
        module.register_forward_hook(lambda *_: entered.pop().__exit__(None, None, None), always_call=True),
    )


def stop(module: torch.nn.Module) -> None:
    """Undo `offload`, if it was done."""
    for hook in module.__dict__.pop("byeori_offload", ()):
        hook.remove()
