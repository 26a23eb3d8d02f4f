"""AdamW (Loshchilov & Hutter, arXiv:1711.05101) and the learning rate of each step."""

from __future__ import annotations

import math

import torch


def adamw(
    parameters: list[torch.nn.Parameter], *, betas: tuple[float, float], epsilon: float, weight_decay: float
) -> torch.optim.AdamW:
    """PyTorch's AdamW; the learning rate is set before every step."""
    return torch.optim.AdamW(parameters, lr=0.0, betas=betas, eps=epsilon, weight_decay=weight_decay)


def warmup_count(total: int, steps: int | None, ratio: float) -> int:
    """Warmup steps: `steps` where given, else `ratio` of all steps (rounded up), never more than there are."""
    return min(total, math.ceil(total * ratio) if steps is None else steps)


def learning_rate(step: int, *, total: int, warmup: int, kind: str, peak: float) -> float:
    """The rate of a step, counted from 0; the same as transformers' get_scheduler.

    Rises linearly from 0 over `warmup` steps, then stays (constant), falls to 0 in a line (linear) or over half a
    cosine (cosine) at step `total`.
    """
    if step < warmup:
        return peak * step / max(1, warmup)
    if kind == "constant":
        return peak
    done = (step - warmup) / max(1, total - warmup)
    if kind == "linear":
        return peak * max(0.0, 1.0 - done)
    return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))
