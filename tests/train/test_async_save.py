"""Checkpoints are written while training goes on, one at a time, and no error is lost."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import stepped, trained
from byeori.errors import CheckpointError, TrainingError
from byeori.train import checkpoint, trainer
from byeori.train.async_save import Writer
from runs import checkpoints, log, sft, sha


def fail() -> None:
    raise CheckpointError("the disk is full")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_writes_one_at_a_time_while_the_caller_goes_on() -> None:
    gate, done = threading.Event(), []
    with Writer(print) as writer:
        writer.submit(lambda: (gate.wait(30), done.append(1))[1])
        writer.check()
        assert done == []  # the caller went on
        threading.Timer(0.05, gate.set).start()
        writer.submit(lambda: done.append(len(done) + 1))  # waits for the first
        assert done[0] == 1
    assert done == [1, 2]  # the end waits for the second


def test_an_error_is_raised_by_the_next_call() -> None:
    for following in (lambda w: w.check(), lambda w: w.wait(), lambda w: w.submit(print)):
        with Writer(print) as writer:
            writer.submit(fail)
            until(lambda writer=writer: writer._last.done())
            with pytest.raises(CheckpointError, match="disk is full"):
                following(writer)
            writer.wait()  # raised once


def test_an_error_is_raised_at_the_end() -> None:
    with pytest.raises(CheckpointError, match="disk is full"), Writer(print) as writer:
        writer.submit(fail)


def test_an_error_is_told_where_another_one_ends_the_run() -> None:
    told: list[str] = []
    with pytest.raises(TrainingError), Writer(told.append) as writer:
        writer.submit(fail)
        raise TrainingError("not finite")
    assert told == ["the disk is full"]


def test_a_snapshot_does_not_change_with_the_training(tmp_path: Path) -> None:
    model, optimizer = stepped()
    copied = checkpoint.snapshot(model, optimizer, {"step": 2})
    copied.write(tmp_path / "before")
    for parameter in trained(model):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    copied.write(tmp_path / "after")
    checkpoint.snapshot(model, optimizer, {"step": 2}).write(tmp_path / "later")
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert sha(tmp_path / "before" / name) == sha(tmp_path / "after" / name) != sha(tmp_path / "later" / name)


def test_training_goes_on_while_a_checkpoint_is_written(
    tiny_model: Path, title_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first checkpoint is held back until step 5 is computed; all of them are those of an undisturbed run."""
    how: dict[str, Any] = {"save_steps": 3, "save_total_limit": "none", "num_epochs": 1.5, "lora_dropout": 0.1}
    sft(tiny_model, title_rows, tmp_path / "whole", **how)
    real_save, real_step, gate, steps = checkpoint.save, trainer.train_step, threading.Event(), []

    def save(folder: Path, fill: Any) -> None:
        assert gate.wait(60)
        real_save(folder, fill)

    def step(*arguments: Any) -> Any:
        line = real_step(*arguments)
        steps.append(line["step"])
        if line["step"] == 5:
            assert checkpoints(tmp_path / "out") == []
            gate.set()
        return line

    monkeypatch.setattr(checkpoint, "save", save)
    monkeypatch.setattr(trainer, "train_step", step)
    sft(tiny_model, title_rows, tmp_path / "out", **how)
    assert steps == list(range(1, 10))
    assert checkpoints(tmp_path / "out") == checkpoints(tmp_path / "whole") == [3, 6, 9]
    for number in (3, 6, 9):
        for name in ("adapter_model.safetensors", "optimizer.safetensors", "trainer_state.json"):
            file = Path(f"checkpoint-{number}") / name
            assert sha(tmp_path / "out" / file) == sha(tmp_path / "whole" / file)


def test_a_disk_that_fills_while_training_goes_on_ends_the_run(
    tiny_model: Path, title_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, writes = checkpoint.save_file, [0]

    def save_file(*arguments: Any, **named: Any) -> None:
        writes[0] += 1
        if writes[0] > 2:  # adapter and optimizer of the first checkpoint
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments, **named)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(CheckpointError, match=r"disk is full: .*checkpoint-2 could .* last whole checkpoint is .*-1;"):
        sft(tiny_model, title_rows, tmp_path / "out", save_steps=1)
    assert checkpoints(tmp_path / "out") == [1]
    assert len(log(tmp_path / "out")) <= 4  # it ended at once


def test_a_deleted_log_ends_the_run(
    tiny_model: Path, title_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = trainer.train_step

    def step(*arguments: Any) -> Any:
        line = real(*arguments)
        if line["step"] == 4:
            (tmp_path / "out" / "train_log.jsonl").unlink()
        return line

    monkeypatch.setattr(trainer, "train_step", step)
    with pytest.raises(CheckpointError, match=r"train_log.jsonl could not be written \(No such file"):
        sft(tiny_model, title_rows, tmp_path / "out", save_steps=2)
    newest = checkpoint.newest(tmp_path / "out")
    assert newest is not None and newest.name == "checkpoint-2"
