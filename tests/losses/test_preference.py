"""Each preference loss against values worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from byeori.losses.base import Sums, Targets
from byeori.losses.preference import Preference, answers, preference

# Two pairs. Pair 0: chosen of 2 tokens, p = -3, q = -4; rejected of 3 tokens, p = -6, q = -4.5.
# Pair 1: chosen of 1 token, p = -2, q = -1; rejected of 1 token, p = -1, q = -0.5.
LOGPROBS = [-1.0, -2.0, -1.0, -2.0, -3.0, -2.0, -1.0]
REFERENCE = [-2.0, -2.0, -1.5, -1.5, -1.5, -1.0, -0.5]
OWNER = [0, 0, 1, 1, 1, 2, 3]
H = [(-3 + 4) - (-6 + 4.5), (-2 + 1) - (-1 + 0.5)]  # 2.5 and -0.5
MEANS = [(-1.5, -2.0), (-2.0, -1.0)]
REFERENCE_MEANS = [(-2.0, -1.5), (-1.0, -0.5)]


def targets(*, reference: bool = True) -> Targets:
    return Targets(
        weights=torch.ones(7, dtype=torch.float64),
        owner=torch.tensor(OWNER),
        examples=4,
        reference=torch.tensor(REFERENCE, dtype=torch.float64) if reference else None,
    )


def compute(loss: str, **constants: Any) -> Sums:
    objective = preference(Preference(loss=loss, **constants))
    return objective.sums(torch.tensor(LOGPROBS, dtype=torch.float64), targets(reference=objective.reference))


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def odds(mean: float) -> float:
    return mean - math.log(1 - math.exp(mean))


HAND: list[tuple[str, dict[str, float], float]] = [
    ("sigmoid", {"beta": 0.1}, sum(-log_sigmoid(0.1 * h) for h in H)),
    (
        "sigmoid",
        {"beta": 0.5, "label_smoothing": 0.1},
        sum(-0.9 * log_sigmoid(0.5 * h) - 0.1 * log_sigmoid(-0.5 * h) for h in H),
    ),
    ("hinge", {"beta": 0.5}, max(0.0, 1 - 1.25) + max(0.0, 1 + 0.25)),
    # means: pair 0 (-1.5 + 2) - (-2 + 1.5) = 1, pair 1 (-2 + 1) - (-1 + 0.5) = -0.5; 1 / (2 * 0.25) = 2
    ("ipo", {"beta": 0.25}, (1 - 2) ** 2 + (-0.5 - 2) ** 2),
    ("simpo", {"beta": 2.0, "gamma": 0.5}, -log_sigmoid(2 * 0.5 - 0.5) - log_sigmoid(2 * -1.0 - 0.5)),
    (
        "orpo",
        {"beta": 0.2},
        sum(-c - 0.2 * log_sigmoid(odds(c) - odds(r)) for c, r in MEANS),
    ),
]


@pytest.mark.parametrize(("loss", "constants", "expected"), HAND, ids=lambda value: str(value)[:20])
def test_by_hand(loss: str, constants: dict[str, float], expected: float) -> None:
    assert compute(loss, **constants).total.item() == pytest.approx(expected, rel=1e-12)


def test_what_is_logged() -> None:
    logged = {name: value.item() for name, value in compute("sigmoid", beta=0.1).logged.items()}
    assert logged["rewards_chosen"] == pytest.approx(0.1 * (1 - 1))
    assert logged["rewards_rejected"] == pytest.approx(0.1 * (-1.5 - 0.5))
    assert logged["margin"] == pytest.approx(0.1 * sum(H))
    assert logged["accuracy"] == 1  # of two pairs
    assert (logged["logps_chosen"], logged["logps_rejected"]) == (-5, -7)
    back = [q - p for p, q in zip(LOGPROBS, REFERENCE, strict=True)]
    k3 = [math.exp(d) - 1 - d for d in back]
    answers_k3 = [sum(k3[:2]) / 2, sum(k3[2:5]) / 3, k3[5], k3[6]]
    assert logged["kl"] == pytest.approx(sum(answers_k3) / 2)  # the mean of a pair's two answers, summed over pairs


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge", "simpo", "orpo"])
def test_names_that_are_logged_are_the_names_that_are_announced(loss: str) -> None:
    objective = preference(Preference(loss=loss, beta=0.1))
    assert set(compute(loss, beta=0.1).logged) == set(objective.logged)
    assert objective.weight([2, 3, 1, 1]) == 2 and objective.row_kind == "preference"


def test_without_a_reference_rewards_are_means() -> None:
    logged = compute("simpo", beta=2.0).logged
    assert logged["rewards_chosen"].item() == pytest.approx(2 * (-1.5 - 2.0))
    assert "kl" not in logged


def test_at_the_reference_the_loss_is_log_two() -> None:
    values = torch.tensor(REFERENCE, dtype=torch.float64)
    sums = preference(Preference(loss="sigmoid", beta=0.3)).sums(values, targets())
    assert sums.total.item() == pytest.approx(2 * math.log(2), rel=1e-12)
    assert sums.logged["kl"].item() == 0 and sums.logged["accuracy"].item() == 0


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge", "simpo", "orpo"])
def test_gradients(loss: str) -> None:
    objective = preference(Preference(loss=loss, beta=0.3))
    logprobs = torch.tensor(LOGPROBS, dtype=torch.float64, requires_grad=True)
    known = targets(reference=objective.reference)
    assert torch.autograd.gradcheck(lambda values: objective.sums(values, known).total, (logprobs,))


def test_answers_weigh_their_tokens() -> None:
    weighted = Targets(
        weights=torch.tensor([1.0, 0.0, 1, 1, 1, 1, 1]), owner=torch.tensor(OWNER), examples=4, reference=None
    )
    found = answers(torch.tensor(LOGPROBS), weighted)
    assert found.sums.tolist() == [[-1, -6], [-2, -1]] and found.means[0, 0].item() == -1


def test_long_answers_keep_their_difference_in_float32() -> None:
    # 3,000 tokens of log-prob -7 or so sum to -21,000, where float32 has steps of 0.002; p and q differ by 1e-5 a token
    generator = torch.Generator().manual_seed(0)
    reference = -7 - torch.rand(6000, generator=generator, dtype=torch.float64)
    shift = 1e-5 * torch.rand(6000, generator=generator, dtype=torch.float64)
    logprobs, reference = (reference + shift).float(), reference.float()
    owner = torch.arange(6000) // 3000
    exact = (logprobs.double() - reference.double()).view(2, 3000).sum(1)
    pair = Targets(weights=torch.ones(6000), owner=owner, examples=2, reference=reference)
    found = answers(logprobs, pair)
    assert found.margin.item() == pytest.approx((exact[0] - exact[1]).item(), abs=1e-6)
