"""Free pages of the heap go back to the system only where a process holds more than it may."""

from __future__ import annotations

import torch

from byeori.train import memory


def test_pages_go_back_above_a_limit_only() -> None:
    kept = [torch.ones(16_000) for _ in range(2_000)]  # small blocks, which are the heap's
    full = memory.resident_bytes()
    del kept[:-1]  # the last one keeps the end of the heap where it is
    free = memory.resident_bytes()
    memory.give_back(torch.device("cpu"), above=free + 2**30)
    assert memory.resident_bytes() > free - 2**20
    memory.give_back(torch.device("cpu"), above=free - 2**20)
    assert memory.resident_bytes() < full - 64 * 2**20
