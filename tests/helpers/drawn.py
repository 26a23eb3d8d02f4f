"""How many random cases a test of exactness draws: a few, or `make exactness SEEDS=1000`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings

SEEDS = os.environ.get("BYEORI_TEST_SEEDS")


def drawn(count: int, **more: Any) -> Callable[[Any], Any]:
    """Mark a test that hypothesis draws `count` cases for, or as many as are asked for."""

    def mark(test: Any) -> Any:
        return pytest.mark.exactness(settings(max_examples=int(SEEDS or count), deadline=None, **more)(test))

    return mark
