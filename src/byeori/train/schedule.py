"""The learning rate of each step, by transformers' own schedules."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

_FLOOR = 0.1  # of the peak, where cosine_with_min_lr is given none
_DECAY = 0.1  # of the steps, in which warmup_stable_decay falls


def warmup_count(total: int, steps: int | None, ratio: float) -> int:
    """Return the warmup steps: `steps` if given, else `ratio` of all steps (rounded up), at most all of them."""
    return min(total, math.ceil(total * ratio) if steps is None else steps)


def arguments(
    kind: str,
    *,
    total: int,
    warmup: int,
    peak: float,
    floor: float | None = None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what a schedule is given besides the number of steps.

    floor: of the rate, as a share of its peak. more: arguments of transformers' schedule, which come first.
    """
    own: dict[str, Any] = {}
    if kind.startswith("cosine_w") and kind.endswith("min_lr") and "min_lr" not in (more or {}):
        own["min_lr_rate"] = _FLOOR if floor is None else floor
    if kind == "polynomial":
        own["lr_end"] = peak * (floor or 0.0)
    if kind == "warmup_stable_decay":
        own["min_lr_ratio"] = floor or 0.0
        if "num_stable_steps" not in (more or {}):
            own["num_decay_steps"] = min(total - warmup, math.ceil(total * _DECAY))
    return own | dict(more or {})


def learning_rate(
    step: int, *, total: int, warmup: int, kind: str, peak: float, more: Mapping[str, Any] | None = None
) -> float:
    """Return the rate of a step, counted from 0. kind: a name of transformers' `lr_scheduler_type`.

    It rises linearly over `warmup` steps (also before `constant`), from 0 or warmup_stable_decay's floor, and follows
    the schedule then.
    more: see `arguments`.
    """
    name = "constant_with_warmup" if kind == "constant" else kind
    return peak * _factor(name, total, warmup, peak, json.dumps(more or {}))(step)


@functools.lru_cache(maxsize=8)
def _factor(kind: str, total: int, warmup: int, peak: float, more: str) -> Callable[[int], float]:
    from transformers import get_scheduler

    stand_in = torch.optim.SGD([torch.nn.Parameter(torch.empty(0))], lr=peak)  # schedules read its rate
    scheduler = get_scheduler(
        kind,
        stand_in,
        num_warmup_steps=warmup,
        num_training_steps=total,
        scheduler_specific_kwargs=json.loads(more),
    )
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return factor
