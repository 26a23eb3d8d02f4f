"""Preference losses on pairs of answers: DPO and its kin, as sums over pairs.

With log-probs of whole answers under the trained model (p_c, p_r) and the reference (r_c, r_r), the margin of the
implicit rewards is h = (p_c - r_c) - (p_r - r_r), and with mean log-probs per token it is h' (a bar over them):

    sigmoid  -(1 - e) log s(b h) - e log s(-b h)                 DPO, arXiv:2305.18290; e is label_smoothing
    ipo      (h' - 1 / (2 b))^2                                  IPO, arXiv:2310.12036, per token as TRL has it
    hinge    max(0, 1 - b h)                                     SLiC, arXiv:2305.10425
    simpo    -log s(b (p'_c - p'_r) - g)                         SimPO, arXiv:2405.14734; no reference
    orpo     -p'_c - b log s(odds(p'_c) - odds(p'_r))            ORPO, arXiv:2403.07691; no reference
             with odds(q) = q - log(1 - e^q)

P: pairs. s is the logistic function, b is beta, g is gamma.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

REFERENCE_FREE = ("simpo", "orpo")
LOSSES = ("sigmoid", "ipo", "hinge", *REFERENCE_FREE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """Which loss, and its numbers. loss: one of LOSSES. gamma: SimPO's target margin."""

    loss: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma: float = 0.5

    @property
    def needs_reference(self) -> bool:
        """Whether the loss looks at a reference model."""
        return self.loss not in REFERENCE_FREE


def answer_sums(logprobs: torch.Tensor, owner: torch.Tensor, answers: int) -> torch.Tensor:
    """Sum of the log-probs of each answer [answers], from those of its targets [M] and whose they are [M]."""
    return logprobs.new_zeros(answers).index_add(0, owner, logprobs)


def pair_losses(
    how: Preference,
    policy: torch.Tensor,
    reference: torch.Tensor | None,
    lengths: torch.Tensor,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of every pair [P], and what is logged of each [P].

    policy, reference: [2 P] log-probs of whole answers, chosen and rejected in turn; reference is None (and taken as
    zero) for the losses that need none. lengths: [2 P] trained tokens of each answer.
    """
    if reference is None:
        reference = torch.zeros_like(policy)
    gain = policy - reference
    chosen, rejected = gain[0::2], gain[1::2]
    mean_chosen, mean_rejected = (gain / lengths)[0::2], (gain / lengths)[1::2]
    if how.loss == "sigmoid":
        margin = how.beta * (chosen - rejected)
        loss = -(1 - how.label_smoothing) * F.logsigmoid(margin) - how.label_smoothing * F.logsigmoid(-margin)
    elif how.loss == "ipo":
        loss = (mean_chosen - mean_rejected - 1 / (2 * how.beta)).square()
    elif how.loss == "hinge":
        loss = torch.relu(1 - how.beta * (chosen - rejected))
    elif how.loss == "simpo":
        loss = -F.logsigmoid(how.beta * (mean_chosen - mean_rejected) - how.gamma)
    else:
        odds = _log_odds(mean_chosen) - _log_odds(mean_rejected)
        loss = -mean_chosen - how.beta * F.logsigmoid(odds)
    rewards = how.beta * gain.detach()
    answers = policy.detach()
    return loss, {
        "rewards_chosen": rewards[0::2],
        "rewards_rejected": rewards[1::2],
        "margin": rewards[0::2] - rewards[1::2],
        "accuracy": (rewards[0::2] > rewards[1::2]).to(rewards.dtype),
        "logprobs_chosen": answers[0::2],
        "logprobs_rejected": answers[1::2],
        # E[log p - log r] over the model's own answers is not at hand; over the data's answers it is a rough estimate
        "kl": (gain.detach()[0::2] + gain.detach()[1::2]) / 2,
    }


def _log_odds(mean: torch.Tensor) -> torch.Tensor:
    """log(q / (1 - q)) of q = e^mean; log(1 - e^mean) by expm1, which keeps its digits where q is near 1."""
    return mean - torch.log(-torch.expm1(mean))
