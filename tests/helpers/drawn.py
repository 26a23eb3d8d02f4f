"""How many random cases a test of exactness draws: a third in `make test`, or BYEORI_TEST_SEEDS."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings

SEEDS = os.environ.get("BYEORI_TEST_SEEDS")


def drawn(count: int, **more: Any) -> Callable[[Any], Any]:
    """Mark a test that hypothesis draws `count` cases for in `make test-all` (SEEDS=all), a third in `make test`."""
    examples = count if SEEDS == "all" else int(SEEDS or count // 3)

    def mark(test: Any) -> Any:
        return pytest.mark.exactness(settings(max_examples=examples, deadline=None, **more)(test))

    return mark
