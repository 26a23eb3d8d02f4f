"""Signals that stop a run, and noise on embeddings."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Let Ctrl-C and SIGTERM set the event, so that the step in progress is finished; a second Ctrl-C stops at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def ask(number: int, frame: Any) -> None:
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def neftune(model: Any, alpha: float) -> Iterator[dict[str, float]]:
    """Add NEFTune's noise (Jain et al., arXiv:2310.05914) to the embeddings: uniform, of size alpha / sqrt(L d).

    L, the mean length of the micro-batch's examples, is read from `length` of the yielded dict; d is the embedding's
    size.
    """
    state = {"length": 1.0}
    if not alpha:
        yield state
        return

    def add(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        if not model.training:
            return output
        size = alpha / math.sqrt(state["length"] * output.shape[-1])
        return output + torch.empty_like(output).uniform_(-size, size)

    handle = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield state
    finally:
        handle.remove()
