"""Broken inputs with fixed seeds; `python tests/fuzz.py COUNT SEED` tries others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("count", "seed"),
    [(30, 1), pytest.param(250, 1, marks=pytest.mark.slow), pytest.param(250, 2, marks=pytest.mark.slow)],
)
def test_broken_input_is_a_sentence(count: int, seed: int) -> None:
    """In a process of its own: it changes the environment before torch is imported."""
    program = [sys.executable, Path(__file__).with_name("fuzz.py"), str(count), str(seed)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert f"{count} cases, seed {seed}: 0 faults" in done.stdout
