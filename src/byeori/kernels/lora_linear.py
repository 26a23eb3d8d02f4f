"""PEFT adapters, with a forward and backward that keep to the compute type.

PEFT's own forward casts activations to float32 for a float32 adapter. Here the adapter keeps float32 master weights
and computes in the type of the activations:

    y = x W^T + b + s (drop(x) A^T) B^T          x [T, in], W [out, in], A [r, in], B [out, r], s = alpha / r

The backward saves x once (projections of one input share it) and the rank-r product, nothing else. Parameters, names
and the state dict stay PEFT's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F

from byeori.kernels import amx_linear
from byeori.kernels.dropout import Drop, Mask, drawn, mask
from byeori.kernels.quantized_linear import QuantizedLinear
from byeori.model.light import without_bitsandbytes

with without_bitsandbytes():
    from peft.tuners.lora import Linear as LoraLinear


@dataclass(frozen=True, kw_only=True, slots=True)
class Projection:
    """One linear layer and its adapter; a and b are None without one. scale: alpha / r. rate: of dropout at present.

    unpack: opens a weight that is kept in 4 or 8 bit; what it gives is never kept.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale: float = 1.0
    rate: float = 0.0
    unpack: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def opened(self) -> torch.Tensor:
        """The weight [out, in] in the compute type."""
        return self.weight if self.unpack is None else self.unpack(self.weight)


def projection(module: torch.nn.Module) -> Projection | None:
    """What a layer computes at present; None where it is more than a frozen linear layer with one fused adapter."""
    if type(module) in (torch.nn.Linear, QuantizedLinear):
        return None if module.weight.requires_grad else _plain(module)
    if not _fusable(module) or module.merged:
        return None
    base, name = module.base_layer, module.active_adapters[0]
    if module.disable_adapters:
        return _plain(base)
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    return replace(_plain(base), a=a, b=b, scale=module.scaling[name], rate=_rate(module))


def _plain(base: Any) -> Projection:
    return Projection(
        weight=base.weight, bias=base.bias, unpack=base.open if isinstance(base, QuantizedLinear) else None
    )


Many = Sequence[torch.Tensor | None]
Dropped = Drop | Mask
# For fewer rows (a word at a time) the ways that save passes over memory cost more than they save.
_FEWEST = 16


