"""RMS normalisation (Zhang & Sennrich, arXiv:1910.07467) in one function that saves its input and one number per row.

    y = x * r * s,  r = (mean(x^2) + eps)^-1/2,  s = w, or 1 + w in Gemma's kind
    dx = r (g s - x r^2 mean(g s x))  for g = dy; the weights are frozen

Written as the models write it, autograd saves two or three float32 copies of every activation.
"""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import torch

from byeori.kernels import dispatch


class _RmsNorm(torch.autograd.Function):
    """x [..., d] -> y [..., d], computed in float32 (float64 if x is); scale [d] is frozen."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        x, scale, eps = args
        flat, y = _memory_order(x, x), torch.empty_like(x)
        if dispatch.supports(flat, kernel="norm"):
            r = scale.new_empty(*flat.shape[:-1], 1)
            dispatch.call("norm", flat, scale, float(eps), y, r, r.numel(), x.shape[-1])
        else:
            unit = flat.to(scale.dtype, copy=True)
            r = torch.linalg.vector_norm(unit, dim=-1, keepdim=True).square_().div_(unit.shape[-1]).add_(eps).rsqrt_()
            _memory_order(y, x).copy_(unit.mul_(r).mul_(scale))
        ctx.save_for_backward(x, scale, r)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, scale, r = ctx.saved_tensors
        flat = _memory_order(x, x)
        if dispatch.supports(flat, kernel="norm"):
            out = torch.empty_like(x)
            grad = torch.empty_like(x).copy_(grads[0]) if grads[0].stride() != x.stride() else grads[0]
            dispatch.call("norm_back", grad, flat, scale, r, out, r.numel(), x.shape[-1])
            return out, None, None
        unit = flat.to(scale.dtype, copy=True).mul_(r)
        grad = _memory_order(grads[0], x) * scale
        along = torch.linalg.vecdot(grad, unit).unsqueeze(-1).div_(grad.shape[-1])
        return _memory_order(grad.sub_(unit.mul_(along)).mul_(r).to(x.dtype), x), None, None


def _memory_order(states: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The rows in the order of x's memory, or back in x's own: the norms of heads get a transposed view."""
    return states.transpose(1, 2) if x.dim() == 4 and not x.is_contiguous() else states


def fused_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Forward pass of a fused norm."""
    return _RmsNorm.apply(x, self.byeori_scale, self.byeori_eps)


@torch.no_grad()
def fuse_norms(model: torch.nn.Module) -> int:
    """Give frozen RMS norms the function above; return how many.

    A module is fused if its output on random rows equals that of one of the two kinds.
    """
    count = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not type(module).__name__.endswith("RMSNorm") or weight is None or weight.requires_grad or weight.dim() != 1:
            continue
        scale = scale_of(copy.deepcopy(module).to(dispatch.wide(weight)))
        if scale is not None:
            module.byeori_scale, module.byeori_eps = scale, eps_of(module)
            module.forward = MethodType(fused_forward, module)
            count += 1
    return count


def eps_of(module: torch.nn.Module) -> float:
    """Return the number that a norm adds to the mean square; 0 if it has none."""
    return float(getattr(module, "variance_epsilon", getattr(module, "eps", None)) or 0.0)


def scale_of(module: torch.nn.Module) -> torch.Tensor | None:
    """Return the scale with which the function equals a norm (in float32 or float64); None if there is none."""
    weight = module.weight.detach()
    rows = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0), dtype=weight.dtype)
    rows = rows.to(weight.device)
    expected = module(rows)
    for scale in (weight, 1 + weight):
        if torch.allclose(_RmsNorm.apply(rows, scale, eps_of(module)), expected, rtol=1e-5, atol=1e-6):
            return scale
    return None
