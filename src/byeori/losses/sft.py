"""Supervised fine-tuning: the negative log-likelihood of the trained tokens."""

from __future__ import annotations

import torch

from byeori.losses.base import Objective, Sums, Targets


def sft_sum(logprobs: torch.Tensor, targets: Targets) -> Sums:
    """Return the sum of -w log p over the targets; a step divides by its number of trained tokens.

    logprobs: [M] float32.
    """
    return Sums(total=-(logprobs * targets.weights).sum(), logged={})


SFT = Objective(sums=sft_sum, weight=lambda counts: float(sum(counts)))
