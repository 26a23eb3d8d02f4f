"""Gated feed-forward layers in one function that keeps x and what gate and up made of it, nothing else.

    y = W_d (act(W_g x) * W_u x), each W with its adapter; act(z) = z sigmoid(z (c1 + c3 z^2))

(c1, c3) is (1, 0) for SiLU and (2 sqrt(2/pi), 0.044715 c1) for the tanh form of GELU. The product act * up is made
again in the backward pass. Written as the models write it, autograd keeps five of these activations.
"""

from __future__ import annotations

import copy
import math
from types import MethodType
from typing import Any

import torch

from byeori.kernels import dispatch
from byeori.kernels.lora_linear import Projection, adapter_back, drop_of, input_back, project, project_back, projection

_NAMES = ("gate_proj", "up_proj", "down_proj")
_GELU = 2 * math.sqrt(2 / math.pi)
_KINDS = ((1.0, 0.0), (_GELU, 0.044715 * _GELU))


class _Mlp(torch.autograd.Function):
    """x [.., d] -> y [.., d]. The adapters are given once more, so that autograd sees them."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        x, kind, projections, (drop, drop_last), *_ = args
        rows = x.reshape(-1, x.shape[-1])
        (gate, up), (from_gate, from_up) = project(rows, projections[:2], drop)
        product = _product(gate, up, kind)
        (y,), (from_down,) = project(product, projections[2:], drop_last)
        ctx.save_for_backward(x, gate, up, from_gate, from_up, from_down)
        ctx.kind, ctx.projections, ctx.drops = kind, projections, (drop, drop_last)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, gate, up, from_gate, from_up, from_down = ctx.saved_tensors
        first, last, (drop, drop_last) = ctx.projections[:2], ctx.projections[2:], ctx.drops
        rows, g = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, grads[0].shape[-1])
        both, u = input_back([g], last, adapted=[from_down is not None], drop=drop_last)
        to_gate, to_up = _product_back(gate, up, both, ctx.kind)  # from here on `both` is act * up
        of_down = adapter_back([g], both, [from_down], u, last, drop_last)
        del both
        wanted = ctx.needs_input_grad[0]
        hs = [from_gate, from_up]
        to_x, of_first = project_back([to_gate, to_up], rows, hs, first, wanted=wanted, drop=drop)
        to_x = to_x.view(x.shape) if to_x is not None else None
        return to_x, None, None, None, *of_first, *of_down


def _product(gate: torch.Tensor, up: torch.Tensor, kind: tuple[float, float]) -> torch.Tensor:
    """act(gate) * up, all [T, f]."""
    if dispatch.runs(gate, up):
        out = torch.empty_like(gate)
        dispatch.call("glu", gate, up, out, *kind, *gate.shape)
        return out
    return _act(gate.to(_wide(gate)), kind)[0].mul_(up).to(gate.dtype)


def _product_back(
    gate: torch.Tensor, up: torch.Tensor, both: torch.Tensor, kind: tuple[float, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and up, from that of the product in `both`, over which the product itself is written."""
    if dispatch.runs(gate, up, both):
        to_gate, to_up = torch.empty_like(gate), torch.empty_like(up)
        dispatch.call("glu_back", gate, up, both, to_gate, to_up, *kind, *gate.shape)
        return to_gate, to_up
    act, slope = _act(gate.to(_wide(gate)), kind)
    to_up, to_gate = (act * both).to(up.dtype), slope.mul_(up).mul_(both).to(gate.dtype)
    both.copy_(act.mul_(up))
    return to_gate, to_up


def _act(x: torch.Tensor, kind: tuple[float, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """act(x) and its slope."""
    one, three = kind
    square = three * x.square()
    s = torch.sigmoid(x * (one + square))
    act = x * s
    return act, s + act * (1 - s) * (one + 3 * square)


def _wide(states: torch.Tensor) -> torch.dtype:
    return torch.promote_types(states.dtype, torch.float32)


def _forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    parts = [part for name in _NAMES if (part := projection(getattr(self, name)))]
    if len(parts) < len(_NAMES):
        return type(self).forward(self, x)
    return _apply(x, self.byeori_act, parts, (drop_of(parts[:2]), drop_of(parts[2:])))


def _apply(
    x: torch.Tensor, kind: tuple[float, float], parts: list[Any], drops: tuple[Any, Any] = (None, None)
) -> torch.Tensor:
    return _Mlp.apply(x, kind, parts, drops, *(matrix for part in parts for matrix in (part.a, part.b)))


def fuse_mlps(model: torch.nn.Module) -> int:
    """Give gated feed-forward layers the function above; returns how many.

    A layer is taken where its own code, run on small matrices, computes the same.
    """
    count = 0
    for module in model.modules():
        if all(projection(getattr(module, name, module)) for name in _NAMES) and (kind := _kind(module)):
            module.byeori_act = kind
            module.forward = MethodType(_forward, module)
            count += 1
    return count


@torch.no_grad()
def _kind(module: torch.nn.Module) -> tuple[float, float] | None:
    """The activation with which the function equals the module."""
    small = copy.copy(module)
    generator = torch.Generator().manual_seed(0)
    linear = {name: torch.nn.Linear(6, 6, bias=False, dtype=torch.float64, device="cpu") for name in _NAMES}
    for layer in linear.values():
        layer.weight.copy_(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    small._modules = {**module._modules, **linear}
    x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    parts = [Projection(weight=layer.weight, bias=None) for layer in linear.values()]
    try:
        expected = type(module).forward(small, x)
    except Exception:  # code of any kind, which asks for more than three matrices
        return None
    if not isinstance(expected, torch.Tensor) or expected.shape != x.shape:
        return None
    return next((kind for kind in _KINDS if torch.allclose(_apply(x, kind, parts), expected, rtol=1e-9)), None)
