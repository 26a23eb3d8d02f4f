"""Which rows make which step: a pure function of the seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from byeori.batch import loader


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


@settings(max_examples=60, deadline=None)
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


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 500), max_size=30), st.integers(1, 5))
def test_processes_share_a_step_without_loss(costs: list[int], world: int) -> None:
    shares = [loader.share_of(rank, world, costs) for rank in range(world)]
    assert sorted(index for share in shares for index in share) == list(range(len(costs)))
    loads = [sum(costs[index] for index in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0)


def test_the_heaviest_row_goes_alone() -> None:
    assert loader.share_of(0, 2, [10, 1, 2, 7]) == [0]
    assert loader.share_of(1, 2, [10, 1, 2, 7]) == [1, 2, 3]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 60))
def test_micro_batches_hold_all_rows_within_the_tokens(costs: list[int], tokens: int) -> None:
    groups = loader.micro_batches(costs, size=None, tokens=tokens)
    assert [index for group in groups for index in group] == list(range(len(costs)))
    assert all(len(group) == 1 or sum(costs[index] for index in group) <= tokens for group in groups)


def test_micro_batches_of_a_size() -> None:
    assert loader.micro_batches([9] * 5, size=2, tokens=1) == [[0, 1], [2, 3], [4]]
    assert loader.micro_batches([], size=2, tokens=1) == []
