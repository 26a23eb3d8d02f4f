"""What a test's page started ends with the test."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def end_of_what_it_started(tmp_path: Path) -> Iterator[None]:
    """Runs and answering models outlive the page, and would take the processors of the tests that follow."""
    yield
    for place in Path("/proc").glob("[0-9]*/cwd"):
        with suppress(OSError):
            if place.readlink().is_relative_to(tmp_path) and int(place.parent.name) != os.getpid():
                os.kill(int(place.parent.name), signal.SIGKILL)
