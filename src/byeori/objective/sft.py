"""Supervised fine-tuning: the negative log-likelihood of the trained tokens."""

from __future__ import annotations

import torch


def sft_sum(logprobs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum of -w * log p over the targets; the step divides by the global sum of weights.

    logprobs: [M] float32. weights: [M]. Returns a scalar.
    """
    return -(logprobs * weights).sum()
