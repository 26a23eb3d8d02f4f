"""Micro-batches and tokens of a run whose rows are assumed."""

from __future__ import annotations

from typing import Any

from byeori.batch import forest, loader
from byeori.plan import workload


def test_assumed_rows() -> None:
    schedule = loader.schedule(100, batch_size=8, num_epochs=2, max_steps=None, seed=0)
    rows: dict[str, Any] = {"cutoff_len": 512, "mean": 256, "rows": 100, "schedule": schedule, "tokens": 4096}
    single = workload.assumed(**rows, per_row=1, size=4)
    assert [micro.size for micro in single.micro_batches] == [4, 2, 1]
    assert forest.build(single.micro_batches[0].largest).unique_tokens == 4 * 511
    assert single.tokens == 200 * 255
    pairs = workload.assumed(**rows, per_row=2, size=2)
    assert forest.build(pairs.micro_batches[-1].largest).unique_tokens == 512 - 64 + 2 * 63  # the prompt counts once
    budget = workload.assumed(**rows, per_row=1, size=None)
    assert [micro.tokens for micro in budget.micro_batches] == [4096, 2048, 1024, 512]
    assert [len(micro.largest) for micro in budget.micro_batches] == [8, 4, 2, 1]
