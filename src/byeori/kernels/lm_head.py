"""Log-probabilities at target positions only, in chunks; a [tokens, vocabulary] matrix is never made.

d hidden size, V words, M targets, C targets of a chunk
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from byeori.kernels import amx_linear, dispatch, native, switches

# Sizes by kind of device. A chunk reads the whole head: on a GPU, where products are bound by memory up to about 300
# rows, it has to be larger than on a CPU. There, blocks of words whose logits stay in the cache are 1.5 times as fast
# as all words of fewer targets.
SIZES = {
    "cpu": {"chunk_bytes": 64 * 2**20, "block_rows": 512, "block_bytes": 8 * 2**20},
    "cuda": {"chunk_bytes": 256 * 2**20},
}

# In bfloat16 on a CPU, gradients leave out words with a probability below RARE at every target of a chunk, unless a
# target would lose more than LOST in all. Rounding the logits to bfloat16 changes each probability by up to 6 %. The
# idea is Cut Cross-Entropy's filter (arXiv:2411.09009), which uses 2**-12 and has no LOST.
RARE, LOST = 2.0**-16, 2.0**-5
_TILE = 128  # rows per tile of a GPU matrix product; a partial tile costs as much as a full one
_EVEN = 256  # remaining words are rounded up to a multiple, so that products have few shapes


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """What a model does with its last hidden state.

    module: the output embedding, which may have an adapter. scale: logits are multiplied by it.
    softcap: logits become softcap * tanh(logits / softcap) (Gemma 2, arXiv:2408.00118); None is off.
    """

    module: torch.nn.Module
    scale: float = 1.0
    softcap: float | None = None


def target_logprobs(
    head: Head,
    hidden: torch.Tensor,
    target_ids: torch.Tensor,
    *,
    chunk_bytes: int = SIZES["cpu"]["chunk_bytes"],
    block_rows: int = 1,
    block_bytes: int | None = None,
) -> torch.Tensor:
    """Return log p(target | prefix) [M] in float32 (float64 if hidden is).

    hidden: [M, d], gathered at the positions that predict. target_ids: [M]. chunk_bytes: the size of a chunk's logits
    in float32. block_rows: the least number of targets in a chunk of a frozen head, whose words are computed in
    blocks with logits of block_bytes (by default chunk_bytes).
    """
    plain = type(head.module) is torch.nn.Linear and not head.module.weight.requires_grad
    linear = next((module for module in head.module.modules() if isinstance(module, torch.nn.Linear)), None)
    weight = head.module.weight if plain else None  # a wrapper of PEFT's would make it
    words = linear.out_features if linear is not None else 2**18
    size = max(1, chunk_bytes // (4 * words))
    if plain:
        size = max(size, block_rows)
    if size > _TILE:
        size -= size % _TILE
    block = max(1, (block_bytes or chunk_bytes) // (4 * max(1, min(size, len(target_ids)))))
    block = 1 << block.bit_length() - 1  # divides a vocabulary of a power of two into equal blocks
    parts = []
    for start in range(0, len(target_ids), size):
        rows, ids = hidden[start : start + size], target_ids[start : start + size]
        if plain:
            parts.append(_FrozenHead.apply(rows, weight, head.module.bias, ids, head.scale, head.softcap, block))
        elif torch.is_grad_enabled():
            parts.append(checkpoint(_chunk, head, rows, ids, use_reentrant=False))
        else:
            parts.append(_chunk(head, rows, ids))
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=dispatch.wide(hidden))


def _logits(raw: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    logits = raw.to(dispatch.wide(raw))
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _slope(logits: torch.Tensor, softcap: float | None) -> torch.Tensor | None:
    """The derivative of the logits by the logits before the soft cap."""
    return None if softcap is None else 1 - (logits / softcap).square()


def _chunk(head: Head, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    logits = _logits(head.module(rows), head.scale, head.softcap)
    return logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(dim=1)


@dataclass(frozen=True, slots=True)
class _Softmax:
    """Sums over the words so far, [C, 1] each.

    own: the targets' logits, 0 until a target's block was computed. top: the largest logit. total: sum of
    exp(logit - top).
    """

    own: torch.Tensor
    top: torch.Tensor
    total: torch.Tensor


def _add_words(
    raw: torch.Tensor, sums: _Softmax, ids: torch.Tensor, scale: float, softcap: float | None, *, wanted: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a block's raw logits [C, n] to the sums. ids: the targets' columns in the block, or outside of it.

    Returns exp(logit - top) [C, n], which may overwrite the logits, and the factor [C, 1] for sums over earlier blocks.
    wanted: the weights are for a gradient and include the slope of the soft cap.
    """
    if softcap is None and dispatch.supports(raw, kernel="online_softmax"):
        fade = torch.empty_like(sums.top)
        dispatch.call("online_softmax", raw, ids, sums.own, sums.top, sums.total, fade, scale, *raw.shape)
        return raw, fade
    logits = _logits(raw, scale, softcap)
    column = ids[:, None]
    here = column.clamp(0, logits.shape[1] - 1)
    sums.own.copy_(torch.where(column == here, logits.gather(1, here), sums.own))
    highest = torch.maximum(sums.top, logits.amax(dim=1, keepdim=True))
    slope = _slope(logits, softcap) if wanted else None
    weights, fade = logits.sub_(highest).exp_(), (sums.top - highest).exp_()
    sums.total.mul_(fade).add_(weights.sum(dim=1, keepdim=True))
    sums.top.copy_(highest)
    return weights if slope is None else weights.mul_(slope), fade


