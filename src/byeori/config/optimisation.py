"""Settings of the steps: how many, how large, and which optimizer makes them."""

from __future__ import annotations

from typing import Literal

from byeori.config.base import ESSENTIAL, OPTIMISATION, OptionalInt, Settings, setting


class OptimisationSettings(Settings):
    """How long a run goes on, its learning rate, and its optimizer."""

    num_epochs: float = setting("Passes over the training rows.", 3, ESSENTIAL, gt=0, le=10_000)
    max_steps: OptionalInt = setting(
        "Stop after this many optimizer steps.", None, OPTIMISATION, ge=1, le=1_000_000_000
    )
    learning_rate: float = setting("Peak learning rate.", 2e-4, ESSENTIAL, gt=0, le=10)
    lr_scheduler: Literal["linear", "cosine", "constant"] = setting(
        "Learning rate schedule after warmup.", "linear", OPTIMISATION
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
