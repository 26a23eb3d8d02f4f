"""Settings of the steps: how many, how large, and which optimizer makes them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, model_validator

from byeori.config.base import ESSENTIAL, OPTIMISATION, OptionalFloat, OptionalInt, Settings, from_json, setting
from byeori.support.suggestions import nearest

_FLOORS = ("cosine_with_min_lr", "cosine_warmup_with_min_lr", "polynomial", "warmup_stable_decay")
# the arguments of transformers' schedules; tests/train/test_schedule.py compares them with its own
_CYCLES = ("num_cycles",)
SCHEDULE_KWARGS: dict[str, tuple[str, ...]] = {
    "cosine": _CYCLES,
    "cosine_with_restarts": _CYCLES,
    "cosine_with_min_lr": (*_CYCLES, "min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": (*_CYCLES, "min_lr", "min_lr_rate", "warmup_lr_rate"),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
    "warmup_stable_decay": (
        *("num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio"),
        *_CYCLES,
    ),
}


def _schedule(value: object) -> object:
    names = {"wsd": "warmup_stable_decay", "constant_with_warmup": "constant"}
    return names.get(value, value) if isinstance(value, str) else value


class OptimisationSettings(Settings):
    """How long a run goes on, its learning rate, and its optimizer."""

    num_epochs: float = setting("Passes over the training rows.", 3, ESSENTIAL, gt=0, le=10_000)
    max_steps: OptionalInt = setting(
        "Stop after this many optimizer steps.", None, OPTIMISATION, ge=1, le=1_000_000_000
    )
    learning_rate: float = setting("Peak learning rate.", 2e-4, ESSENTIAL, gt=0, le=10)
    lr_scheduler: Annotated[
        Literal[
            "linear",
            "cosine",
            "cosine_with_min_lr",
            "warmup_stable_decay",
            "polynomial",
            "constant",
            "inverse_sqrt",
            "cosine_with_restarts",
            "cosine_warmup_with_min_lr",
        ],
        BeforeValidator(_schedule),
    ] = setting(
        "Learning rate schedule after warmup, by the names of transformers; also wsd for warmup_stable_decay.",
        "linear",
        OPTIMISATION,
    )
    min_lr_ratio: OptionalFloat = setting(
        "Lowest learning rate of a schedule with a floor, as a fraction of the peak. none is 0.1 for "
        "cosine_with_min_lr and 0 for warmup_stable_decay and polynomial.",
        None,
        OPTIMISATION,
        ge=0,
        lt=1,
    )
    lr_scheduler_kwargs: Annotated[dict[str, Any] | None, BeforeValidator(from_json)] = setting(
        "Further arguments of transformers' schedule as JSON, such as '{\"num_decay_steps\": 100}'. "
        "warmup_stable_decay falls in the last tenth of the steps unless they say otherwise.",
        None,
        OPTIMISATION,
        metavar="JSON",
    )
    warmup_steps: OptionalInt = setting("Steps of linear warmup. Overrides warmup_ratio.", None, OPTIMISATION, ge=0)
    warmup_ratio: float = setting("Fraction of all steps used for warmup.", 0.0, OPTIMISATION, ge=0, lt=1)
    optim: Literal["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = setting(
        "Optimizer. adamw is PyTorch's; the others are bitsandbytes' with 8-bit or paged states.", "adamw", OPTIMISATION
    )
    weight_decay: float = setting("Decoupled weight decay of AdamW.", 0.0, OPTIMISATION, ge=0, le=1)
    adam_beta1: float = setting("AdamW beta1.", 0.9, OPTIMISATION, ge=0, lt=1)
    adam_beta2: float = setting("AdamW beta2.", 0.999, OPTIMISATION, ge=0, lt=1)
    adam_epsilon: float = setting("AdamW epsilon.", 1e-8, OPTIMISATION, gt=0, le=1)
    max_grad_norm: float = setting(
        "Maximum gradient norm. Larger gradients are clipped; 0 turns clipping off.", 1.0, OPTIMISATION, ge=0
    )

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        kind, given = self.lr_scheduler, self.lr_scheduler_kwargs or {}
        if self.min_lr_ratio is not None and kind not in _FLOORS:
            floor = "cosine_with_min_lr" if kind == "cosine" else f"one of {', '.join(_FLOORS)}"
            raise ValueError(f"min_lr_ratio does not apply to lr_scheduler {kind}; use {floor}")
        known = SCHEDULE_KWARGS.get(kind, ())
        if unknown := [name for name in given if name not in known]:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(
                f"lr_scheduler_kwargs: {kind} has no argument {unknown[0]!r}{nearest(unknown[0], list(known))}; {has}"
            )
        return self
