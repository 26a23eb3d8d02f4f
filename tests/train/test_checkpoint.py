"""A checkpoint appears whole or not at all, and nothing but a whole one is read."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import forks
from adapters import small_adapter, stepped, trained
from byeori import cli
from byeori.artifacts import layout
from byeori.errors import CheckpointError
from byeori.support import atomic_files
from byeori.train import checkpoint, log
from runs import checkpoints, environment, flags, leftovers, losses, settings, sft, sha


def write(folder: Path, step: int = 2) -> tuple[Any, torch.optim.AdamW]:
    adapter, optimizer = stepped(step)
    checkpoint.save(folder, checkpoint.snapshot(adapter, optimizer, {"step": step}).write)
    return adapter, optimizer


def damage_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


# ---- in the folder -----------------------------------------------------------------------------------------------


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    adapter, optimizer = write(tmp_path / "checkpoint-2")
    assert {path.name for path in (tmp_path / "checkpoint-2").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.safetensors",
        "trainer_state.json",
        "manifest.json",
    }
    assert checkpoint.verify(tmp_path / "checkpoint-2") is None
    other = small_adapter(9)
    fresh = torch.optim.AdamW(trained(other), lr=0.1)
    state = checkpoint.load_training_state(tmp_path / "checkpoint-2", other, fresh)
    assert state == {"step": 2}
    for mine, theirs in zip(trained(other), trained(adapter), strict=True):
        assert torch.equal(mine, theirs)
        for key, value in optimizer.state[theirs].items():
            assert torch.equal(fresh.state[mine][key], value)


def test_an_optimizer_without_moments_can_be_saved(tmp_path: Path) -> None:
    """The run's first steps were all skipped."""
    adapter = small_adapter()
    optimizer = torch.optim.AdamW(trained(adapter))
    folder = tmp_path / "checkpoint-1"
    checkpoint.save(folder, checkpoint.snapshot(adapter, optimizer, {"step": 1}).write)
    assert checkpoint.verify(folder) is None
    other = small_adapter(1)
    assert checkpoint.load_training_state(folder, other, torch.optim.AdamW(trained(other))) == {"step": 1}


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut short": (lambda f: (f / "optimizer.safetensors").write_bytes(b"abc"), "optimizer.safetensors is damaged"),
    "one bit": (lambda f: damage_byte(f / "adapter_model.safetensors"), "adapter_model.safetensors is damaged"),
    "file gone": (lambda f: (f / "optimizer.safetensors").unlink(), "optimizer.safetensors is missing"),
    "state gone": (lambda f: (f / "trainer_state.json").unlink(), "trainer_state.json is missing"),
    "state edited": (lambda f: (f / "trainer_state.json").write_text('{"step": 99}'), "trainer_state.json is damaged"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "it has no manifest"),
    "half a manifest": (lambda f: (f / "manifest.json").write_text('{"sha256": {"adap'), "it has no manifest"),
    "a list for a manifest": (lambda f: (f / "manifest.json").write_text("[]"), "it has no manifest"),
    "null for a manifest": (lambda f: (f / "manifest.json").write_text('{"sha256": null}'), "it has no manifest"),
    "an empty manifest": (lambda f: (f / "manifest.json").write_text('{"sha256": {}}'), "does not list adapter_model"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_seen_and_named(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-2"
    adapter, optimizer = write(folder)
    spoil, words = DAMAGE[kind]
    spoil(folder)
    assert words in str(checkpoint.verify(folder))
    before = [parameter.detach().clone() for parameter in trained(adapter)]
    with pytest.raises(CheckpointError, match=r"is not whole: .*; use an older one or `latest`"):
        checkpoint.load_training_state(folder, adapter, optimizer)
    assert all(map(torch.equal, before, trained(adapter)))


def test_newest_passes_over_what_is_damaged(tmp_path: Path) -> None:
    for step in (2, 10, 9):  # by number, not by name
        write(tmp_path / f"checkpoint-{step}", step)
    (tmp_path / "checkpoint-final").mkdir()
    (tmp_path / "checkpoint-11").write_text("no folder")
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoint-10"
    damage_byte(tmp_path / "checkpoint-10" / "optimizer.safetensors")
    told: list[str] = []
    assert checkpoint.newest(tmp_path, told.append) == tmp_path / "checkpoint-9"
    assert told == [f"{tmp_path / 'checkpoint-10'} is skipped: optimizer.safetensors is damaged"]
    assert checkpoint.newest(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("keep", "best", "latest", "left"),
    [
        (None, None, 5, [1, 2, 3, 4, 5]),
        (2, None, 5, [4, 5]),
        (1, 2, 5, [2, 5]),
        (9, None, 5, [1, 2, 3, 4, 5]),
        (1, None, 3, [3, 4, 5]),  # resumed at 2, now at 3: 4 and 5 are of the earlier run
    ],
)
def test_prune(keep: int | None, best: int | None, latest: int, left: list[int], tmp_path: Path) -> None:
    write(tmp_path / "checkpoint-1")
    for step in range(2, 6):
        shutil.copytree(tmp_path / "checkpoint-1", tmp_path / f"checkpoint-{step}")
    checkpoint.prune(tmp_path, keep, best=best, latest=latest)
    assert checkpoints(tmp_path) == left


@pytest.mark.parametrize(
    ("damaged", "left"),
    [({5}, [4, 5]), ({4, 5}, [3, 5]), ({3, 5}, [4, 5]), ({2, 3, 4, 5}, [1, 5]), ({1, 2, 3, 4, 5}, [5]), ({4}, [5])],
    ids=str,
)
def test_prune_never_takes_the_only_whole_one(damaged: set[int], left: list[int], tmp_path: Path) -> None:
    write(tmp_path / "checkpoint-1")
    for step in range(2, 6):
        shutil.copytree(tmp_path / "checkpoint-1", tmp_path / f"checkpoint-{step}")
    for step in damaged:
        damage_byte(tmp_path / f"checkpoint-{step}" / "optimizer.safetensors")
    checkpoint.prune(tmp_path, 1, best=None, latest=5)
    assert checkpoints(tmp_path) == left


def test_saving_again_replaces(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint-2", 2)
    before = sha(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    write(tmp_path / "checkpoint-2", 3)
    assert sha(tmp_path / "checkpoint-2" / "adapter_model.safetensors") != before
    assert checkpoint.verify(tmp_path / "checkpoint-2") is None
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_sweep_takes_what_a_killed_run_left(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-4.123.tmp" / "deep").mkdir(parents=True)
    (tmp_path / "checkpoint-2").mkdir()
    atomic_files.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_final_files_with_folders_can_be_moved_in_twice(tmp_path: Path) -> None:
    (tmp_path / "train_log.jsonl").write_text("kept")
    for _ in range(2):
        with atomic_files.files_into(tmp_path) as folder:
            (folder / "additional_chat_templates").mkdir()
            (folder / "additional_chat_templates" / "tool.jinja").write_text("x")
            (folder / "adapter_config.json").write_text("{}")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == [
        "adapter_config.json",
        "additional_chat_templates/tool.jinja",
        "train_log.jsonl",
    ]
    assert not leftovers(tmp_path)


# ---- adapters as a start -----------------------------------------------------------------------------------------


def test_a_finished_adapter_brings_weights_only(tmp_path: Path) -> None:
    adapter = small_adapter(1)
    checkpoint.save(tmp_path / "x", lambda f: None)  # a folder of any kind
    checkpoint.save_adapter(tmp_path / "adapter", adapter)
    other = small_adapter(2)
    assert checkpoint.load_training_state(tmp_path / "adapter", other, torch.optim.AdamW(trained(other))) is None
    assert all(map(torch.equal, trained(adapter), trained(other)))


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch " + os.environ["BYEORI_TEST_BOMB"],))


def test_a_pickle_is_refused_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BYEORI_TEST_BOMB", str(tmp_path / "exploded"))
    checkpoint.save_adapter(tmp_path / "adapter", small_adapter())
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"only a pickle \(adapter_model.bin\), which is never loaded"):
        checkpoint.load_adapter(tmp_path / "adapter", small_adapter())
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ({"r": 3}, "was trained with --lora_r 3, not 2"),
        ({"lora_alpha": 8}, "was trained with --lora_alpha 8, not 4"),
        ({"target_modules": ["q_proj", "v_proj"]}, "has layers that this run does not train"),
        ({"target_modules": ["v_proj"]}, "has layers that this run does not train"),
    ],
    ids=str,
)
def test_another_adapter_is_refused(saved: dict[str, Any], words: str, tmp_path: Path) -> None:
    checkpoint.save_adapter(tmp_path, small_adapter(1, **saved))
    with pytest.raises(CheckpointError, match=words):
        checkpoint.load_adapter(tmp_path, small_adapter(2))


def test_an_adapter_of_fewer_layers_is_refused(tmp_path: Path) -> None:
    checkpoint.save_adapter(tmp_path, small_adapter(1))
    with pytest.raises(CheckpointError, match=r"lacks layers \(.*v_proj.*\); use the same --lora_target_modules"):
        checkpoint.load_adapter(tmp_path, small_adapter(2, target_modules=["q_proj", "v_proj"]))


def test_an_adapter_of_another_shape_is_refused(tmp_path: Path) -> None:
    checkpoint.save_adapter(tmp_path, small_adapter(1))
    tensors = {
        name: tensor[..., :-1].contiguous()
        for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items()
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="does not fit this run's model and LoRA settings"):
        checkpoint.load_adapter(tmp_path, small_adapter(2))


@pytest.mark.parametrize("content", [b"", b"\xff" * 64], ids=["empty", "noise"])
def test_a_damaged_adapter_is_refused(content: bytes, tmp_path: Path) -> None:
    checkpoint.save_adapter(tmp_path, small_adapter(1))
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.load_adapter(tmp_path, small_adapter(2))


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"there is no checkpoint .*nowhere; give --resume_from_checkpoint a folder"
    ):
        checkpoint.load_training_state(
            tmp_path / "nowhere", small_adapter(), torch.optim.AdamW(trained(small_adapter()))
        )


# ---- the log -----------------------------------------------------------------------------------------------------


def test_the_log_is_cut_at_the_checkpoint(tmp_path: Path) -> None:
    rest = {"epoch": 0.1, "learning_rate": 1e-4, "tokens": 9, "seconds": 0.1, "peak_memory_bytes": 1}
    lines = [{"step": step, "loss": 1.0, **rest} for step in range(1, 6)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / layout.LOG).write_text(text + '{"step": 6, "lo')  # cut short by a crash
    assert log.read(tmp_path) == lines
    writer = log.RunLog(tmp_path, after_step=3)
    writer.write({"step": 4, "loss": 2.0, **rest})
    assert log.read(tmp_path) == [*lines[:3], {"step": 4, "loss": 2.0, **rest}]
    log.RunLog(tmp_path, after_step=None)
    assert log.read(tmp_path) == []
    assert not leftovers(tmp_path)


# ---- a disk that is full -----------------------------------------------------------------------------------------

FULL: list[Exception] = [
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    Exception("No space left on device (os error 28)"),  # what tokenizers raises
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_full_disk_is_one_sentence(
    error: Exception,
    tiny_model: Path,
    title_rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real, calls = checkpoint.save_file, [0]

    def save(*arguments: Any, **named: Any) -> None:
        calls[0] += 1
        if calls[0] > 2:  # adapter and optimizer of the first checkpoint
            raise error
        real(*arguments, **named)

    monkeypatch.setattr(checkpoint, "save_file", save)
    output = tmp_path / "out"
    values = settings(tiny_model, title_rows, output, num_epochs=1, save_steps=2)
    assert cli.main(["sft", *flags(values)]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told == (
        f"error: the disk is full: {output}/checkpoint-4 could not be written; the last whole checkpoint is "
        f"{output}/checkpoint-2; free space and go on with --resume_from_checkpoint latest"
    )
    assert checkpoints(output) == [2] and not leftovers(output)
    assert checkpoint.verify(output / "checkpoint-2") is None
    monkeypatch.undo()
    assert sft(tiny_model, title_rows, output, num_epochs=1, save_steps=2, resume_from_checkpoint="latest").steps == 6
    assert len(losses(output)) == 6


def test_another_error_is_not_called_a_full_disk(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        checkpoint.save(tmp_path / "checkpoint-1", fill)
    assert list(tmp_path.iterdir()) == []


def test_a_log_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = log.RunLog(tmp_path, after_step=None)
    monkeypatch.setattr(Path, "open", lambda *a, **k: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(CheckpointError, match=r"the disk is full: .*train_log.jsonl could not be written"):
        writer.write({"step": 1})


def size(folder: Path) -> int:
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


def test_a_disk_that_is_really_full(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    """A file system with room for one checkpoint and a half."""
    disk = tmp_path / "disk"
    disk.mkdir()
    values = settings(tiny_model, title_rows, disk / "out", save_steps=2, num_epochs=1)
    sft(tiny_model, title_rows, tmp_path / "measured", save_steps=2, max_steps=2)
    room = int(size(tmp_path / "measured" / "checkpoint-2") * 1.5) // 4096 * 4
    copied = tmp_path / "kept"
    script = (
        f'mount -t tmpfs -o size={room}k tmpfs {disk} || exit 77; "$@"; code=$?; cp -a {disk}/out {copied}; exit $code'
    )
    done = (
        subprocess.run(
            ["unshare", "-mr", "sh", "-c", script, "sh", sys.executable, "-m", "byeori", "sft", *flags(values)],
            capture_output=True,
            text=True,
            env=environment(),
            timeout=120,
            check=False,
        )
        if shutil.which("unshare")
        else None
    )
    if done is None or done.returncode in (1, 77):
        pytest.skip("this machine lets nobody mount a file system")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2, done.stderr
    assert last.startswith(f"error: the disk is full: {disk}/out/checkpoint-4 could not be written; the last whole")
    assert "Traceback" not in done.stderr
    assert checkpoints(copied) == [2] and checkpoint.verify(copied / "checkpoint-2") is None
    assert not leftovers(copied)


def test_a_file_size_limit(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    """The operating system refuses the optimizer's file half-way."""
    output = tmp_path / "out"
    wide = {"lora_r": 64}  # the optimizer's file is then the largest of all
    sft(tiny_model, title_rows, output, max_steps=2, **wide)
    written = [path for path in (output / "checkpoint-2").iterdir() if path.name != layout.OPTIMIZER]
    limit = max(path.stat().st_size for path in written) + 4096
    assert (output / "checkpoint-2" / layout.OPTIMIZER).stat().st_size > limit
    script = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    script += "from byeori import cli; sys.exit(cli.main(sys.argv[1:]))"
    values = settings(
        tiny_model, title_rows, output, num_epochs=1, save_steps=4, resume_from_checkpoint="latest", **wide
    )
    done = forks.run("-c", script, "sft", *flags(values), env=environment(), timeout=120)
    assert done.returncode == 2, done.stderr
    assert "checkpoint-4 could not be written" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert checkpoints(output) == [2] and checkpoint.verify(output / "checkpoint-2") is None
