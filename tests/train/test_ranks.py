"""Two processes under torchrun: one is killed, all are asked to stop, and another number of them goes on."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import byeori
from byeori.train import checkpoint
from forks import Forked
from runs import checkpoints, command, leftovers, log, losses, settings, sft, sha

LONG: dict[str, Any] = {"num_epochs": 10, "save_steps": 5, "lora_dropout": 0.1}  # 60 steps


def torchrun(values: dict[str, Any], *, restarts: int = 0) -> Forked:
    return command(values, processes=2, restarts=restarts)


def steps_done(output: Path, launcher: Forked, steps: int) -> None:
    """Wait until so many steps are in the log."""
    deadline, path = time.monotonic() + 120, output / "train_log.jsonl"
    while not path.is_file() or path.read_bytes().count(b"\n") < steps:
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(tiny_model: Path, title_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run of two processes."""
    output = tmp_path_factory.mktemp("ranks") / "whole"
    process = torchrun(settings(tiny_model, title_rows, output, **LONG))
    assert process.wait(timeout=200) == 0, process.communicate()
    return output


def same(one: Path, other: Path) -> None:
    assert sha(one / "adapter_model.safetensors") == sha(other / "adapter_model.safetensors")
    for name in ("optimizer.safetensors", "trainer_state.json"):
        assert sha(one / "checkpoint-60" / name) == sha(other / "checkpoint-60" / name), name
    assert log(one, timeless=True) == log(other, timeless=True)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_lost_process_ends_the_others_with_one_message(
    rank: int, whole: Path, tiny_model: Path, title_rows: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    values = settings(tiny_model, title_rows, output, **LONG)
    process = torchrun(values)
    steps_done(output, process, 8)
    os.kill(process.rank(rank), signal.SIGKILL)
    _, told = process.communicate(timeout=60)  # far less than the half hour that a collective call waits
    errors = re.findall(r"^error: .*$", told, flags=re.MULTILINE)
    assert len(errors) == 1, told
    found = re.fullmatch(
        r"error: another process of this run ended at step (\d+) \(killed, or out of memory\?\); everything up to "
        rf"checkpoint-(\d+) is in {output}; go on with the same command and --resume_from_checkpoint latest",
        errors[0],
    )
    assert found, errors
    assert "Error(s) in loading" not in told and "RuntimeError" not in told, told
    newest = checkpoint.newest(output)
    assert newest == output / f"checkpoint-{found[2]}"
    if rank == 1:  # the first process is alive, and saves the last whole step
        assert int(found[1]) == int(found[2]) + 1
        resumed = torchrun(values | {"resume_from_checkpoint": "latest"})
        assert resumed.wait(timeout=200) == 0, resumed.communicate()
        same(whole, output)
    assert not leftovers(output)


def test_a_restart_by_torchrun_resumes(whole: Path, tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    """With --overwrite_output_dir, which the second attempt must not obey."""
    output = tmp_path / "out"
    sft(tiny_model, title_rows, output, max_steps=2)
    process = torchrun(settings(tiny_model, title_rows, output, **LONG, overwrite_output_dir=True), restarts=1)
    steps_done(output, process, 16)
    os.kill(process.rank(1), signal.SIGKILL)
    _, told = process.communicate(timeout=200)
    assert process.returncode == 0, told
    assert re.search(rf"Restarted by torchrun; resuming from {output}/checkpoint-\d\d", told), told
    same(whole, output)


def test_torchrun_starts_again_before_the_first_checkpoint(
    whole: Path, tiny_model: Path, title_rows: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    values = settings(tiny_model, title_rows, output, **LONG | {"save_steps": 400})
    process = torchrun(values, restarts=1)
    steps_done(output, process, 3)
    os.kill(process.rank(0), signal.SIGKILL)
    _, told = process.communicate(timeout=200)
    assert process.returncode == 0, told
    same(whole, output)


def test_sigterm_to_torchrun_writes_a_checkpoint(
    whole: Path, tiny_model: Path, title_rows: Path, tmp_path: Path
) -> None:
    """The notice of a spot instance: torchrun hands it to every process and waits 30 s."""
    output = tmp_path / "out"
    values = settings(tiny_model, title_rows, output, **LONG)
    process = torchrun(values)
    steps_done(output, process, 8)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    step = checkpoints(output)[-1]
    assert f"stopped at step {step}; everything is in {output / f'checkpoint-{step}'}" in told
    assert checkpoint.verify(output / f"checkpoint-{step}") is None and not leftovers(output)
    assert log(output)[-1]["step"] == step
    resumed = torchrun(values | {"resume_from_checkpoint": "latest"})
    assert resumed.wait(timeout=200) == 0, resumed.communicate()
    same(whole, output)


def test_another_number_of_processes_resumes_with_the_same_batches(
    tiny_model: Path, title_rows: Path, tmp_path: Path
) -> None:
    """Without dropout, whose masks are drawn by each process: the losses are equal to rounding."""
    how = {"num_epochs": 2, "lr_scheduler": "constant"}
    sft(tiny_model, title_rows, tmp_path / "one", **how)

    def alone(values: dict[str, Any]) -> None:
        byeori.sft(**values)

    def both(values: dict[str, Any]) -> None:
        process = torchrun(values)
        assert process.wait(timeout=100) == 0, process.communicate()

    for name, first, then in (("more", alone, both), ("fewer", both, alone)):
        output = tmp_path / name
        values = settings(tiny_model, title_rows, output, **how)
        first(values | {"max_steps": 5})
        then(values | {"resume_from_checkpoint": "latest"})
        assert losses(output) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
        for key in ("tokens", "target_tokens"):
            assert [line[key] for line in log(output)] == [line[key] for line in log(tmp_path / "one")]
