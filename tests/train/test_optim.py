"""The learning rate of each step is transformers' own."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from byeori.train import optim


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("total", "warmup"), [(10, 0), (10, 3), (10, 10), (1, 0), (7, 1)])
def test_equals_get_scheduler(kind: str, total: int, warmup: int) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    name = "constant_with_warmup" if kind == "constant" else kind
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        rate = optim.learning_rate(step, total=total, warmup=warmup, kind=kind, peak=3e-4)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=0)
        optimizer.step()
        scheduler.step()


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
    assert optim.warmup_count(total, steps, ratio) == expected


def test_adamw_first_step_by_hand() -> None:
    """m = g/10, v = g^2/1000, both corrected to g and g^2: the first step is lr * (sign(g) + decay * w)."""
    weight = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = optim.adamw([weight], betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.1)
    optimizer.param_groups[0]["lr"] = 0.01
    weight.grad = torch.tensor([-3.0], dtype=torch.float64)
    optimizer.step()
    assert weight.item() == pytest.approx(2.0 - 0.01 * 0.1 * 2.0 + 0.01, rel=1e-8)
