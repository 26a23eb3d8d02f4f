"""What `byeori plan`, and a run that chooses by the plan, read of the training settings."""

from __future__ import annotations

from byeori.commands._model import objective_of, variant_of
from byeori.config import TrainSettings
from byeori.losses.base import Objective
from byeori.plan.rehearser import PlannedRun
from byeori.plan.trained import Adapter, Full


def planned_run(settings: TrainSettings, objective: Objective | None = None) -> PlannedRun:
    """Return the settings that decide a run's memory and speed; None where they leave the choice to the plan.

    objective: that of the settings by default.
    """
    checkpointing = settings.gradient_checkpointing
    adapter = Adapter(
        r=settings.lora_r,
        alpha=settings.lora_alpha,
        dropout=settings.lora_dropout,
        targets=tuple(settings.lora_target_modules),
        variant=variant_of(settings),
    )
    whole = Full(layers=settings.train_layers, masters=settings.master_weights, rows=adapter.variant.rows)
    four_bit = False if settings.finetune == "full" else settings.load_in_4bit
    return PlannedRun(
        objective=objective or objective_of(settings),
        adapter=adapter if settings.finetune == "lora" else whole,
        dtype=settings.dtype,
        recompute=None if checkpointing == "auto" else checkpointing,
        four_bit=None if four_bit == "auto" else four_bit,
        eight_bit=settings.load_in_8bit,
        parallel=settings.parallel,
        micro_batch_size=settings.micro_batch_size,
        micro_batch_tokens=settings.micro_batch_tokens,
        share_prefixes=settings.share_prefixes != "off",
        speed=tuple(settings.speed),
        optim=settings.optim,
        momentum=settings.momentum_or_default,
        cpu_offload=settings.cpu_offload,
        all_trained=settings.train_on_inputs,
    )
