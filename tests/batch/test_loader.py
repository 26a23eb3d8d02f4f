"""Which rows make which step: a pure function of the seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from byeori.batch import loader
from drawn import drawn


def plan(rows: int, batch: int, epochs: float = 1, **changes: object) -> loader.Schedule:
    values: dict[str, object] = {"batch_size": batch, "num_epochs": epochs, "max_steps": None, "seed": 1}
    return loader.schedule(rows, **values | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "batch", "epochs", "max_steps", "steps"),
    [
        (10, 4, 1, None, 3),
        (10, 4, 2, None, 6),
        (10, 4, 0.5, None, 2),  # half of 3 steps, rounded up
        (10, 4, 0.01, None, 1),
        (40, 4, 1.1, None, 11),  # 1.1 * 10 is 11.000000000000002 in floating point
        (40, 4, 0.7, None, 7),
        (10, 4, 3, 5, 5),
        (10, 4, 1, 100, 3),
        (3, 8, 2, None, 2),
    ],
)
def test_steps_by_hand(rows: int, batch: int, epochs: float, max_steps: int | None, steps: int) -> None:
    assert plan(rows, batch, epochs, max_steps=max_steps).total_steps == steps


@drawn(60)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 2**32 - 1), st.booleans())
def test_an_epoch_meets_every_row_once(rows: int, batch: int, seed: int, by_length: bool) -> None:
    lengths = np.random.default_rng(seed).integers(1, 100, rows) if by_length else None
    schedule = plan(rows, batch, 2, seed=seed, lengths=lengths)
    orders: dict[int, np.ndarray] = {}
    steps = [loader.step_rows(schedule, step, orders) for step in range(schedule.total_steps)]
    per_epoch = schedule.steps_per_epoch
    for epoch in (steps[:per_epoch], steps[per_epoch:]):
        assert [len(rows_) for rows_ in epoch[:-1]] == [batch] * (per_epoch - 1)
        assert sorted(np.concatenate(epoch).tolist()) == list(range(rows))


def test_a_step_needs_no_history() -> None:
    schedule, orders = plan(23, 4, 3), {}  # type: ignore[var-annotated]
    walked = [loader.step_rows(schedule, step, orders).tolist() for step in range(schedule.total_steps)]
    assert walked == [loader.step_rows(schedule, step, {}).tolist() for step in range(schedule.total_steps)]


def test_epochs_and_seeds_differ() -> None:
    schedule = plan(50, 5, 2)
    first = loader.epoch_order(schedule, 0).tolist()
    assert first != loader.epoch_order(schedule, 1).tolist()
    assert first != loader.epoch_order(plan(50, 5, 2, seed=2), 0).tolist()
    assert first == loader.epoch_order(plan(50, 5, 2), 0).tolist()


def test_group_by_length_puts_like_with_like() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 83)
    schedule = plan(83, 4, 1, lengths=lengths)
    steps = [lengths[loader.step_rows(schedule, step, {})] for step in range(schedule.total_steps)]
    assert max(np.ptp(step) for step in steps) < 150  # of 1,000; rows at random differ by 600 on average
    assert len(steps[-1]) == 3 and steps[-1].max() == np.sort(lengths)[2]  # the smaller batch has the shortest rows
    means = [float(step.mean()) for step in steps]
    assert means != sorted(means, reverse=True)  # the batches themselves come in random order
