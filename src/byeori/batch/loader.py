"""Which rows make which optimizer step.

Everything is a pure function of the seed, so the position in a run is one number (the next step), and a resumed run
gets the rows it would have got. A step's rows do not depend on the number of processes or on the packing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# group_by_length sorts within windows of this many steps, as transformers does, so that the order stays random.
_WINDOW_STEPS = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """The steps of a run.

    rows: number of training rows. batch_size: rows per step; the last step of an epoch may have fewer.
    total_steps: optimizer steps of the whole run. lengths: [rows], the tokens of each row, for group_by_length.
    """

    rows: int
    batch_size: int
    steps_per_epoch: int
    total_steps: int
    seed: int
    lengths: np.ndarray | None = None


def schedule(
    rows: int,
    *,
    batch_size: int,
    num_epochs: float,
    max_steps: int | None,
    seed: int,
    lengths: np.ndarray | None = None,
) -> Schedule:
    """Return the steps of `num_epochs` (a fraction ends within an epoch), or of `max_steps` if that is fewer."""
    per_epoch = math.ceil(rows / batch_size)
    total = max(1, math.ceil(num_epochs * per_epoch - 1e-6))  # 1.1 * 10 is a little more than 11
    return Schedule(
        rows=rows,
        batch_size=batch_size,
        steps_per_epoch=per_epoch,
        total_steps=min(total, max_steps) if max_steps else total,
        seed=seed,
        lengths=lengths,
    )


def epoch_order(plan: Schedule, epoch: int) -> np.ndarray:
    """Return [rows]: the order of the rows in an epoch."""
    random = np.random.default_rng((plan.seed, epoch))
    order = random.permutation(plan.rows)
    if plan.lengths is None:
        return order
    window = plan.batch_size * _WINDOW_STEPS
    lengths = plan.lengths
    windows = [order[start : start + window] for start in range(0, len(order), window)]
    order = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in windows])
    whole = len(order) // plan.batch_size * plan.batch_size
    batches = random.permutation(order[:whole].reshape(-1, plan.batch_size))
    return np.concatenate([batches.reshape(-1), order[whole:]])


def step_rows(plan: Schedule, step: int, orders: dict[int, np.ndarray]) -> np.ndarray:
    """Return [at most batch_size]: the rows of a step. `orders` caches the current epoch's order between calls."""
    epoch, index = divmod(step, plan.steps_per_epoch)
    if epoch not in orders:
        orders.clear()
        orders[epoch] = epoch_order(plan, epoch)
    return orders[epoch][index * plan.batch_size : (index + 1) * plan.batch_size]
