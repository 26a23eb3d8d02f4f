"""Checkpoints that are copied to a URL, and a run that goes on from there on another machine."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

import fsspec
import pytest

from byeori.distributed import processes
from byeori.errors import CheckpointError, ConfigError
from byeori.train import checkpoint, mirror
from runs import checkpoints, log, losses, names, sft, sha


@pytest.fixture(params=["memory", "folder"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory://{uuid.uuid4().hex}/run" if request.param == "memory" else str(tmp_path / "shared" / "run")


def test_another_machine_resumes(url: str, tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    how = {"lr_scheduler": "constant", "save_steps": 2, "save_total_limit": 2}
    sft(tiny_model, title_rows, tmp_path / "whole", **how)
    sft(tiny_model, title_rows, tmp_path / "one", **how, max_steps=6, mirror_to=url)
    assert {name.partition("/")[0] for name in names(url) if name.startswith("checkpoint-")} == {
        "checkpoint-4",  # pruned there as here
        "checkpoint-6",
    }
    assert {"adapter_model.safetensors", "train_log.jsonl"} <= names(url)
    shutil.rmtree(tmp_path / "one")
    sft(tiny_model, title_rows, tmp_path / "two", **how, mirror_to=url, resume_from_checkpoint="latest")
    assert sha(tmp_path / "two" / "adapter_model.safetensors") == sha(tmp_path / "whole" / "adapter_model.safetensors")
    assert losses(tmp_path / "two") == losses(tmp_path / "whole")
    assert [line["step"] for line in log(tmp_path / "two")] == list(range(1, 13))


def test_an_incomplete_copy_is_skipped(
    url: str, tiny_model: Path, title_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft(tiny_model, title_rows, tmp_path / "one", max_steps=6, save_steps=2, mirror_to=url)
    system, root = fsspec.core.url_to_fs(url)
    system.rm(f"{root}/checkpoint-6/manifest.json")  # the manifest is copied last
    system.pipe_file(f"{root}/checkpoint-4/optimizer.safetensors", b"cut")
    copies = mirror.Mirror(url)
    assert copies.steps() == [2, 4]
    said: list[str] = []
    assert copies.fetch_newest(tmp_path / "two", said.append) == tmp_path / "two" / "checkpoint-2"
    assert said == [
        f"{url}/checkpoint-4 is skipped: optimizer.safetensors is damaged",
        f"Fetched {url}/checkpoint-2",
    ]
    assert checkpoint.verify(tmp_path / "two" / "checkpoint-2") is None and checkpoints(tmp_path / "two") == [2]


@pytest.mark.parametrize("name", ["../../stolen", "a/../../../stolen", "/tmp/byeori-stolen", ""])
def test_a_listed_name_leads_nowhere_else(
    name: str, tiny_model: Path, title_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    url = f"memory://{uuid.uuid4().hex}/run"
    sft(tiny_model, title_rows, tmp_path / "one", max_steps=2, save_steps=2, mirror_to=url)
    find = MemoryFileSystem.find
    listed = lambda self, path, **others: [*find(self, path, **others), f"{path}/{name}"]  # noqa: E731
    monkeypatch.setattr(MemoryFileSystem, "find", listed)
    with pytest.raises(CheckpointError, match="would be written outside --output_dir"):
        mirror.Mirror(url).fetch_newest(tmp_path / "two", print)
    assert not (tmp_path / "two").exists() or not any((tmp_path / "two").rglob("*"))


def test_a_password_is_stored_and_shown_nowhere(
    tiny_model: Path, title_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"memory://me:s3cr3t@{uuid.uuid4().hex}/run"
    sft(tiny_model, title_rows, tmp_path / "one", max_steps=2, save_steps=2, mirror_to=url, report_to="tensorboard")
    shutil.rmtree(tmp_path / "one" / "checkpoint-2")
    sft(tiny_model, title_rows, tmp_path / "one", max_steps=2, mirror_to=url, resume_from_checkpoint="latest")
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert b"s3cr3t" not in path.read_bytes(), path
    shown = capsys.readouterr()
    assert "s3cr3t" not in shown.out + shown.err and "memory://***@" in shown.err
    with pytest.raises(ConfigError, match="passwords are not saved with a run; give the whole address"):
        mirror.Mirror("ftp://***@host/x")


def test_a_place_that_fails_ends_the_run_with_one_sentence(
    tiny_model: Path, title_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(MemoryFileSystem, "put_file", refuse)
    with pytest.raises(CheckpointError, match=r"to or from memory://x failed \(Access Denied\); those in --output_dir"):
        sft(tiny_model, title_rows, tmp_path / "out", max_steps=2, mirror_to="memory://x")
    assert checkpoint.newest(tmp_path / "out") == tmp_path / "out" / "checkpoint-2"
    with pytest.raises(ConfigError, match="--mirror_to nosuch://x: "):
        sft(tiny_model, title_rows, tmp_path / "other", max_steps=2, mirror_to="nosuch://x")


def test_machines_that_disagree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines, one of which has another newest checkpoint (the sum over processes is made up)."""
    import torch

    two = processes.Processes(rank=0, world=2, device=torch.device("cpu"))
    monkeypatch.setattr(mirror, "all_reduce_sum", lambda values, _: [values[0] + 10, values[1] + 100])
    mirror.check_agreement(Path("out/checkpoint-10"), two)
    with pytest.raises(CheckpointError, match="would resume from different checkpoints"):
        mirror.check_agreement(Path("out/checkpoint-20"), two)
    with pytest.raises(CheckpointError, match="would resume from different checkpoints"):
        mirror.check_agreement(None, two)
