"""Files and folders appear whole, or what was there before stays."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from byeori.errors import CheckpointError, DataError
from byeori.support import atomic_files


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_new_file_replaces_the_old_one_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_files.new_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and names(tmp_path) == ["a.txt"]


def test_a_file_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyError), atomic_files.new_file(path) as temporary:
        temporary.write_text("new")
        raise KeyError
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "a.txt")
    atomic_files.write(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "a.txt").read_text() == "text"


def test_a_device_is_written_directly(tmp_path: Path) -> None:
    atomic_files.write(Path(os.devnull), "text")
    assert not Path(os.devnull).is_file()


def test_a_new_folder_replaces_the_old_one_at_the_end(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for text in ("old", "new"):
        with atomic_files.new_folder(folder) as temporary:
            assert names(temporary) == []
            (temporary / "sub").mkdir()
            (temporary / "sub" / text).write_text(text)
            assert not folder.exists() or names(folder) == ["sub", "sub/old"]
    assert names(tmp_path) == ["model", "model/sub", "model/sub/new"]


def test_a_folder_that_fails_or_is_given_up_leaves_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old").write_text("x")
    with pytest.raises(KeyboardInterrupt), atomic_files.new_folder(folder) as temporary:
        (temporary / "new").write_text("x")
        raise KeyboardInterrupt
    with atomic_files.new_folder(folder) as temporary:
        temporary.rename(tmp_path / "model.failed")
    assert names(tmp_path) == ["model", "model.failed", "model/old"]


def test_files_move_in_only_if_all_are_written(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("kept")
    with pytest.raises(KeyError), atomic_files.files_into(tmp_path) as temporary:
        (temporary / "a").write_text("x")
        raise KeyError
    assert names(tmp_path) == ["log"]


def test_leftovers_are_swept_by_name(tmp_path: Path) -> None:
    (tmp_path / ".model.123.tmp" / "deep").mkdir(parents=True)
    (tmp_path / ".kernels.so.9.tmp").write_text("x")
    atomic_files.sweep(tmp_path, "model")
    assert names(tmp_path) == [".kernels.so.9.tmp"]
    atomic_files.sweep(tmp_path)
    assert names(tmp_path) == []


KILLED = """
import os, sys
from pathlib import Path
from byeori.support import atomic_files
if sys.argv[2] == "no exchange":
    atomic_files._exchange = lambda one, other: False
real = Path.rename
def rename(path, target):
    if path.name.endswith(".tmp"):
        os.kill(os.getpid(), 9)
    return real(path, target)
Path.rename = rename
if sys.argv[2] == "writing":
    atomic_files.flush = lambda path: os.kill(os.getpid(), 9)
with atomic_files.new_folder(Path(sys.argv[1])) as temporary:
    (temporary / "new").write_text("x" * 1000)
"""


@pytest.mark.parametrize("where", ["no exchange", "writing"])
def test_killed_between_two_renames_or_while_writing(tmp_path: Path, where: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old").write_text("x")
    (tmp_path / f".model.{os.getpid()}-a.tmp").mkdir()  # of a process that is alive
    (tmp_path / ".models.1000000-a.tmp").mkdir()  # of another folder
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), where])
    assert done.returncode == -9
    assert folder.exists() == (where == "writing")
    atomic_files.recover(folder)
    assert names(tmp_path) == [f".model.{os.getpid()}-a.tmp", ".models.1000000-a.tmp", "model", "model/old"]


def test_a_folder_is_exchanged_and_never_missing(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old").write_text("x")
    (tmp_path / "other").mkdir()
    assert atomic_files._exchange(folder, tmp_path / "other")
    assert names(tmp_path) == ["model", "other", "other/old"]
    assert not atomic_files._exchange(folder, tmp_path / "nothing")


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "there" / "model").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "there" / "model")
    with atomic_files.new_folder(tmp_path / "link") as temporary:
        (temporary / "new").write_text("x")
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "there") == ["model", "model/new"]


def test_a_half_deleted_folder_does_not_come_back(tmp_path: Path) -> None:
    (tmp_path / ".model.1000000-a.gone.tmp").mkdir()
    atomic_files.recover(tmp_path / "model")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("failure", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full: x could not be written; go on"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full: x could not be written; go on"),
        (Exception("No space left on device (os error 28)"), "the disk is full: x could not be written; go on"),
        (PermissionError(errno.EACCES, "Permission denied"), "x could not be written (Permission denied); go on"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_disk_error_is_one_sentence(failure: Exception, sentence: str) -> None:
    with pytest.raises(DataError) as caught, atomic_files.disk_errors("x", advice="go on", error=DataError):
        raise failure
    assert str(caught.value) == sentence


def test_a_disk_error_behind_another_is_found() -> None:
    with pytest.raises(CheckpointError, match="the disk is full"), atomic_files.disk_errors("x"):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            {}["half a file"]


def test_other_errors_pass() -> None:
    for failure in (KeyError("a bug"), DataError("a sentence")):
        with pytest.raises(type(failure)) as caught, atomic_files.disk_errors("x"):
            raise failure
        assert caught.value is failure
