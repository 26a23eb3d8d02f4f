"""The learning rate of each step: values by hand, and the steps of transformers' own scheduler."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import Any

import pytest
import torch
from transformers import get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from byeori.config import SftSettings
from byeori.config.base import check, choices
from byeori.config.optimisation import SCHEDULE_KWARGS
from byeori.errors import ConfigError
from byeori.train import schedule

KINDS = choices(SftSettings.model_fields["lr_scheduler"].annotation)
NEEDED = {"base_model": "m", "data_path": "d", "output_dir": "o"}


def rates(kind: str, total: int, warmup: int, peak: float = 1.0, **how: Any) -> list[float]:
    more = schedule.arguments(kind, total=total, warmup=warmup, peak=peak, **how)
    return [
        schedule.learning_rate(step, total=total, warmup=warmup, kind=kind, peak=peak, more=more)
        for step in range(total)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("total", "warmup"), [(10, 0), (10, 3), (10, 10), (1, 0), (7, 1)])
def test_equals_get_scheduler(kind: str, total: int, warmup: int) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    name = "constant_with_warmup" if kind == "constant" else kind
    more = schedule.arguments(kind, total=total, warmup=warmup, peak=3e-4)
    scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=total, scheduler_specific_kwargs=more
    )
    for step, rate in enumerate(rates(kind, total, warmup, 3e-4)):
        if step:  # polynomial divides by zero where warmup is the whole run, one step after its end
            optimizer.step()
            scheduler.step()
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=0)


@pytest.mark.parametrize(
    ("kind", "how", "expected"),
    [
        ("linear", {}, [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ("constant", {}, [0, 0.5, 1, 1, 1, 1]),
        ("cosine", {}, [0, 0.5, 1, 0.5 + math.sqrt(2) / 4, 0.5, 0.5 - math.sqrt(2) / 4]),
        ("cosine_with_min_lr", {}, [0, 0.5, 1, 0.55 + 0.9 * math.sqrt(2) / 4, 0.55, 0.55 - 0.9 * math.sqrt(2) / 4]),
        ("cosine_with_min_lr", {"floor": 0.5}, [0, 0.5, 1, 0.75 + math.sqrt(2) / 8, 0.75, 0.75 - math.sqrt(2) / 8]),
        ("polynomial", {"floor": 0.2}, [0, 0.5, 1, 0.8, 0.6, 0.4]),
        ("polynomial", {"floor": 0.2, "more": {"power": 2.0}}, [0, 0.5, 1, 0.65, 0.4, 0.25]),
        ("warmup_stable_decay", {"floor": 0.2}, [0.2, 0.6, 1, 1, 1, 1]),  # warmup starts from the floor
        (
            "warmup_stable_decay",
            {"floor": 0.2, "more": {"num_decay_steps": 2, "decay_type": "linear"}},
            [0.2, 0.6, 1, 1, 1, 0.6],
        ),
    ],
)
def test_by_hand(kind: str, how: dict[str, Any], expected: list[float]) -> None:
    assert rates(kind, 6, 2, **how) == pytest.approx(expected, rel=1e-12)


def test_wsd_falls_in_the_last_tenth() -> None:
    found = rates("warmup_stable_decay", 100, 10, floor=0.1)
    assert found[10:91] == [1.0] * 81
    assert found[95] == pytest.approx(0.55)
    assert all(before > after for before, after in itertools.pairwise(found[90:]))


def test_a_decay_longer_than_what_warmup_leaves_is_shortened() -> None:
    assert rates("warmup_stable_decay", 10, 10) == pytest.approx([step / 10 for step in range(10)])


@pytest.mark.parametrize(
    ("total", "steps", "ratio", "expected"),
    [
        (100, None, 0.0, 0),
        (100, None, 0.03, 3),
        (10, None, 0.11, 2),
        (100, 7, 0.5, 7),
        (5, 9, 0.0, 5),
        (100, 0, 0.5, 0),
    ],
)
def test_warmup_by_hand(total: int, steps: int | None, ratio: float, expected: int) -> None:
    assert schedule.warmup_count(total, steps, ratio) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_of_arguments_is_that_of_transformers(kind: str) -> None:
    name = "constant_with_warmup" if kind == "constant" else kind
    taken = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[name]).parameters
    common = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    assert set(SCHEDULE_KWARGS.get(kind, ())) == set(taken) - common


def test_names_of_other_trainers() -> None:
    assert check(SftSettings, NEEDED | {"lr_scheduler": "wsd"}).lr_scheduler == "warmup_stable_decay"
    assert check(SftSettings, NEEDED | {"lr_scheduler": "constant_with_warmup"}).lr_scheduler == "constant"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"min_lr_ratio": 0.1}, "min_lr_ratio does not apply to lr_scheduler linear; use one of cosine_with_min_lr, "),
        ({"lr_scheduler": "cosine", "min_lr_ratio": "0.1"}, "lr_scheduler cosine; use cosine_with_min_lr"),
        ({"lr_scheduler_kwargs": {"power": 2}}, "linear has no argument 'power'; it has none"),
        (
            {"lr_scheduler": "wsd", "lr_scheduler_kwargs": '{"num_decay_step": 3}'},
            r"no argument 'num_decay_step' \(did you mean num_decay_steps\?\)",
        ),
    ],
)
def test_arguments_without_effect_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check(SftSettings, NEEDED | given)
