"""What an objective is: sums over a micro-batch, and the weight that the whole step is divided by.

    loss of a step = sum over micro-batches and processes of `total` / weight of the step

M targets, E examples
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """The targets of a micro-batch.

    weights: [M]. owner: [M], the example of each target, 0 to E - 1. examples: E.
    reference: [M], the reference model's log-probs, or None if the objective has none.
    """

    weights: torch.Tensor
    owner: torch.Tensor
    examples: int
    reference: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sums:
    """total: what is minimised, a scalar with a gradient. logged: sums of what is logged, scalars without one."""

    total: torch.Tensor
    logged: dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """What a run minimises.

    sums: log-probs [M] and their targets -> sums over the micro-batch.
    weight: target counts of a step's examples -> the number that the step's sums are divided by.
    row_kind: the name of the kind of row it trains on (data/row_kinds.py): answer, preference, or one of your own.
    logged: the names of `Sums.logged`. reference: whether it needs the log-probs of a reference model.
    """

    sums: Callable[[torch.Tensor, Targets], Sums]
    weight: Callable[[Sequence[int]], float]
    row_kind: str = "answer"
    logged: tuple[str, ...] = ()
    reference: bool = False
