"""Unfinished results: what survives, what is refused, and who may write."""

from __future__ import annotations

from pathlib import Path

import pytest

from byeori.errors import CheckpointError
from byeori.support import journal


def test_items_stay_if_the_body_fails_and_go_when_it_is_done(tmp_path: Path) -> None:
    output = tmp_path / "a.jsonl"
    with pytest.raises(RuntimeError), journal.unfinished(output, {"seed": 1}, overwrite="--overwrite") as kept:
        kept.add("a", {"text": "봄"})
        raise RuntimeError
    with journal.unfinished(output, {"seed": 1}, overwrite="--overwrite") as kept:
        assert kept.items == {"a": {"text": "봄"}}
        kept.add("b", 2)
    assert not journal.part_of(output).exists()


@pytest.mark.parametrize("torn", [b'{"name": "b", "item": [1', b"\0\0\0\0\n", b"[]\n", b'"x"'])
def test_a_damaged_end_costs_one_item(tmp_path: Path, torn: bytes) -> None:
    output = tmp_path / "a.jsonl"
    with pytest.raises(RuntimeError), journal.unfinished(output, 1, overwrite=None) as kept:
        kept.add("a", 1)
        raise RuntimeError
    with journal.part_of(output).open("ab") as file:
        file.write(torn)
    with pytest.raises(RuntimeError), journal.unfinished(output, 1, overwrite=None) as kept:
        assert kept.items == {"a": 1}
        kept.add("b", 2)
        raise RuntimeError
    with journal.unfinished(output, 1, overwrite=None) as kept:
        assert kept.items == {"a": 1, "b": 2}


def test_items_of_other_settings(tmp_path: Path) -> None:
    output = tmp_path / "a.jsonl"
    with pytest.raises(RuntimeError), journal.unfinished(output, 1, overwrite=None) as kept:
        kept.add("a", 1)
        raise RuntimeError
    with (
        pytest.raises(CheckpointError, match="--overwrite to start anew"),
        journal.unfinished(output, 2, overwrite="--overwrite"),
    ):
        pass
    with journal.unfinished(output, 2, overwrite=None) as kept:
        assert kept.items == {}


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        journal.unfinished(tmp_path / "a", 1, overwrite=None),
        pytest.raises(CheckpointError, match="another process is writing"),
        journal.unfinished(tmp_path / "a", 1, overwrite=None),
    ):
        pass


def test_a_device_has_nothing_beside_it() -> None:
    with journal.unfinished(Path("/dev/null"), 1, overwrite=None) as kept:
        kept.add("a", 1)
        assert kept.items == {"a": 1}
    assert not journal.part_of(Path("/dev/null")).exists()
