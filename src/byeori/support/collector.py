"""Python's garbage collector, switched off where it only costs time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unwatched() -> Iterator[None]:
    """Exclude the objects that exist from garbage collections in the body: a million from imports, all still in use."""
    if gc.get_freeze_count():  # the program around has done so, and what it has frozen stays frozen
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def paused() -> Iterator[None]:
    """Switch the garbage collector off while the body makes a million objects that stay: imports, large JSON files.

    It would find nothing, but take a tenth of the time of imports and half of that of loading a tokenizer.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
