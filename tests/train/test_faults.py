"""Faults at random places: memory that runs out, rows that are not finite, checkpoints that rot, disks
that fill. Nothing is lost, and the run ends as it would have."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from byeori.distributed import processes
from byeori.errors import CheckpointError, TrainingError
from byeori.train import checkpoint, oom, trainer
from byeori.train.state import Abandoned
from runs import checkpoints, command, leftovers, log, losses, same, settings, sft, sha

COUNT = int(os.environ.get("BYEORI_TEST_FAULTS", 20))  # of each kind; `make faults RUNS=100`
SHORT = 4  # every kind of error and of value, and both places of them
CASES = pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case >= SHORT)) for case in range(COUNT)]
)
OUT_OF_MEMORY: list[Exception] = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to"),
    MemoryError(),
    RuntimeError("could not create a primitive"),
]


# ---- out of memory -----------------------------------------------------------------------------------------------


def run_out(monkeypatch: pytest.MonkeyPatch, call: int, error: Exception, after: int | None = None) -> list[int]:
    """The `call`-th pass over a micro-batch fails: at its start, or once `after` gradients are there already."""
    real, calls, failed = trainer._forward_backward, [0], []

    def forward_backward(job: Any, batch: Any, weight: float) -> Any:
        calls[0] += 1
        if calls[0] != call:
            return real(job, batch, weight)
        failed.append(len(batch.forest.rows))
        if after is None:
            raise error
        left = [after]

        def spoil(parameter: torch.Tensor) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise error

        trained = [parameter for _, parameter in checkpoint.trainable(job.model)]
        hooks = [parameter.register_post_accumulate_grad_hook(spoil) for parameter in trained]
        try:
            real(job, batch, weight)
        finally:
            assert any(parameter.grad is not None and parameter.grad.any() for parameter in trained)
            for hook in hooks:
                hook.remove()

    monkeypatch.setattr(trainer, "_forward_backward", forward_backward)
    return failed


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, title_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("faults") / "undisturbed"
    sft(tiny_model, title_rows, output, micro_batch_size=2, save_steps=1, save_total_limit="none")
    return output


@CASES
def test_out_of_memory_splits_the_micro_batch(
    case: int,
    undisturbed: Path,
    tiny_model: Path,
    title_rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """12 steps of two micro-batches of two rows. Half-way through a backward pass leaves no more than at its start."""
    dice = random.Random(case)
    call, error = dice.randint(1, 24), OUT_OF_MEMORY[case % len(OUT_OF_MEMORY)]
    step = (call + 1) // 2
    for name, after in (("backward", dice.randint(1, 20)), ("forward", None)):
        failed = run_out(monkeypatch, call, error, after)
        sft(tiny_model, title_rows, tmp_path / name, micro_batch_size=2)
        monkeypatch.undo()
        assert failed == [2]
        told = " ".join(capsys.readouterr().err.split())
        assert re.search(rf"step {step}: 2 rows \(\d+ tokens\) did not fit .* split into 2, and the step is", told)
        assert [line.get("micro_batches_halved", 0) for line in log(tmp_path / name)] == [
            int(at >= step) for at in range(1, 13)
        ]
    same(tmp_path / "backward", tmp_path / "forward", 12)
    assert losses(tmp_path / "backward") == pytest.approx(losses(undisturbed), rel=1e-5)
    found, expected = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "forward", undisturbed)
    )
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-4


def test_a_resumed_run_has_the_smaller_size(
    tiny_model: Path, title_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_out(monkeypatch, 3, MemoryError())
    sft(tiny_model, title_rows, tmp_path / "whole", micro_batch_size=4, save_steps=6)
    monkeypatch.undo()
    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    folder = str(tmp_path / "out" / "checkpoint-6")
    sft(tiny_model, title_rows, tmp_path / "out", micro_batch_size=4, save_steps=6, resume_from_checkpoint=folder)
    same(tmp_path / "whole", tmp_path / "out", 12)


def limit_rows(monkeypatch: pytest.MonkeyPatch, fits: Callable[[Any], bool]) -> None:
    """A machine with room for some micro-batches only."""
    real = trainer._sums

    def sums(job: Any, batch: Any) -> Any:
        if not fits(batch):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(job, batch)

    monkeypatch.setattr(trainer, "_sums", sums)


def test_micro_batches_are_split_until_they_fit(
    undisturbed: Path, tiny_model: Path, title_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training and in evaluation; a preference pair, or a row, is never parted."""
    how = {"micro_batch_size": 8, "batch_size": 8, "val_set_size": 8, "num_epochs": 1}
    sft(tiny_model, title_rows, tmp_path / "whole", **how)
    limit_rows(monkeypatch, lambda batch: len(batch.forest.rows) <= 2 or not torch.is_grad_enabled())
    sft(tiny_model, title_rows, tmp_path / "split", **how)
    monkeypatch.undo()
    limit_rows(monkeypatch, lambda batch: len(batch.forest.rows) <= 1 or torch.is_grad_enabled())
    sft(tiny_model, title_rows, tmp_path / "eval", **how)
    for name, halved in (("split", [2, 2]), ("eval", [0, 0])):
        lines = log(tmp_path / name)
        assert [line.get("micro_batches_halved", 0) for line in lines if "loss" in line] == halved
        for key in ("loss", "eval_loss"):
            expected = [line[key] for line in log(tmp_path / "whole") if key in line]
            assert [line[key] for line in lines if key in line] == pytest.approx(expected, rel=1e-5)


