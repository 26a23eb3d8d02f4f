"""A run that was stopped and resumed ends with the bits of one that was not."""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from byeori import cli
from byeori.commands import train
from byeori.errors import CheckpointError
from byeori.losses.base import Sums
from byeori.losses.sft import SFT, sft_sum
from byeori.train import checkpoint
from byeori.train import log as log_module
from byeori.train import state as job
from runs import checkpoints, command, leftovers, log, losses, same, settings, sft, sha, stop_after

NOISY: dict[str, Any] = {"lora_dropout": 0.2, "neftune_noise_alpha": 5.0, "val_set_size": 4, "eval_steps": 4}


def log_steps(output: Path) -> list[int]:
    """The steps of a log that is being written."""
    return [line["step"] for line in log_module.read(output)]


FREE = {"optim": "schedule_free_adamw", "val_set_size": 4, "eval_steps": 4}
OTHERS: list[dict[str, Any]] = [{}, NOISY, {"group_by_length": True, "lr_scheduler": "wsd", "optim": "muon"}, FREE]
PLACES = [1, 6, 8, 9]  # the first step, the end of an epoch, the middle of the second


@pytest.mark.parametrize(
    ("step", "how"),
    [
        pytest.param(step, how, marks=[pytest.mark.slow] * (PLACES.index(step) != OTHERS.index(how)))
        for step in PLACES
        for how in OTHERS
    ],
    ids=str,
)
def test_stopped_and_resumed(
    step: int,
    how: dict[str, Any],
    tiny_model: Path,
    title_rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    how = how | {"max_rows": 23}
    whole = sft(tiny_model, title_rows, tmp_path / "whole", **how)
    stop_after(step, monkeypatch)
    with pytest.raises(job.Interrupted, match=f"stopped at step {step}; everything is in .*checkpoint-{step}; go on"):
        sft(tiny_model, title_rows, tmp_path / "cut", **how)
    monkeypatch.undo()
    assert [line["step"] for line in log(tmp_path / "cut") if "loss" in line] == list(range(1, step + 1))
    resumed = sft(tiny_model, title_rows, tmp_path / "cut", **how, resume_from_checkpoint="latest")
    same(tmp_path / "whole", tmp_path / "cut", whole.steps)
    for name in ("steps", "first_loss", "last_loss", "best_eval_loss", "shared_tokens"):
        assert getattr(resumed, name) == getattr(whole, name), name


def test_resumed_twice_from_a_folder_by_name(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    """A later crash left lines and checkpoints behind: the lines go, and `latest` is not needed."""
    how = {"save_steps": 2, "save_total_limit": "none", "lora_dropout": 0.1}
    sft(tiny_model, title_rows, tmp_path / "whole", **how)
    sft(tiny_model, title_rows, tmp_path / "again", **how)
    for step in (8, 4):
        folder = tmp_path / "again" / f"checkpoint-{step}"
        sft(tiny_model, title_rows, tmp_path / "again", **how, resume_from_checkpoint=str(folder))
        same(tmp_path / "whole", tmp_path / "again", 12)


def test_latest_passes_over_a_damaged_checkpoint(
    tiny_model: Path, title_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = {"save_steps": 4}
    sft(tiny_model, title_rows, tmp_path / "whole", **how)
    sft(tiny_model, title_rows, tmp_path / "out", **how)
    (tmp_path / "out" / "checkpoint-12" / "optimizer.safetensors").write_bytes(b"cut")
    (tmp_path / "out" / "checkpoint-8" / "manifest.json").unlink()
    (tmp_path / "out" / ".checkpoint-10.999.tmp").mkdir()  # a run that was killed while it saved
    capsys.readouterr()
    sft(tiny_model, title_rows, tmp_path / "out", **how, resume_from_checkpoint="latest")
    told = capsys.readouterr().err
    assert f"{tmp_path / 'out' / 'checkpoint-12'} is skipped: optimizer.safetensors is damaged" in told
    assert f"{tmp_path / 'out' / 'checkpoint-8'} is skipped: it has no manifest" in told
    same(tmp_path / "whole", tmp_path / "out", 12)
    assert not leftovers(tmp_path / "out")


def test_no_whole_checkpoint_is_an_error(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    sft(tiny_model, title_rows, tmp_path / "out", max_steps=2)
    (tmp_path / "out" / "checkpoint-2" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole; start over with --overwrite_output_dir"):
        sft(tiny_model, title_rows, tmp_path / "out", resume_from_checkpoint="latest")


def test_latest_of_nothing_starts_at_zero(
    tiny_model: Path, title_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = sft(tiny_model, title_rows, tmp_path / "out", max_steps=2, resume_from_checkpoint="latest")
    assert result.steps == 2
    assert "No checkpoint in" in capsys.readouterr().err


def test_a_finished_run_resumed_changes_nothing(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    first = sft(tiny_model, title_rows, tmp_path / "out", max_steps=3)
    before = sha(tmp_path / "out" / "adapter_model.safetensors")
    again = sft(tiny_model, title_rows, tmp_path / "out", max_steps=3, resume_from_checkpoint="latest")
    assert sha(tmp_path / "out" / "adapter_model.safetensors") == before
    assert (again.steps, again.first_loss, again.last_loss) == (first.steps, first.first_loss, first.last_loss)
    assert len(losses(tmp_path / "out")) == 3


def test_a_longer_run_resumes(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    """The learning rate is constant, so three and three steps are six."""
    how = {"lr_scheduler": "constant"}
    sft(tiny_model, title_rows, tmp_path / "whole", max_steps=6, **how)
    sft(tiny_model, title_rows, tmp_path / "out", max_steps=3, **how)
    sft(tiny_model, title_rows, tmp_path / "out", max_steps=6, resume_from_checkpoint="latest", **how)
    assert sha(tmp_path / "out" / "adapter_model.safetensors") == sha(tmp_path / "whole" / "adapter_model.safetensors")


def test_a_finished_adapter_is_a_start(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    first = sft(tiny_model, title_rows, tmp_path / "one", warmup_steps=0)
    further = sft(tiny_model, title_rows, tmp_path / "two", max_steps=1, resume_from_checkpoint=str(tmp_path / "one"))
    assert further.steps == 1 and further.first_loss < first.first_loss
    start, end = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    # the first step of a warmup has rate 0: the weights are those that were given
    assert all((start[name] == end[name]).all() for name in start)


def test_another_rank_is_refused(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    sft(tiny_model, title_rows, tmp_path / "out", max_steps=2)
    with pytest.raises(CheckpointError, match="--lora_r 4, not 8"):
        sft(tiny_model, title_rows, tmp_path / "out", lora_r=8, resume_from_checkpoint="latest")


def test_ctrl_c_in_a_process(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    how = {"num_epochs": 10, "lora_dropout": 0.1}  # 60 steps
    process = command(settings(tiny_model, title_rows, tmp_path / "cut", **how))
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (tmp_path / "cut" / "train_log.jsonl").is_file() and len(log_steps(tmp_path / "cut")) >= 5:
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.01)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130, told
    last = told.strip().splitlines()[-1]
    (step,) = [step for step in checkpoints(tmp_path / "cut") if step % 6] or checkpoints(tmp_path / "cut")[-1:]
    assert last == (
        f"stopped at step {step}; everything is in {tmp_path / 'cut' / f'checkpoint-{step}'}; go on with the same "
        "command and --resume_from_checkpoint latest"
    )
    assert "Traceback" not in told
    assert checkpoint.verify(tmp_path / "cut" / f"checkpoint-{step}") is None
    resumed = command(settings(tiny_model, title_rows, tmp_path / "cut", **how, resume_from_checkpoint="latest"))
    assert resumed.wait(timeout=120) == 0, resumed.communicate()
    sft(tiny_model, title_rows, tmp_path / "whole", **how)
    same(tmp_path / "whole", tmp_path / "cut", 60)


def test_kill_minus_nine(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    """It comes at any instant: while a checkpoint is written, say, which happens at every step here."""
    how = {"num_epochs": 5, "save_steps": 1, "save_total_limit": 2}
    values = settings(tiny_model, title_rows, tmp_path / "cut", **how)
    process = command(values)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (tmp_path / "cut" / "train_log.jsonl").is_file() and len(log_steps(tmp_path / "cut")) >= 5:
            break
        time.sleep(0.003)
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    whole = checkpoint.newest(tmp_path / "cut")
    assert whole is not None and int(whole.name.split("-")[1]) >= 3  # that of step 4 may be on its way
    sft(tiny_model, title_rows, tmp_path / "cut", **how, resume_from_checkpoint="latest")
    sft(tiny_model, title_rows, tmp_path / "whole", **how)
    same(tmp_path / "whole", tmp_path / "cut", 30)
    assert checkpoints(tmp_path / "cut") == [29, 30] and not leftovers(tmp_path / "cut")


def test_exit_code_and_words_of_an_interrupt(
    tiny_model: Path,
    title_rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop_after(2, monkeypatch)
    before = signal.getsignal(signal.SIGINT)
    values = settings(tiny_model, title_rows, tmp_path / "out")
    assert cli.main(["sft", *(part for name, value in values.items() for part in (f"--{name}", str(value)))]) == 130
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("stopped at step 2; everything is in")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_resumed_run_knows_its_skipped_first_step(
    tiny_model: Path, title_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [0]

    def sums(*arguments: Any) -> Any:
        calls[0] += 1
        return Sums(total=sft_sum(*arguments).total * (math.nan if calls[0] == 1 else 1.0), logged={})

    monkeypatch.setattr(train, "objective_of", lambda _: replace(SFT, sums=sums))
    sft(tiny_model, title_rows, tmp_path / "out", micro_batch_size=4, max_steps=2, save_steps=1)
    monkeypatch.undo()
    state = json.loads((tmp_path / "out" / "checkpoint-1" / "trainer_state.json").read_text())
    assert (state["step"], state["bad_steps"]) == (1, 1)
    resumed = sft(
        tiny_model,
        title_rows,
        tmp_path / "out",
        micro_batch_size=4,
        max_steps=2,
        save_steps=1,
        resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"),
    )
    assert resumed.steps == 2 and math.isfinite(resumed.last_loss)


def test_a_checkpoint_is_not_resumed_with_settings_that_give_its_steps_other_rows(
    tiny_model: Path, title_rows: Path, tmp_path: Path
) -> None:
    sft(tiny_model, title_rows, tmp_path / "out", max_steps=2)
    with pytest.raises(CheckpointError, match="was written with --batch_size 4, not 8; go on with the same settings"):
        sft(tiny_model, title_rows, tmp_path / "out", batch_size=8, resume_from_checkpoint="latest")


@pytest.mark.slow
def test_compiled_layers_and_a_resume(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    """Compiled again for another first length, in a process of its own, the layers compute the same bits."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("there is no C++ compiler")
    how = {"compile": "on", "save_steps": 4, "num_epochs": 1.5, "save_total_limit": "none", "dtype": "bfloat16"}
    for name, resume in (("whole", "none"), ("cut", "latest")):
        if name == "cut":
            shutil.copytree(tmp_path / "whole", tmp_path / "cut")
            shutil.rmtree(tmp_path / "cut" / "checkpoint-9")
            shutil.rmtree(tmp_path / "cut" / "checkpoint-8")
        process = command(settings(tiny_model, title_rows, tmp_path / name, **how, resume_from_checkpoint=resume))
        _, told = process.communicate(timeout=400)
        assert process.returncode == 0, told
        assert "Compiling 2 layers" in told
    same(tmp_path / "whole", tmp_path / "cut", 9)
