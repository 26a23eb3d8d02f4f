"""What a run is given (Job, Options) and what changes while it goes on (Progress)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from byeori.batch import loader
from byeori.data.tokenized import Rows
from byeori.distributed.processes import Processes
from byeori.errors import TrainingError
from byeori.losses.base import Objective
from byeori.train.mirror import Mirror


class Interrupted(TrainingError):
    """The run was asked to stop; a checkpoint was written first."""


class Abandoned(TrainingError):
    """Another process of the run ended. One of the others has reported it before this is raised, because torchrun may
    end them at any moment."""


class Again(TrainingError):
    """Sharded rows did not fit in memory: the run can go on in smaller micro-batches, in new processes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The settings of a run that its loop needs, resolved."""

    optim: str
    learning_rate: float
    lr_scheduler: str
    lr_scheduler_kwargs: dict[str, Any]
    warmup: int
    betas: tuple[float, float]
    epsilon: float
    momentum: float
    weight_decay: float
    master_weights: str | None
    max_grad_norm: float
    micro_batch_size: int | None
    micro_batch_tokens: int
    share_prefixes: bool
    one_at_a_time: bool
    neftune_noise_alpha: float
    loraplus_lr_ratio: float
    embedding_learning_rate: float | None
    seed: int
    logging_steps: int
    eval_steps: int | None
    save_steps: int | None
    save_total_limit: int | None
    early_stopping_patience: int | None
    report_to: list[str]


@dataclass(kw_only=True)
class Progress:
    """What changes while a run goes on; every checkpoint has its `state()`.

    halvings: how often micro-batches are halved, because memory ran out.
    """

    step: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    bad_steps: int = 0
    last_loss: float = math.nan
    first_loss: float = math.nan
    tokens: int = 0
    unique_tokens: int = 0
    halvings: int = 0

    def state(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        return dict(vars(self))

    def restore(self, state: dict[str, Any]) -> None:
        """Restore it from a checkpoint."""
        for key in vars(self):
            setattr(self, key, state.get(key, getattr(self, key)))


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that a run needs.

    write_sidecar: writes what stands next to an adapter (tokenizer, template, settings) into a folder.
    mirror: where checkpoints are copied to. planned_bytes: the peak that the plan expects, as train/memory.py measures
    it; 0 without a plan. sample: answers a few rows that were held out, at every evaluation.
    """

    model: Any
    train_rows: Rows
    eval_rows: Rows | None
    objective: Objective
    schedule: loader.Schedule
    options: Options
    processes: Processes
    output_dir: Path
    write_sidecar: Callable[[Path], object]
    settings: dict[str, Any]
    resume: Path | None = None
    mirror: Mirror | None = None
    planned_bytes: int = 0
    sample: Callable[[], list[dict[str, str]]] | None = None
