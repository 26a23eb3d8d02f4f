"""Log-probabilities at target positions only, in chunks; a [tokens, vocabulary] matrix is never made.

d hidden size, V words, M targets, C targets of a chunk
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

# One chunk's logits take at most this many bytes in float32. A chunk reads the whole head: on a GPU, whose products
# outrun its memory until they have some 300 rows, it has to be larger than a CPU's.
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """What a model does with its last hidden state.

    module: the output embedding (it may carry an adapter). scale: logits are multiplied by it.
    softcap: logits become softcap * tanh(logits / softcap) (Gemma 2, arXiv:2408.00118); None is off.
    """

    module: torch.nn.Module
    scale: float = 1.0
    softcap: float | None = None


def target_logprobs(
    head: Head, hidden: torch.Tensor, target_ids: torch.Tensor, *, chunk_bytes: int = CHUNK_BYTES["cpu"]
) -> torch.Tensor:
    """log p(target | prefix), float32 (float64 where hidden is).

    hidden: [M, d], already gathered at the positions that predict. target_ids: [M]. Returns [M].
    """
    weight = getattr(head.module, "weight", None)
    plain = type(head.module) is torch.nn.Linear and weight is not None and not weight.requires_grad
    words = weight.shape[0] if weight is not None else 2**18
    size = max(1, chunk_bytes // (4 * words))
    parts = []
    for start in range(0, len(target_ids), size):
        rows, ids = hidden[start : start + size], target_ids[start : start + size]
        if plain:
            parts.append(_FrozenHead.apply(rows, weight, head.module.bias, ids, head.scale, head.softcap))
        elif torch.is_grad_enabled():
            parts.append(checkpoint(_chunk, head, rows, ids, use_reentrant=False))
        else:
            parts.append(_chunk(head, rows, ids))
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=_wide(hidden))


def _wide(states: torch.Tensor) -> torch.dtype:
    return torch.float64 if states.dtype == torch.float64 else torch.float32


def _logits(raw: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    logits = raw.to(_wide(raw))
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _chunk(head: Head, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    logits = _logits(head.module(rows), head.scale, head.softcap)
    return logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(dim=1)


class _FrozenHead(torch.autograd.Function):
    """The same for a frozen head, whose gradient is made in the forward pass while the chunk's logits are there.

    With g the incoming gradient and p = softmax(logits): d hidden = g * v, v = (onehot - p) W, whatever the objective
    makes of the log-probs. v [C, d] is kept in place of the logits [C, V], and nothing is computed twice.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        rows, weight, bias, ids, scale, softcap = args
        logits = _logits(torch.nn.functional.linear(rows, weight, bias), scale, softcap)
        total = logits.logsumexp(dim=1)
        found = logits.gather(1, ids[:, None])[:, 0] - total
        if ctx.needs_input_grad[0]:
            slope = None if softcap is None else 1 - (logits / softcap).square()
            delta = logits.sub_(total[:, None]).exp_().neg_()
            delta.scatter_add_(1, ids[:, None], torch.ones_like(total[:, None]))
            if slope is not None:
                delta *= slope
            if scale != 1.0:
                delta *= scale
            ctx.save_for_backward(delta.to(weight.dtype) @ weight)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (direction,) = ctx.saved_tensors
        return (grads[0][:, None] * direction).to(direction.dtype), None, None, None, None, None
