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


class _RmsNorm(torch.autograd.Function):
    """x [..., d] -> y [..., d], computed in float32 (float64 where x is); scale [d] is frozen."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        x, scale, eps = args
        wide = x.to(scale.dtype, copy=True)
        r = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(wide.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, r)
        return wide.mul_(r).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, scale, r = ctx.saved_tensors
        unit = x.to(scale.dtype, copy=True).mul_(r)
        grad = grads[0] * scale
        along = torch.linalg.vecdot(grad, unit).unsqueeze(-1).div_(grad.shape[-1])
        return grad.sub_(unit.mul_(along)).mul_(r).to(x.dtype), None, None


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
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        scale = None if eps is None else _kind(copy.deepcopy(module).to(wide), float(eps))
        if scale is not None:
            module.byeori_scale, module.byeori_eps = scale, float(eps or 0.0)
            module.forward = MethodType(_forward, module)
            count += 1
    return count


def _kind(module: torch.nn.Module, eps: float) -> torch.Tensor | None:
    """The scale with which the function equals the module, which is given in float32 or wider."""
    weight = module.weight.detach()
    rows = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0), dtype=weight.dtype)
    rows = rows.to(weight.device)
    expected = module(rows)
    for scale in (weight, 1 + weight):
        if torch.allclose(_RmsNorm.apply(rows, scale, eps), expected, rtol=1e-5, atol=1e-6):
            return scale
    return None