def project(
    x: torch.Tensor, parts: Sequence[Projection], drop: Dropped | None = None
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """x [T, in] -> y [T, out] of every part, and h = drop(x) A^T [T, r] where it has an adapter.

    All adapters see the same drop(x). Packed weights are opened one after the other.
    """
    one_pass = all(part.bias is None and _in_one_pass(x, part) for part in parts)
    if one_pass and drop is None:
        found = [_product(x, part) for part in parts]
        return [y for y, _ in found], [h for _, h in found]
    hs = _down(x if drop is None else drop.of(x), parts)
    if one_pass:
        hs = [None if h is None else h.contiguous() for h in hs]
        return [_product(x, part, h)[0] for part, h in zip(parts, hs, strict=True)], hs
    return [_up(x, h, part) for h, part in zip(hs, parts, strict=True)], hs


def _in_one_pass(x: torch.Tensor, part: Projection) -> bool:
    return amx_linear.takes(x, part.weight if part.unpack is None else x)


def _product(
    x: torch.Tensor, to: Projection, h: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y and h, which is made on the way where it is not given."""
    if to.a is None or to.b is None:
        return amx_linear.product(x, to.opened, turned=True), None
    down, h = (to.a.to(x.dtype), x.new_empty(len(x), len(to.a))) if h is None else (None, h)
    return amx_linear.product(x, to.opened, turned=True, down=down, up=(to.b * to.scale).to(x.dtype), h=h), h


def _down(x: torch.Tensor, parts: Sequence[Projection]) -> list[torch.Tensor | None]:
    """x A^T of every part with an adapter, in one product."""
    every = [part.a for part in parts if part.a is not None]
    if len(x) < _FEWEST or not every:
        return [None if part.a is None else F.linear(x, part.a.to(x.dtype)) for part in parts]
    stacked = _stacked(every, x.dtype)
    h = amx_linear.product(x, stacked, turned=True) if amx_linear.takes(x, stacked) else F.linear(x, stacked)
    found = iter(h.split([len(a) for a in every], dim=1))
    return [None if part.a is None else next(found) for part in parts]


def _up(x: torch.Tensor, h: torch.Tensor | None, to: Projection) -> torch.Tensor:
    """x W^T + b + s h B^T. The small product lies there first: the large one reads it while it computes."""
    if h is None or to.b is None:
        return F.linear(x, to.opened, to.bias)
    b = to.b.to(x.dtype).t()
    if len(x) < _FEWEST:
        return F.linear(x, to.opened, to.bias).addmm_(h, b, alpha=to.scale)
    bias, beta = (h.new_empty(1), 0) if to.bias is None else (to.bias, 1)
    return torch.addmm(bias, h, b, beta=beta, alpha=to.scale).addmm_(x, to.opened.t())


def _stacked(matrices: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    return (matrices[0] if len(matrices) == 1 else torch.cat(tuple(matrices))).to(dtype)


def input_back(
    gs: Sequence[torch.Tensor],
    parts: Sequence[Projection],
    *,
    adapted: Sequence[bool],
    wanted: bool = True,
    drop: Dropped | None = None,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """The gradient of x from g = dy of every part (None where not wanted), and u = s g B [T, r] of its adapter."""
    to_x: torch.Tensor | None = None
    us: list[torch.Tensor | None] = []
    if wanted and drop is None and all(_in_one_pass(g, part) for g, part in zip(gs, parts, strict=True)):
        for g, part, has in zip(gs, parts, adapted, strict=True):
            a, b = (m.to(g.dtype) if has and m is not None else None for m in (part.a, part.b))
            u = None if b is None else g.new_empty(len(g), b.shape[1])
            to_x = amx_linear.product(g, part.opened, turned=False, down=b, up=a, h=u, scale=part.scale, into=to_x)
            us.append(u)
        return to_x, us
    for g, part, has in zip(gs, parts, adapted, strict=True):
        us.append(amx_linear.times(g, part.b.to(g.dtype)).mul_(part.scale) if has and part.b is not None else None)
    if not wanted:
        return None, us
    if there := [(u, part.a) for u, part in zip(us, parts, strict=True) if u is not None and part.a is not None]:
        to_x = amx_linear.times(_joined([u for u, _ in there]), _stacked([a for _, a in there], gs[0].dtype))
        to_x = to_x if drop is None else drop.of(to_x)
    for g, part in zip(gs, parts, strict=True):
        to_x = amx_linear.times(g, part.opened, into=to_x)
    return to_x, us


def _joined(columns: Sequence[torch.Tensor]) -> torch.Tensor:
    return columns[0] if len(columns) == 1 else torch.cat(tuple(columns), dim=1)


def adapter_back(
    gs: Sequence[torch.Tensor],
    x: torch.Tensor | None,
    hs: Many,
    us: Many,
    parts: Sequence[Projection],
    drop: Dropped | None = None,
) -> list[torch.Tensor | None]:
    """Gradients of A and B of every part, from g = dy and what the forward and backward passes made on the way."""
    if x is None:
        return [None] * (2 * len(parts))
    dropped = x if drop is None else drop.of(x)
    there = [u for u, h in zip(us, hs, strict=True) if u is not None and h is not None]
    wide = torch.promote_types(x.dtype, torch.float32)
    one_pass = amx_linear.takes(x, dropped)
    if one_pass:
        of_a = iter(amx_linear.outer(u, dropped) for u in there)
    elif there:
        of_a = iter((_joined(there).t() @ dropped).to(wide).split([u.shape[1] for u in there]))
    out: list[torch.Tensor | None] = []
    for g, h, u, part in zip(gs, hs, us, parts, strict=True):
        if h is None or u is None:
            out += [None, None]
        elif one_pass:
            out += [next(of_a), amx_linear.outer(h, g, part.scale).t()]
        else:
            out += [next(of_a), (g.t() @ h).mul_(part.scale).to(wide)]
    return out


def project_back(
    gs: Sequence[torch.Tensor],
    x: torch.Tensor | None,
    hs: Many,
    parts: Sequence[Projection],
    *,
    wanted: bool = True,
    drop: Dropped | None = None,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """The gradient of x (None where not wanted), and those of A and B of every part, from g = dy."""
    to_x, us = input_back(gs, parts, adapted=[h is not None for h in hs], wanted=wanted, drop=drop)
    return to_x, adapter_back(gs, x, hs, us, parts, drop)


class _FusedLora(torch.autograd.Function):
    """y as above. Gradients (g = dy, h = drop(x) A^T, u = s g B):

    dx = g W + drop'(u A), dA = u^T drop(x), dB = s g^T h; W and b are frozen.
    A packed W (4 or 8 bit) is opened in each direction and never kept.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        x, weight, bias, a, b, scale, drop, unpack = args
        to = Projection(weight=weight, bias=bias, a=a, b=b, scale=scale, unpack=unpack)
        (y,), (h,) = project(x.reshape(-1, x.shape[-1]), [to], drop)
        ctx.save_for_backward(None if h is None else x, h)
        ctx.to, ctx.drop = to, drop
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, h = ctx.saved_tensors
        g = grads[0].reshape(-1, grads[0].shape[-1])
        rows, wanted = (None if x is None else x.reshape(len(g), -1)), ctx.needs_input_grad[0]
        to_x, (to_a, to_b) = project_back([g], rows, [h], [ctx.to], wanted=wanted, drop=ctx.drop)
        to_x = to_x.view(*grads[0].shape[:-1], -1) if to_x is not None else None
        return to_x, None, None, to_a, to_b, None, None, None


def output(module: Any, x: torch.Tensor) -> torch.Tensor:
    """A projection's output; that of a frozen layer without an adapter by the function above as well."""
    part = projection(module) if type(module) is torch.nn.Linear else None
    if part is None:
        return module(x)
    return _FusedLora.apply(x, part.weight, part.bias, None, None, 1.0, None, None)


def _fused_forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if self.disable_adapters or self.merged:
        return output(self.base_layer, x)
    name, base = self.active_adapters[0], self.base_layer
    drop = mask(_rate(self), x) if torch.compiler.is_compiling() else drawn(_rate(self))
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    opened = base.open if isinstance(base, QuantizedLinear) else None
    return _FusedLora.apply(x, base.weight, base.bias, a, b, self.scaling[name], drop, opened)


def _rate(module: Any) -> float:
    """Of dropout at present."""
    dropout = module.lora_dropout[module.active_adapters[0]]
    return float(dropout.p) if module.training and isinstance(dropout, torch.nn.Dropout) else 0.0


def drop_of(parts: Sequence[Projection]) -> Drop | None:
    """What is dropped of an input of these; a model's adapters have one rate."""
    return drawn(max((part.rate for part in parts), default=0.0))


def fuse(model: torch.nn.Module) -> int:
    """Give plain LoRA layers over frozen float weights the fused forward; returns how many.

    Layers of another kind (DoRA, Conv1D, embeddings) keep PEFT's own.
    """
    layers = [module for module in model.modules() if _fusable(module)]
    for layer in layers:
        layer.forward = MethodType(_fused_forward, layer)
    return len(layers)


def _fusable(module: torch.nn.Module) -> bool:
    if type(module) is not LoraLinear or len(module.active_adapters) != 1:
        return False
    name = module.active_adapters[0]
    plain = type(module.base_layer) in (torch.nn.Linear, QuantizedLinear) and not module.base_layer.weight.requires_grad
    variants = module.lora_variant.get(name) or module.lora_bias.get(name)
    return plain and name in module.lora_A and not variants
