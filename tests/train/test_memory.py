"""Free pages of the heap go back to the system only where a process holds more than it may, or before it needs more."""

from __future__ import annotations

import torch

from byeori.train import memory


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


def holes() -> tuple[int, torch.Tensor]:
    """A heap full of holes: the bytes that were held, and the block at its end, which keeps it from shrinking."""
    kept = [torch.ones(16_000) for _ in range(2_000)]  # small blocks, which are the heap's
    return memory.resident_bytes(), kept[-1]
