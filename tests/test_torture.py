"""A few runs of `make torture`."""

from __future__ import annotations

from pathlib import Path

import forks


def test_killed_runs_end_with_the_bits_of_undisturbed_ones() -> None:
    script = Path(__file__).parent / "torture.py"
    done = forks.run(script, 2, 7, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 ended with the bits of an undisturbed run" in done.stdout