def _without_rare(
    weights: torch.Tensor, part: torch.Tensor, total: torch.Tensor, lost: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights [C, n] and part [n, d] without the words that a gradient may leave out.

    total, lost: [C, 1], sums over the words so far; what is left out here is added to lost. total only grows, so a
    share of it is never less than the probability.
    """
    words = len(part)
    wanted = switches.current().rare_words and weights.dtype == torch.bfloat16
    if not (wanted and native.supports(weights)) or weights.is_meta:
        return weights, part
    largest = torch.empty(words)
    native.call("largest", weights, total, largest, *weights.shape)
    count = -(-int((largest > RARE).sum()) // _EVEN) * _EVEN
    if count > words // 2:
        return weights, part
    columns = largest.topk(count).indices.sort().values
    picked, lost_now = weights.new_empty(len(weights), count), lost.clone()
    native.call("pick", weights, columns, picked, lost_now, *weights.shape, count)
    if bool((lost_now > total * LOST).any()):
        return weights, part
    lost.copy_(lost_now)
    return picked, part[columns]


class _FrozenHead(torch.autograd.Function):
    """The same for a frozen head, block by block of words; the forward pass computes the gradient too.

    With g the incoming gradient and p = softmax(logits): d hidden = g * v, v = (onehot - p) W, for any objective. v
    [C, d] is saved instead of the logits [C, V], and nothing is computed twice. The sums over the words so far are
    relative to the largest logit so far (Milakov and Gimelshein, arXiv:1805.02867).
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        rows, weight, bias, ids, scale, softcap, block = args
        dtype, wanted = dispatch.wide(rows), ctx.needs_input_grad[0]
        sums = _Softmax(
            own=rows.new_zeros(len(rows), 1, dtype=dtype),
            top=rows.new_full((len(rows), 1), -torch.inf, dtype=dtype),
            total=rows.new_zeros(len(rows), 1, dtype=dtype),
        )
        mean = torch.zeros_like(rows, dtype=dtype) if wanted else None  # of the words' vectors, times total
        lost = torch.zeros_like(sums.total)
        for start in range(0, len(weight), block):
            part = weight[start : start + block]
            offsets = None if bias is None else bias[start : start + block]
            raw = torch.nn.functional.linear(rows, part, offsets)
            weights, fade = _add_words(raw, sums, ids - start, scale, softcap, wanted=wanted)
            if mean is not None:
                weights, part = _without_rare(weights.to(weight.dtype), part, sums.total, lost.mul_(fade))
                mean.mul_(fade).add_(amx_linear.matmul(weights, part))
        if mean is not None:
            slope = _slope(sums.own, softcap)
            target = weight[ids] if slope is None else weight[ids] * slope
            ctx.save_for_backward((target - mean.div_(sums.total)).mul_(scale).to(rows.dtype))
        return (sums.own - sums.top - sums.total.log())[:, 0]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (direction,) = ctx.saved_tensors
        return (grads[0][:, None] * direction).to(direction.dtype), None, None, None, None, None, None
