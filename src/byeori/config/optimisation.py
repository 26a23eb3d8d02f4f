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


# names of transformers and its neighbours
_OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "lion_32bit": "lion",
    "paged_lion": "paged_lion_32bit",
}
_MOMENTUM = {"muon": 0.95, "sgd": 0.0, "schedule_free_sgd": 0.9}


def _optimizer(value: object) -> object:
    return _OPTIMIZERS.get(value, value) if isinstance(value, str) else value


class OptimisationSettings(Settings):
    """How long a run goes on, its learning rate, and its optimizer."""

    num_epochs: float = setting("Passes over the training rows.", 3, ESSENTIAL, gt=0, le=10_000)
    max_steps: OptionalInt = setting(
        "Stop after this many optimizer steps.", None, OPTIMISATION, ge=1, le=1_000_000_000
    )
    learning_rate: float = setting(
        "Peak learning rate. With finetune full the default is 2e-5.", 2e-4, ESSENTIAL, gt=0, le=10
    )
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
    optim: Annotated[
        Literal[
            "adamw",
            "adamw_8bit",
            "paged_adamw_32bit",
            "paged_adamw_8bit",
            "muon",
            "adafactor",
            "schedule_free_adamw",
            "schedule_free_sgd",
            "lion",
            "lion_8bit",
            "paged_lion_32bit",
            "paged_lion_8bit",
            "sgd",
        ],
        BeforeValidator(_optimizer),
    ] = setting(
        "Optimizer. muon is for matrices, with adamw for everything else; lion, 8-bit and paged states are those of "
        "bitsandbytes, schedule_free those of schedulefree. Names of transformers such as adamw_torch are accepted.",
        "adamw",
        OPTIMISATION,
    )
    weight_decay: float = setting("Decoupled weight decay, of matrices only.", 0.0, OPTIMISATION, ge=0, le=1)
    adam_beta1: float = setting("beta1 of AdamW and Lion.", 0.9, OPTIMISATION, ge=0, lt=1)
    adam_beta2: OptionalFloat = setting(
        "beta2 of AdamW and Lion. none is 0.999, or 0.99 for lion.", None, OPTIMISATION, ge=0, lt=1
    )
    adam_epsilon: float = setting("AdamW epsilon.", 1e-8, OPTIMISATION, gt=0, le=1)
    momentum: OptionalFloat = setting(
        "Momentum of muon, sgd and schedule_free_sgd. none is 0.95 for muon, 0 for sgd and 0.9 for schedule_free_sgd.",
        None,
        OPTIMISATION,
        ge=0,
        lt=1,
    )
    max_grad_norm: float = setting(
        "Maximum gradient norm. Larger gradients are clipped; 0 turns clipping off.", 1.0, OPTIMISATION, ge=0
    )

    @model_validator(mode="before")
    @classmethod
    def _rate_stays(cls, values: Any) -> Any:
        """A schedule-free optimizer has no schedule unless one is given, which is refused below."""
        free = isinstance(values, dict) and str(values.get("optim")).startswith("schedule_free")
        return {"lr_scheduler": "constant"} | values if free else values

    @model_validator(mode="after")
    def _optimizer_fits(self) -> Self:
        name, fields = self.optim, type(self).model_fields
        if name.startswith("schedule_free") and self.lr_scheduler != "constant":
            raise ValueError(f"optim {name} needs no lr_scheduler; leave {self.lr_scheduler} out")
        if name == "schedule_free_sgd" and self.momentum == 0:
            raise ValueError("optim schedule_free_sgd needs a momentum above 0")
        has = {"momentum"} if name in _MOMENTUM else set()
        has |= {"adam_beta1", "adam_beta2"} if "adamw" in name or "lion" in name or name == "muon" else set()
        has |= {"adam_epsilon"} if "adamw" in name or name == "muon" else set()
        for setting_name in ("momentum", "adam_beta1", "adam_beta2", "adam_epsilon"):
            if setting_name not in has and getattr(self, setting_name) != fields[setting_name].default:
                raise ValueError(f"{setting_name} does not apply to optim {name}; leave it out")
        return self

    @property
    def betas(self) -> tuple[float, float]:
        """Return both betas of AdamW or Lion."""
        usual = 0.99 if "lion" in self.optim else 0.999
        return self.adam_beta1, usual if self.adam_beta2 is None else self.adam_beta2

    @property
    def momentum_or_default(self) -> float:
        """Return the momentum of the optimizer, 0 for one that has none of that name."""
        return _MOMENTUM.get(self.optim, 0.0) if self.momentum is None else self.momentum

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
