"""The loss of fine-tuning: weighted negative log-likelihoods, added up."""

from __future__ import annotations

import torch

from byeori.losses.base import Targets
from byeori.losses.sft import SFT, sft_sum


def test_sum_by_hand() -> None:
    targets = Targets(weights=torch.tensor([1.0, 0.0, 2.0]), owner=torch.zeros(3, dtype=torch.long), examples=1)
    assert sft_sum(torch.tensor([-1.0, -2.0, -0.5]), targets).total.item() == 2.0
    assert SFT.weight([3, 4]) == 7
