"""The output folder of a run: one run at a time."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import forks
import runs
from byeori.errors import CheckpointError
from byeori.train import run_dir
from runs import command, same, settings, sft, sha


def begun(values: dict[str, Any]) -> forks.Forked:
    """A run in a process of its own that has written a checkpoint, and is held there."""
    process, deadline = command(values), time.monotonic() + 200
    while not (Path(values["output_dir"]) / "checkpoint-5").is_dir():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)
    return process


def test_a_second_process_is_refused_and_the_first_goes_on(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    """The first one ends with the bits of a run that nobody disturbed."""
    output = tmp_path / "out"
    values = settings(tiny_model, title_rows, output, num_epochs=20, save_steps=5, save_total_limit="none")
    first = begun(values)
    for more in ({}, {"overwrite_output_dir": True}, {"resume_from_checkpoint": "latest"}):
        second = command(values | more)
        _, told = second.communicate(timeout=200)
        assert second.wait() == 2 and re.fullmatch(
            rf"error: {output} is being written by another run \(process {first.pid} on .+\); wait for it, or choose "
            r"another --output_dir\n",
            told,
        ), told
    first.send_signal(signal.SIGCONT)
    _, told = first.communicate(timeout=200)
    assert first.wait() == 0, told
    sft(tiny_model, title_rows, tmp_path / "other", num_epochs=20, save_steps=5, save_total_limit="none")
    same(output, tmp_path / "other", 120)
    assert runs.checkpoints(output) == runs.checkpoints(tmp_path / "other") and not runs.leftovers(output)


def test_the_lock_of_a_killed_run_is_no_obstacle(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = begun(settings(tiny_model, title_rows, output, num_epochs=300, save_steps=5))
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=60)
    assert (output / ".lock").read_text(encoding="utf-8").startswith(f"process {first.pid} on ")
    second = command(settings(tiny_model, title_rows, output, max_steps=2, overwrite_output_dir=True))
    _, told = second.communicate(timeout=200)
    assert second.wait() == 0 and not (output / ".lock").exists(), told
    sft(tiny_model, title_rows, tmp_path / "other", max_steps=2)
    assert sha(output / "adapter_model.safetensors") == sha(tmp_path / "other" / "adapter_model.safetensors")


def test_a_run_that_finished_meanwhile_is_not_replaced(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    """Both found the folder empty when they began."""
    output = tmp_path / "out"
    sft(tiny_model, title_rows, output, max_steps=2)
    with run_dir.exclusive(output), pytest.raises(CheckpointError, match="holds another run"):
        run_dir.make(output, clear=False, resume=None, anew=True, say=print)
    with run_dir.exclusive(output):
        with pytest.raises(CheckpointError, match="being written by another run"), run_dir.exclusive(output):
            pass
        assert re.fullmatch(r"process \d+ on .+", (output / ".lock").read_text(encoding="utf-8"))