def test_a_row_that_does_not_fit_alone_is_named(
    tiny_model: Path, title_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a checkpoint of the step before."""
    order = json.loads(_order(tiny_model, title_rows, tmp_path / "order"))
    row, output = order[13], tmp_path / "out"  # in the fourth step
    limit_rows(monkeypatch, lambda batch: row not in batch.forest.rows)
    with pytest.raises(
        TrainingError, match=rf"row {row + 1} does not fit in memory, even alone; lower --cutoff_len, or give"
    ):
        sft(tiny_model, title_rows, output, micro_batch_size=4)
    assert checkpoints(output) == [3] and checkpoint.verify(output / "checkpoint-3") is None
    assert len(losses(output)) == 3


def _order(model: Path, rows: Path, output: Path) -> str:
    sft(model, rows, output, max_steps=12)
    return (output / "order.json").read_text()


def test_other_errors_are_not_mistaken_for_out_of_memory() -> None:
    def fail() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot"):
        oom.attempt(fail, [1, 2], 10)


TWO = """
import os, sys, torch
from byeori import cli
from byeori.train import trainer
real, calls = trainer._sums, [0]
def sums(job, batch):
    calls[0] += 1
    if os.environ["RANK"] == "{rank}" and (calls[0] == 4 or {always} and calls[0] > 4):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return real(job, batch)
trainer._sums = sums
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("rank", "always"), [(1, False), (1, True)], ids=["once", "always"])
def test_one_of_two_processes_runs_out_of_memory(
    rank: int, always: bool, tiny_model: Path, title_rows: Path, tmp_path: Path
) -> None:
    """Both split and compute the step again; or both end, and the row is named once."""
    script = tmp_path / "script.py"
    script.write_text(TWO.format(rank=rank, always=always))
    values = settings(tiny_model, title_rows, tmp_path / "out", num_epochs=1)
    process = command(values, script, processes=2)
    _, told = process.communicate(timeout=200)
    if always:
        assert len(re.findall(r"error: row \d+ does not fit in memory, even alone", told)) == 1, told
        assert checkpoints(tmp_path / "out") == [3]
        return
    assert process.returncode == 0, told
    sft(tiny_model, title_rows, tmp_path / "whole", num_epochs=1)
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert "step 4: another process's rows did not fit in memory together" in " ".join(told.split())


SHARDED = """
import os, sys, torch
from byeori import cli
from byeori.train import trainer
real, calls = trainer._sums, [0]
def sums(job, batch):
    calls[0] += 1
    here = (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0")
    if here and calls[0] >= {call} and len(batch.forest.rows) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return real(job, batch)
trainer._sums = sums
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_sharded_rows_that_do_not_fit_restart_the_processes(
    step: int, tiny_model: Path, title_rows: Path, tmp_path: Path
) -> None:
    """From the step before, in smaller micro-batches, with the losses of a run that had room."""
    script, output = tmp_path / "script.py", tmp_path / "out"
    script.write_text(SHARDED.format(call=step))
    how = {"num_epochs": 1, "parallel": "fsdp", "save_steps": 100}
    values = settings(tiny_model, title_rows, output, **how)
    process = command(values, script, processes=2, restarts=1)
    _, told = process.communicate(timeout=200)
    assert process.returncode == 0, told
    told = " ".join(told.split())
    assert f"error: step {step}: 2 rows (" in told and "do not fit in memory together; go on with the same" in told
    assert ("resuming from" in told) == (step > 1)
    assert [line.get("micro_batches_halved", 0) for line in log(output)] == [0] * (step - 1) + [1] * (7 - step)
    sft(tiny_model, title_rows, tmp_path / "whole", num_epochs=1)
    assert losses(output) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


# ---- rows that are not finite ------------------------------------------------------------------------------------


@CASES
def test_a_row_that_is_not_finite_costs_its_steps_alone(
    case: int,
    undisturbed: Path,
    tiny_model: Path,
    title_rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its loss, or its gradient alone. Before its first step the run is the undisturbed one."""
    dice = random.Random(100 + case)
    row, value, real = dice.randrange(24), [math.nan, math.inf, -math.inf][case % 3], trainer._sums

    def sums(job: Any, batch: Any) -> Any:
        found = real(job, batch)
        if row in batch.forest.rows:
            if case % 2:
                found.total.register_hook(lambda grad: grad * value)
            else:
                found.total.data.mul_(value)
        return found

    monkeypatch.setattr(trainer, "_sums", sums)
    output = tmp_path / "out"
    result = sft(tiny_model, title_rows, output, micro_batch_size=2, save_steps=1, save_total_limit="none")
    order = json.loads((output / "order.json").read_text())
    bad = [step for step in range(1, 13) if row in order[4 * step - 4 : 4 * step]]
    lines, told = log(output), " ".join(capsys.readouterr().err.split())
    assert len(bad) == 2 and [line["step"] for line in lines if "skipped_rows" in line] == bad
    for step in bad:
        named = [number + 1 for number in order[4 * step - 4 : 4 * step]]
        assert lines[step - 1]["skipped_rows"] == named
        assert f"step {step}: the loss or its gradient is not finite; the step is skipped (rows {named[0]}," in told
    assert result.steps == 12 and math.isfinite(result.last_loss)
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        hashes = [sha(output / f"checkpoint-{step}" / name) for step in range(1, 13)]
        same_as_before = [step for step in range(2, 13) if hashes[step - 1] == hashes[step - 2]]
        assert same_as_before == [step for step in bad if step > 1]
        if bad[0] > 1:
            assert hashes[bad[0] - 2] == sha(undisturbed / f"checkpoint-{bad[0] - 1}" / name)


