"""Nothing is lost: checks that fail or are killed, models that fail their check, links, leftovers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import forks
from byeori.errors import ModelError
from byeori.export import merge_check
from byeori.export.merge import merge
from byeori.export.safetensors_folder import SafetensorsFolder


class Failing(SafetensorsFolder):
    def check(self, folder: Path, model: Any, on_progress: Any) -> tuple[dict[str, Any], str]:
        return {}, "the last layer is missing"


def verdict(folder: Path) -> str:
    return str(json.loads((folder / "merge_report.json").read_text(encoding="utf-8"))["verdict"])


@pytest.mark.parametrize("failure", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_check_that_fails_keeps_the_model(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def fails(*args: Any) -> None:
        raise failure

    monkeypatch.setattr(merge_check._Check, "_logits", fails)
    result = merge(adapter=trained, base=None, output_dir=tmp_path / "merged")
    assert result.verdict == verdict(tmp_path / "merged") == "not checked"
    assert "was not checked" in result.notes[-1] and (tmp_path / "merged" / "model.safetensors").is_file()


def test_a_check_that_would_not_fit_is_not_begun(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_check.memory, "available_bytes", lambda device: 1000)
    result = merge(adapter=trained, base=None, output_dir=tmp_path / "merged")
    assert result.verdict == "not checked" and "the check needs 0.0 GiB and 0.0 GiB are free" in result.notes[-1]


KILLED = """
import os, sys
from pathlib import Path
from byeori.export import merge_check
from byeori.export.merge import merge
merge_check.compare = lambda *args: os.kill(os.getpid(), 9)
merge(adapter=sys.argv[1], base=None, output_dir=Path(sys.argv[2]))
"""


def test_a_check_that_is_killed_keeps_the_model(trained: Path, tmp_path: Path) -> None:
    assert forks.run("-c", KILLED, trained, tmp_path / "merged").returncode == -9
    assert verdict(tmp_path / "merged") == "not checked"
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_folder_of_the_users_is_not_taken_for_a_model_that_failed(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "merged.failed").mkdir()
    (tmp_path / "merged.failed" / "thesis.txt").write_text("years of work")
    for _ in range(2):  # the second one takes the place of the first
        with pytest.raises(ModelError, match=r"left in .*merged\.failed-2, do not use it"):
            merge(adapter=trained, base=None, output_dir=tmp_path / "merged", output_format=Failing())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged.failed", "merged.failed-2"]
    assert verdict(tmp_path / "merged.failed-2") == "different"
    assert (tmp_path / "merged.failed" / "thesis.txt").read_text() == "years of work"


def test_leftovers_of_killed_merges_are_cleared_and_links_stay(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "merged").symlink_to(tmp_path / "disk" / "model")
    dead, alive = (tmp_path / "disk" / f".model.{process}-ab12.tmp" for process in (1_000_000, os.getppid()))
    dead.mkdir(), alive.mkdir()
    (dead / "model.safetensors").write_bytes(bytes(1000))
    merge(adapter=trained, base=None, output_dir=tmp_path / "merged", verify=False)
    assert (tmp_path / "merged").is_symlink() and verdict(tmp_path / "disk" / "model") == "not checked"
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == [alive.name, "model"]
