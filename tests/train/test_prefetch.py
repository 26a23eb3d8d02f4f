"""Steps made ready ahead: the same steps, one ahead, errors where they belong, no thread left behind."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from byeori.train import prefetch
from byeori.train.prefetch import ahead
from runs import log, sft, sha

CPU = torch.device("cpu")


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("byeori-ahead")]


def test_it_is_one_step_ahead_and_in_order() -> None:
    made: list[int] = []
    seen = []
    with ahead(lambda step: made.append(step) or step * step, range(3, 7), CPU) as steps:
        for square in steps:
            seen.append(square)
            time.sleep(0.05)
            assert made == list(range(3, min(7, 3 + len(seen) + 1)))
    assert seen == [9, 16, 25, 36]
    assert not threads()


def test_it_works_in_another_thread() -> None:
    with ahead(lambda step: threading.current_thread().name, range(2), CPU) as steps:
        assert all(name.startswith("byeori-ahead") for name in steps)


def test_an_error_is_raised_where_its_step_is_taken() -> None:
    def make(step: int) -> int:
        if step == 1:
            raise ValueError("row 17")
        return step

    with ahead(make, range(5), CPU) as steps:
        assert next(steps) == 0
        with pytest.raises(ValueError, match="row 17"):
            next(steps)
    assert not threads()


def test_leaving_early_ends_the_thread() -> None:
    made: list[int] = []
    with pytest.raises(KeyboardInterrupt), ahead(lambda step: made.append(step), range(100), CPU) as steps:
        next(steps)
        raise KeyboardInterrupt
    assert not threads()
    assert len(made) <= 2


def test_no_steps() -> None:
    with ahead(lambda step: step, range(0), CPU) as steps:
        assert list(steps) == []


def test_a_run_is_the_same_without_it(
    tiny_model: Path, title_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sft(tiny_model, title_rows, tmp_path / "ahead", val_set_size=4)
    monkeypatch.setattr(prefetch, "_taken", lambda pool, make, steps: map(make, steps))
    sft(tiny_model, title_rows, tmp_path / "plain", val_set_size=4)
    assert log(tmp_path / "ahead", timeless=True) == log(tmp_path / "plain", timeless=True)
    adapters = [tmp_path / name / "adapter_model.safetensors" for name in ("ahead", "plain")]
    assert sha(adapters[0]) == sha(adapters[1])
    assert not threads()
