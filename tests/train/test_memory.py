"""Free pages of the heap go back to the system only where a process holds more than it may, or before it needs more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from byeori.train import memory
from runs import log, losses, sft


def test_pages_go_back_above_a_limit_only() -> None:
    full, _kept = holes()
    free = memory.resident_bytes()
    memory.give_back(torch.device("cpu"), above=free + 2**30)
    assert memory.resident_bytes() > free - 2**20
    memory.give_back(torch.device("cpu"), above=free - 2**20)
    assert memory.resident_bytes() < full - 64 * 2**20


def test_pages_go_back_before_a_micro_batch_larger_than_any_before() -> None:
    pages = memory.Pages(torch.device("cpu"), limit=2**50)
    pages.before(100)
    full, _kept = holes()
    free = memory.resident_bytes()
    pages.before(100)
    assert memory.resident_bytes() > free - 2**20
    pages.before(101)
    assert memory.resident_bytes() < full - 64 * 2**20


def test_a_peak_is_that_of_its_run() -> None:
    cpu = torch.device("cpu")
    large = torch.ones(64 * 2**20)
    before = memory.peak_memory_bytes(cpu)
    del large
    memory.reset_peak(cpu)
    assert memory.peak_memory_bytes(cpu) < before - 200 * 2**20
    again = torch.ones(16 * 2**20)
    assert memory.peak_memory_bytes(cpu) > memory.resident_bytes() - 2**20
    del again


@pytest.mark.parametrize("alone", [False, True])
def test_a_micro_batch_is_split_before_the_kernel_ends_the_process(
    alone: bool, tiny_model: Path, title_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most of what was free in the first layer is gone in the second. A row alone is computed as far as it goes."""
    asked: list[int] = []

    def available(device: torch.device) -> int:
        asked.append(1)
        return 2**27 if len(asked) == 2 else 2**32

    sft(tiny_model, title_rows, tmp_path / "undisturbed", max_steps=2)
    monkeypatch.setattr(memory, "available_bytes", available)
    sft(tiny_model, title_rows, tmp_path / "out", max_steps=2, micro_batch_size=1 if alone else 2)
    assert bool(asked) is not alone
    halved = [line.get("micro_batches_halved", 0) for line in log(tmp_path / "out")]
    assert halved == [0 if alone else 1] * len(halved)
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "undisturbed"), rel=1e-5)


def holes() -> tuple[int, torch.Tensor]:
    """A heap full of holes: the bytes that were held, and the block at its end, which keeps it from shrinking."""
    kept = [torch.ones(16_000) for _ in range(2_000)]  # small blocks, which are the heap's
    return memory.resident_bytes(), kept[-1]
