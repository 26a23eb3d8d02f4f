"""Each preference loss against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from byeori.objective.dpo import Preference, answer_sums, pair_losses

# one pair: chosen 2 tokens, rejected 4 tokens
POLICY = torch.tensor([-2.0, -8.0], dtype=torch.float64)
REFERENCE = torch.tensor([-3.0, -7.0], dtype=torch.float64)
LENGTHS = torch.tensor([2.0, 4.0], dtype=torch.float64)


def loss_of(reference: torch.Tensor | None = REFERENCE, **settings: float | str) -> float:
    losses, _ = pair_losses(Preference(**settings), POLICY, reference, LENGTHS)  # type: ignore[arg-type]
    assert losses.shape == (1,)
    return losses.item()


def test_sigmoid_is_the_log_loss_of_the_reward_margin() -> None:
    # h = (-2 + 3) - (-8 + 7) = 2, b h = 0.2
    assert loss_of(beta=0.1) == pytest.approx(math.log(1 + math.exp(-0.2)), abs=1e-12)


def test_label_smoothing_mixes_in_the_flipped_pair() -> None:
    expected = 0.9 * math.log(1 + math.exp(-0.2)) + 0.1 * math.log(1 + math.exp(0.2))
    assert loss_of(beta=0.1, label_smoothing=0.1) == pytest.approx(expected, abs=1e-12)


def test_ipo_squares_the_distance_of_the_mean_margin_from_its_target() -> None:
    # mean gains 1/2 and -1/4, margin 3/4, target 1 / (2 * 0.5) = 1
    assert loss_of(loss="ipo", beta=0.5) == pytest.approx(0.0625, abs=1e-12)


def test_hinge_stops_where_the_margin_is_one() -> None:
    assert loss_of(loss="hinge", beta=0.1) == pytest.approx(0.8, abs=1e-12)
    assert loss_of(loss="hinge", beta=0.5) == 0.0


def test_simpo_takes_mean_log_probs_and_a_target_margin() -> None:
    # means -1 and -2, b (1) = 2, minus g = 0.5
    assert loss_of(None, loss="simpo", beta=2.0, gamma=0.5) == pytest.approx(math.log(1 + math.exp(-1.5)), abs=1e-12)


def test_orpo_adds_the_odds_ratio_to_the_likelihood() -> None:
    odds = [math.log(math.exp(mean) / (1 - math.exp(mean))) for mean in (-1.0, -2.0)]
    expected = 1.0 + 0.1 * math.log(1 + math.exp(-(odds[0] - odds[1])))
    assert loss_of(None, loss="orpo", beta=0.1) == pytest.approx(expected, abs=1e-12)


def test_what_is_logged_of_a_pair() -> None:
    _, logged = pair_losses(Preference(beta=0.1), POLICY, REFERENCE, LENGTHS)
    shown = {name: round(value.item(), 9) for name, value in logged.items()}
    assert shown == {
        "rewards_chosen": 0.1,
        "rewards_rejected": -0.1,
        "margin": 0.2,
        "accuracy": 1.0,
        "logprobs_chosen": -2.0,
        "logprobs_rejected": -8.0,
        "kl": 0.0,
    }


def test_answers_are_summed_by_their_owner() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -4.0])
    assert answer_sums(logprobs, torch.tensor([1, 0, 1]), 2).tolist() == [-2.0, -5.0]
