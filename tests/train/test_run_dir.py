"""The output folder of a run: one run at a time."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest

import forks
import runs
from byeori.errors import CheckpointError
from byeori.train import run_dir
from runs import sft, sha


def test_a_second_run_is_refused_while_the_first_is_writing(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    values = {"base_model": tiny_model, "data_path": title_rows, "output_dir": output, "cutoff_len": 256}
    first = forks.start(
        "-m", "byeori", "sft", *runs.flags(values | {"num_epochs": 300, "save_steps": 5, "batch_size": 4})
    )
    deadline = time.monotonic() + 200
    while not (output / "checkpoint-5").is_dir():
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        time.sleep(0.02)
    for changes in ({}, {"overwrite_output_dir": True}, {"resume_from_checkpoint": "latest"}):
        with pytest.raises(CheckpointError, match=rf"being written by another run \(process {first.pid} on .+\); wait"):
            sft(tiny_model, title_rows, output, max_steps=7, **changes)
    assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=60)
    assert (output / ".lock").exists()  # left by the killed run, and no obstacle
    sft(tiny_model, title_rows, output, max_steps=2, overwrite_output_dir=True)
    assert not (output / ".lock").exists()
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
