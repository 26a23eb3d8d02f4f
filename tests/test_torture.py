"""A few runs of `make torture`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import forks


@pytest.mark.parametrize("runs", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_killed_runs_end_with_the_bits_of_undisturbed_ones(runs: int) -> None:
    script = Path(__file__).parent / "torture.py"
    done = forks.run(script, runs, 7, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{runs} of {runs} ended with the bits of an undisturbed run" in done.stdout


def test_stopped_commands_end_as_undisturbed_ones() -> None:
    """One fault after the other, each for another command; in a process of its own, which sets the environment."""
    script = Path(__file__).parent / "torture_commands.py"
    done = subprocess.run([sys.executable, script, "5", "3", "11"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "5 of 5 stopped commands ended as undisturbed ones" in done.stdout
