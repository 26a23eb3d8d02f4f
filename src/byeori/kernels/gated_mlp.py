"""Gated feed-forward layers in one function that saves x and the outputs of gate and up, nothing else.

    y = W_d (act(W_g x) * W_u x), each W with its adapter; act(z) = z sigmoid(z (c1 + c3 z^2))

(c1, c3) is (1, 0) for SiLU and (2 sqrt(2/pi), 0.044715 c1) for the tanh form of GELU. The product act * up is
recomputed in the backward pass. Written as the models write it, autograd saves five of these activations.
"""

from __future__ import annotations

import copy
import math
from types import MethodType
from typing import Any

import torch

from byeori.kernels import dispatch
from byeori.kernels.lora_linear import (
    Projection,
    adapter_grads,
    dropout_of,
    input_grad,
    project,
    project_backward,
    projection,
)

_NAMES = ("gate_proj", "up_proj", "down_proj")
_GELU = 2 * math.sqrt(2 / math.pi)
_ACTIVATIONS = ((1.0, 0.0), (_GELU, 0.044715 * _GELU))


class _GatedMlp(torch.autograd.Function):
    """x [.., d] -> y [T, d]: a view made in here could not be added to in place.

    The adapters are passed once more, so that autograd sees them.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        x, act, projections, (drop, drop_last), *_ = args
        rows = x.reshape(-1, x.shape[-1])
        (gate, up), (h_gate, h_up) = project(rows, projections[:2], drop)
        (y,), (h_down,) = project(_gated(gate, up, act), projections[2:], drop_last)
        ctx.save_for_backward(x, gate, up, h_gate, h_up, h_down)
        ctx.act, ctx.projections, ctx.drops = act, projections, (drop, drop_last)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, gate, up, h_gate, h_up, h_down = ctx.saved_tensors
        first, last, (drop, drop_last) = ctx.projections[:2], ctx.projections[2:], ctx.drops
        rows, g = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, grads[0].shape[-1])
        product, u = input_grad([g], last, adapted=[h_down is not None], drop=drop_last)
        to_gate, to_up = _gated_backward(gate, up, product, ctx.act)  # from here on `product` is act * up
        of_down = adapter_grads([g], product, [h_down], u, last, drop_last)
        del product
        wanted = ctx.needs_input_grad[0]
        to_x, of_first = project_backward([to_gate, to_up], rows, [h_gate, h_up], first, wanted=wanted, drop=drop)
        to_x = to_x.view(x.shape) if to_x is not None else None
        return to_x, None, None, None, *of_first, *of_down


def _gated(gate: torch.Tensor, up: torch.Tensor, act: tuple[float, float]) -> torch.Tensor:
    """act(gate) * up, all [T, f]."""
    if dispatch.supports(gate, up, kernel="glu"):
        out = torch.empty_like(gate)
        dispatch.call("glu", gate, up, out, *act, *gate.shape)
        return out
    return _activation(gate.to(dispatch.wide(gate)), act)[0].mul_(up).to(gate.dtype)


def _gated_backward(
    gate: torch.Tensor, up: torch.Tensor, product: torch.Tensor, act: tuple[float, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and up from that of the product in `product`, which is overwritten with the product itself."""
    if dispatch.supports(gate, up, product, kernel="glu"):
        to_gate, to_up = torch.empty_like(gate), torch.empty_like(up)
        dispatch.call("glu_back", gate, up, product, to_gate, to_up, *act, *gate.shape)
        return to_gate, to_up
    value, slope = _activation(gate.to(dispatch.wide(gate)), act)
    to_up, to_gate = (value * product).to(up.dtype), slope.mul_(up).mul_(product).to(gate.dtype)
    product.copy_(value.mul_(up))
    return to_gate, to_up


def _activation(x: torch.Tensor, act: tuple[float, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """act(x) and its slope."""
    one, three = act
    square = three * x.square()
    s = torch.sigmoid(x * (one + square))
    value = x * s
    return value, s + value * (1 - s) * (one + 3 * square)


def fused_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Forward pass of a fused feed-forward layer."""
    parts = [part for name in _NAMES if (part := projection(getattr(self, name)))]
    if len(parts) < len(_NAMES):
        return type(self).forward(self, x)
    return _apply(x, self.byeori_act, parts, (dropout_of(parts[:2]), dropout_of(parts[2:])))


def _apply(
    x: torch.Tensor, act: tuple[float, float], parts: list[Any], drops: tuple[Any, Any] = (None, None)
) -> torch.Tensor:
    y: torch.Tensor = _GatedMlp.apply(x, act, parts, drops, *(matrix for part in parts for matrix in (part.a, part.b)))
    return y.view(*x.shape[:-1], -1)


def fuse_mlps(model: torch.nn.Module) -> int:
    """Give gated feed-forward layers the function above; return how many.

    A layer is fused if its own code, run on small matrices, computes the same.
    """
    count = 0
    for module in model.modules():
        if all(projection(getattr(module, name, module)) for name in _NAMES) and (act := _activation_of(module)):
            module.byeori_act = act
            module.forward = MethodType(fused_forward, module)
            count += 1
    return count


@torch.no_grad()
def _activation_of(module: torch.nn.Module) -> tuple[float, float] | None:
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
    except Exception:  # any model's code, which may need more than three matrices
        return None
    if not isinstance(expected, torch.Tensor) or expected.shape != x.shape:
        return None
    return next((act for act in _ACTIVATIONS if torch.allclose(_apply(x, act, parts), expected, rtol=1e-9)), None)
