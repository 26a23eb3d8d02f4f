"""RMS normalisation (Zhang & Sennrich, arXiv:1910.07467) in one function that keeps its input and one number a row.

    y = x * r * s,  r = (mean(x^2) + eps)^-1/2,  s = w, or 1 + w in Gemma's kind
    dx = r (g s - x r^2 mean(g s x))  for g = dy; the weights are frozen

Written as the models write it, autograd keeps two or three float32 copies of every activation.
"""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import torch

from byeori.kernels import dispatch


class _RmsNorm(torch.autograd.Function):
    """x [..., d] -> y [..., d], computed in float32 (float64 where x is); scale [d] is frozen."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        x, scale, eps = args
        flat = _in_memory(x)
        if dispatch.runs(flat):
            y, r = torch.empty_like(x), scale.new_empty(*flat.shape[:-1], 1)
            dispatch.call("norm", flat, scale, float(eps), y, r, r.numel(), x.shape[-1])
        else:
            wide = x.to(scale.dtype, copy=True)
            r = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(wide.shape[-1]).add_(eps).rsqrt_()
            y = wide.mul_(r).mul_(scale).to(x.dtype)
        ctx.save_for_backward(x, scale, r)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, scale, r = ctx.saved_tensors
        flat = _in_memory(x)
        if dispatch.runs(flat):
            out = torch.empty_like(x)
            grad = torch.empty_like(x).copy_(grads[0]) if grads[0].stride() != x.stride() else grads[0]
            dispatch.call("norm_back", grad, flat, scale, r, out, r.numel(), x.shape[-1])
            return out, None, None
        unit = x.to(scale.dtype, copy=True).mul_(r)
        grad = grads[0] * scale
        along = torch.linalg.vecdot(grad, unit).unsqueeze(-1).div_(grad.shape[-1])
        return grad.sub_(unit.mul_(along)).mul_(r).to(x.dtype), None, None


def _in_memory(x: torch.Tensor) -> torch.Tensor:
    """The rows in the order in which they lie in memory: heads are normed through a transposed view."""
    return x.transpose(1, 2) if x.dim() == 4 and not x.is_contiguous() else x


def _forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    return _RmsNorm.apply(x, self.byeori_scale, self.byeori_eps)


@torch.no_grad()
def fuse_norms(model: torch.nn.Module) -> int:
    """Give frozen RMS norms the function above; returns how many.

    A module is taken where it gives the same output on random rows as one of the two kinds; others are left alone.
    """
    count = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not type(module).__name__.endswith("RMSNorm") or weight is None or weight.requires_grad or weight.dim() != 1:
            continue
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        scale = scale_of(copy.deepcopy(module).to(wide))
        if scale is not None:
            module.byeori_scale, module.byeori_eps = scale, eps_of(module)
            module.forward = MethodType(_forward, module)
            count += 1
    return count


def eps_of(module: torch.nn.Module) -> float:
    """The small number that a norm adds to the mean; 0 where it has none."""
    return float(getattr(module, "variance_epsilon", getattr(module, "eps", None)) or 0.0)


def scale_of(module: torch.nn.Module) -> torch.Tensor | None:
    """The scale with which the function equals a norm, which is given in float32 or wider."""
    weight = module.weight.detach()
    rows = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0), dtype=weight.dtype)
    rows = rows.to(weight.device)
    expected = module(rows)
    for scale in (weight, 1 + weight):
        if torch.allclose(_RmsNorm.apply(rows, scale, eps_of(module)), expected, rtol=1e-5, atol=1e-6):
            return scale
    return None