# ---- checkpoints that rot ----------------------------------------------------------------------------------------


def rot(folder: Path, dice: random.Random) -> str:
    """Damage one file of a checkpoint; returns what was done."""
    path = dice.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    data, kind = bytearray(path.read_bytes()), dice.choice(["flipped", "cut", "gone", "longer", "zeros"])
    at = dice.randrange(len(data))
    if kind == "gone":
        path.unlink()
        return f"{path.name} {kind}"
    changed = {
        "flipped": data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :],
        "cut": data[:at],
        "longer": data + b"\0",
        "zeros": data[:at] + bytes(len(data) - at),
    }[kind]
    path.write_bytes(changed)
    return f"{path.name} {kind} at {at}"


@CASES
def test_a_damaged_newest_checkpoint_is_skipped(
    case: int, undisturbed: Path, tiny_model: Path, title_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dice, output = random.Random(200 + case), tmp_path / "out"
    shutil.copytree(undisturbed, output)
    newest = output / f"checkpoint-{dice.randint(2, 12)}"
    for _, folder in checkpoint.steps(output):
        if int(folder.name.split("-")[1]) > int(newest.name.split("-")[1]):
            shutil.rmtree(folder)
    damage = rot(newest, dice)
    how: dict[str, Any] = {"micro_batch_size": 2, "save_steps": 1, "save_total_limit": "none"}
    named = {"resume_from_checkpoint": str(newest)}
    if damage.startswith("manifest.json") and checkpoint.verify(newest) is None:
        pytest.skip("a manifest whose change says nothing else")  # a space, say
    with pytest.raises(CheckpointError, match=r"checkpoint-\d+ is not whole: .*; use an older one or `latest`"):
        sft(tiny_model, title_rows, output, **how, **named)
    capsys.readouterr()
    sft(tiny_model, title_rows, output, **how, resume_from_checkpoint="latest")
    assert f"{newest} is skipped: " in capsys.readouterr().err, damage
    same(undisturbed, output, 12)
    assert checkpoints(output) == checkpoints(undisturbed) and not leftovers(output)


# ---- another process that is gone ---------------------------------------------------------------------------------


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_step_is_saved_if_a_process_is_lost_after_it(
    evaluated: bool, tiny_model: Path, title_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection breaks after the weights of step 3 have changed: it is whole unless its evaluation is due."""
    real, asked = trainer.all_reduce_sum, [0]

    def all_reduce_sum(values: list[float], processes: Any) -> list[float]:
        asked[0] += sys._getframe(1).f_code.co_name == "_after_step"
        if asked[0] == 3:
            raise RuntimeError("gloo: connection closed by peer")
        return real(values, processes)

    monkeypatch.setattr(trainer, "all_reduce_sum", all_reduce_sum)
    monkeypatch.setattr(trainer, "connection_lost", lambda error: "gloo" in str(error))
    monkeypatch.setattr(processes, "first_to_speak", lambda: True)
    how = {"val_set_size": 4, "eval_steps": 3} if evaluated else {}
    with pytest.raises(Abandoned):
        sft(tiny_model, title_rows, tmp_path / "cut", save_steps=2, **how)
    assert checkpoints(tmp_path / "cut") == ([2] if evaluated else [2, 3])
    monkeypatch.undo()
    sft(tiny_model, title_rows, tmp_path / "whole", save_steps=2, **how)
    sft(tiny_model, title_rows, tmp_path / "cut", save_steps=2, resume_from_checkpoint="latest", **how)
    same(tmp_path / "cut", tmp_path / "whole", 10 if evaluated else 12)


# ---- disks that fill ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, pytest.param(COUNT, marks=pytest.mark.slow)])
def test_a_disk_that_fills_at_a_random_byte(count: int) -> None:
    """A script of its own, because it mounts small file systems; see there."""
    script = Path(__file__).parents[1] / "full_disk.py"
    if shutil.which("unshare") is None:
        pytest.skip("this machine lets nobody mount a file system")
    done = subprocess.run(
        ["unshare", "-mr", sys.executable, str(script), str(count)], capture_output=True, text=True, check=False
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("this machine lets nobody mount a file system")
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{count} of {count} full disks: nothing lost" in done.stdout
