"""The GPU's attention kernel for sequences of different lengths, written out: any device, any type, no speed."""

from __future__ import annotations

from itertools import pairwise

import torch

from byeori.kernels import cuda_attention, cuda_calls


def pieces(call: cuda_calls.Call) -> list[tuple[slice, slice]]:
    """The queries and keys of each sequence of a call."""
    q, k = call.cu_q.tolist(), call.cu_k.tolist()
    assert max(b - a for a, b in pairwise(q)) <= call.max_q
    assert max(b - a for a, b in pairwise(k)) == call.max_k
    return [(slice(*qs), slice(*ks)) for qs, ks in zip(pairwise(q), pairwise(k), strict=True)]


def probabilities(query: torch.Tensor, key: torch.Tensor, call: cuda_calls.Call, scale: float) -> torch.Tensor:
    """Scores [H, n, m] of one sequence; -inf where a query does not see a key, aligned to the last of both."""
    groups = query.shape[1] // key.shape[1]
    scores = torch.einsum("nhd,mhd->hnm", query, key.repeat_interleave(groups, dim=1)) * scale
    n, m = scores.shape[1:]
    back = torch.arange(m - n, m, device=query.device)[:, None] - torch.arange(m, device=query.device)[None, :]
    if call.causal:
        scores = scores.masked_fill(back < 0, float("-inf"))
    if call.window is not None:
        scores = scores.masked_fill(back >= call.window, float("-inf"))
    return scores


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: cuda_calls.Call, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = torch.full_like(query, float("nan")), query.new_full((query.shape[1], len(query)), float("nan"))
    groups = query.shape[1] // key.shape[1]
    for q, k in pieces(call):
        scores = probabilities(query[q], key[k], call, scale)
        lse[:, q] = scores.logsumexp(dim=-1)
        weights = scores.softmax(dim=-1)
        out[q] = torch.einsum("hnm,mhd->nhd", weights, value[k].repeat_interleave(groups, dim=1))
    return out, lse


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    call: cuda_calls.Call,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As flash attention's backward: from the output and log-sum-exp that it is given."""
    grads = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    for q, k in pieces(call):
        weights = (probabilities(query[q], key[k], call, scale) - lse[:, q, None]).exp()
        wide = value[k].repeat_interleave(groups, dim=1)
        along = (grad[q] * out[q]).sum(dim=-1).t()[:, :, None]
        delta = weights * (torch.einsum("nhd,mhd->hnm", grad[q], wide) - along) * scale
        grads[0][q] = torch.einsum("hnm,mhd->nhd", delta, key[k].repeat_interleave(groups, dim=1))
        key_part = torch.einsum("hnm,nhd->mhd", delta, query[q])
        value_part = torch.einsum("hnm,nhd->mhd", weights, grad[q])
        grads[1][k] = key_part.unflatten(1, (heads, groups)).sum(dim=2)
        grads[2][k] = value_part.unflatten(1, (heads, groups)).sum(dim=2)
    return grads


WRITTEN_OUT = cuda_attention.Kernel(forward=forward, backward=backward)
