"""PEFT without bitsandbytes, unless a model needs it.

PEFT imports bitsandbytes wherever it is installed, and bitsandbytes brings PyTorch's compiler: a third of the time that
a command takes to start. byeori opens and closes 4-bit weights itself (quantize.py); only a base that was stored by
bitsandbytes has layers that PEFT must know.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_NAME = "bitsandbytes"


@contextmanager
def without_bitsandbytes(model: Any = None) -> Iterator[None]:
    """Inside it nothing finds bitsandbytes, if it is not imported already and no layer of `model` is its own."""
    modules = () if model is None else model.modules()
    if _NAME in sys.modules or any(type(module).__module__.startswith(_NAME) for module in modules):
        yield
        return
    sys.modules[_NAME] = None  # type: ignore[assignment]  # Python's own way to say that there is no such module
    try:
        yield
    finally:
        del sys.modules[_NAME]
        if known := sys.modules.get("peft.import_utils"):  # it remembers what it found
            known.is_bnb_available.cache_clear()
            known.is_bnb_4bit_available.cache_clear()
