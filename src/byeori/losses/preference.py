"""Preference losses on pairs of answers to one prompt.

With c and r the chosen and the rejected answer, p(.) the sum of an answer's log-probs under the model that is trained,
q(.) the same under the reference, n(.) an answer's tokens, and

    h = (p(c) - q(c)) - (p(r) - q(r))        the margin of the model over that of the reference
    m = p(c) / n(c) - p(r) / n(r)

the losses of a pair are

    sigmoid   -(1 - e) log sigma(b h) - e log sigma(-b h)      Rafailov et al., arXiv:2305.18290; e: label smoothing,
                                                               "conservative DPO", https://ericmitchell.ai/cdpo.pdf
    hinge     max(0, 1 - b h)                                  SLiC-HF, Zhao et al., arXiv:2305.10425
    ipo       (h' - 1 / (2 b))^2, h' as h with means for sums  Azar et al., arXiv:2310.12036; per token, as TRL does
    simpo     -log sigma(b m - g)                              Meng et al., arXiv:2405.14734 (no reference)
    orpo      -p(c) / n(c) - b log sigma(log odds(c) - log odds(r)), log odds = l - log(1 - exp l), l = p(.) / n(.)
                                                               Hong et al., arXiv:2403.07691 (no reference)

M targets, E examples, P = E / 2 pairs: example 2 i is the chosen, 2 i + 1 the rejected answer of pair i.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from byeori.losses.base import Objective, Sums, Targets

REFERENCE_FREE = ("simpo", "orpo")
_LOGGED = ("rewards_chosen", "rewards_rejected", "margin", "accuracy", "logps_chosen", "logps_rejected")


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """Which loss, and its constants: beta (b above), label_smoothing (e), gamma (g, SimPO's margin)."""

    loss: str
    beta: float
    label_smoothing: float = 0.0
    gamma: float = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """Log-probs of the pairs' answers.

    sums, means: [P, 2], chosen then rejected. reference_sums, reference_means: the same under the reference, zero
    without one.
    """

    sums: torch.Tensor
    means: torch.Tensor
    reference_sums: torch.Tensor
    reference_means: torch.Tensor

    @property
    def margin(self) -> torch.Tensor:
        """h [P]."""
        return _difference(self.sums - self.reference_sums)


def preference(constants: Preference) -> Objective:
    """Return the objective of a loss; a step divides by its number of pairs."""
    reference = constants.loss not in REFERENCE_FREE
    return Objective(
        sums=partial(pair_sums, constants),
        weight=lambda counts: len(counts) / 2,
        row_kind="preference",
        logged=(*_LOGGED, "kl") if reference else _LOGGED,
        reference=reference,
    )


def pair_sums(constants: Preference, logprobs: torch.Tensor, targets: Targets) -> Sums:
    """Return loss and logged values, summed over pairs. logprobs: [M].

    Logged, as TRL names and measures them: rewards b (p - q) of both answers (b p / n without a reference), their
    margin, the share of pairs whose margin is positive, and p. kl: mean over an answer's tokens of exp(d) - 1 - d,
    d = log q - log p (Schulman's k3, http://joschu.net/blog/kl-approx.html), an estimate of KL(model, reference) on
    these answers.
    """
    pairs = answers(logprobs, targets)
    losses = LOSSES[constants.loss](constants, pairs)
    with torch.no_grad():
        free = targets.reference is None
        rewards = constants.beta * (pairs.means if free else pairs.sums - pairs.reference_sums)
        logged = {
            "rewards_chosen": rewards[:, 0].sum(),
            "rewards_rejected": rewards[:, 1].sum(),
            "margin": _difference(rewards).sum(),
            "accuracy": (_difference(rewards) > 0).sum().to(logprobs.dtype),
            "logps_chosen": pairs.sums[:, 0].sum(),
            "logps_rejected": pairs.sums[:, 1].sum(),
        }
        if targets.reference is not None:
            ratio = targets.reference.to(logprobs) - logprobs
            logged["kl"] = _per_answer(ratio.exp() - 1 - ratio, targets)[1].sum() / 2
    return Sums(total=losses.sum(), logged=logged)


def answers(logprobs: torch.Tensor, targets: Targets) -> Answers:
    """Return sums and means of log-probs [M] per answer."""
    sums, means = _per_answer(logprobs, targets)
    if targets.reference is None:
        zero = torch.zeros_like(sums)
        return Answers(sums=sums, means=means, reference_sums=zero, reference_means=zero)
    reference_sums, reference_means = _per_answer(targets.reference.to(logprobs), targets)
    return Answers(sums=sums, means=means, reference_sums=reference_sums, reference_means=reference_means)


def _per_answer(values: torch.Tensor, targets: Targets) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums and means [P, 2] of values [M].

    In float64: in float32, a sum in the thousands would lose the hundredths of p - q. By a matrix product, because
    index_add on a GPU is not deterministic.
    """
    answers = torch.arange(targets.examples, device=values.device)
    weights = (targets.owner == answers[:, None]) * targets.weights.double()  # [E, M]
    sums = weights @ values.double()
    return sums.view(-1, 2), (sums / weights.sum(dim=1)).view(-1, 2)


def _difference(pairs: torch.Tensor) -> torch.Tensor:
    return pairs[:, 0] - pairs[:, 1]


def _sigmoid(constants: Preference, pairs: Answers) -> torch.Tensor:
    return _smoothed(constants.beta * pairs.margin, constants.label_smoothing)


def _smoothed(logits: torch.Tensor, smoothing: float) -> torch.Tensor:
    return -F.logsigmoid(logits) * (1 - smoothing) - F.logsigmoid(-logits) * smoothing


def _hinge(constants: Preference, pairs: Answers) -> torch.Tensor:
    return torch.relu(1 - constants.beta * pairs.margin)


def _ipo(constants: Preference, pairs: Answers) -> torch.Tensor:
    return (_difference(pairs.means - pairs.reference_means) - 1 / (2 * constants.beta)).square()


def _simpo(constants: Preference, pairs: Answers) -> torch.Tensor:
    return _smoothed(constants.beta * _difference(pairs.means) - constants.gamma, constants.label_smoothing)


def _orpo(constants: Preference, pairs: Answers) -> torch.Tensor:
    odds = pairs.means - torch.log(-torch.expm1(pairs.means))
    return -pairs.means[:, 0] - constants.beta * F.logsigmoid(_difference(odds))


LOSSES: dict[str, Callable[[Preference, Answers], torch.Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "simpo": _simpo,
    "orpo": _orpo,
}
