"""Which accelerations the model that is running may use.

They belong to a model (`patch.fuse` stores them on it), and `using` sets them for as long as it runs, so that two
models with different --speed can live in one process. The state is one of the process, not of a thread: autograd runs
a GPU's backward pass in threads of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Switches:
    """attention: the CPU's own attention instead of PyTorch's. kernels: C on a CPU, Triton on a GPU.
    rare_words: gradients in bfloat16 on a CPU leave rare words out. flash: a GPU's flash attention.
    quantized: bitsandbytes dequantizes weights. offload: activations are copied while layers compute.
    without: kernels of dispatch.KERNELS that fail on this machine.
    """

    attention: bool = True
    kernels: bool = True
    rare_words: bool = True
    flash: bool = True
    quantized: bool = True
    offload: bool = True
    without: frozenset[str] = frozenset()


_current = Switches()


def current() -> Switches:
    """The switches of the running model; everything is on outside of `using`."""
    return _current


@contextmanager
def using(switches: Switches) -> Iterator[None]:
    """Use these switches inside, and the ones from before afterwards."""
    global _current
    before, _current = _current, switches
    try:
        yield
    finally:
        _current = before
