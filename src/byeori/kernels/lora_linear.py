"""PEFT's LoRA layers with a forward and a backward pass that stay in the compute type.

PEFT's own forward pass casts activations to float32 for a float32 adapter. Here the adapter keeps float32 master
weights and computes in the type of the activations:

    y = x W^T + b + s (drop(x) A^T) B^T          x [T, in], W [out, in], A [r, in], B [out, r], s = alpha / r

The backward pass needs x, saved once for all projections of one input, and the product of rank r, nothing else.
Parameters, their names and the state dict stay PEFT's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from byeori.kernels import amx_linear, grouped_experts
from byeori.kernels.dispatch import wide
from byeori.kernels.dropout import DropoutMask, SeededDropout, draw, draw_mask
from byeori.kernels.quantized_linear import QuantizedLinear


@dataclass(frozen=True, kw_only=True, slots=True)
class Projection:
    """One linear layer and its adapter; a and b are None without one. scale: alpha / r. rate: of dropout, now.

    unpack: dequantizes a weight in 4 or 8 bit; its result is never saved.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale: float = 1.0
    rate: float = 0.0
    unpack: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def dense(self) -> torch.Tensor:
        """The weight [out, in] in the compute type."""
        return self.weight if self.unpack is None else self.unpack(self.weight)


def projection(module: torch.nn.Module) -> Projection | None:
    """Return what a layer computes now; None if it is more than a frozen linear layer with one fused adapter."""
    if type(module) in (torch.nn.Linear, QuantizedLinear):
        return None if module.weight.requires_grad else _frozen(module)
    if not _fusable(module) or module.merged or (_is_more(module) and not module.disable_adapters):
        return None
    base, name = module.base_layer, module.active_adapters[0]
    if module.disable_adapters:
        return _frozen(base)
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    return replace(_frozen(base), a=a, b=b, scale=module.scaling[name], rate=_rate(module))


def _frozen(base: Any) -> Projection:
    unpack = base.dequantize if isinstance(base, QuantizedLinear) else None
    return Projection(weight=base.weight, bias=base.bias, unpack=unpack)


Dropout: TypeAlias = SeededDropout | DropoutMask
Maybe: TypeAlias = torch.Tensor | None
# For fewer rows (generation, one token at a time) saving passes over memory costs more than it brings.
_FEWEST = 16


def project(
    x: torch.Tensor, parts: Sequence[Projection], drop: Dropout | None = None
) -> tuple[list[torch.Tensor], list[Maybe]]:
    """Return y [T, out] of every part for x [T, in], and h = drop(x) A^T [T, r] if it has an adapter.

    All adapters see the same drop(x). Quantized weights are dequantized one after the other.
    """
    one_pass = all(part.bias is None and _in_one_pass(x, part) for part in parts)
    if one_pass and drop is None:
        outputs = [_linear(x, part) for part in parts]
        return [y for y, _ in outputs], [h for _, h in outputs]
    hs = _down(x if drop is None else drop.apply(x), parts)
    if one_pass:
        hs = [None if h is None else h.contiguous() for h in hs]
        return [_linear(x, part, h)[0] for part, h in zip(parts, hs, strict=True)], hs
    return [_up(x, h, part) for h, part in zip(hs, parts, strict=True)], hs


def _in_one_pass(x: torch.Tensor, part: Projection) -> bool:
    return amx_linear.supports(x, part.weight if part.unpack is None else x)


def _linear(x: torch.Tensor, to: Projection, h: Maybe = None) -> tuple[torch.Tensor, Maybe]:
    """y, and h, which is computed in the same pass if it is not given."""
    if to.a is None or to.b is None:
        return amx_linear.linear(x, to.dense, transposed=True), None
    down, h = (to.a.to(x.dtype), x.new_empty(len(x), len(to.a))) if h is None else (None, h)
    return amx_linear.linear(x, to.dense, transposed=True, down=down, up=(to.b * to.scale).to(x.dtype), h=h), h


def _down(x: torch.Tensor, parts: Sequence[Projection]) -> list[Maybe]:
    """x A^T of every part with an adapter, in one product."""
    every = [part.a for part in parts if part.a is not None]
    if len(x) < _FEWEST or not every:
        return [None if part.a is None else F.linear(x, part.a.to(x.dtype)) for part in parts]
    stacked = _stacked(every, x.dtype)
    h = amx_linear.linear(x, stacked, transposed=True) if amx_linear.supports(x, stacked) else F.linear(x, stacked)
    split = iter(h.split([len(a) for a in every], dim=1))
    return [None if part.a is None else next(split) for part in parts]


def _up(x: torch.Tensor, h: Maybe, to: Projection) -> torch.Tensor:
    """x W^T + b + s h B^T. The small product is written first and the large one added to it, in one pass."""
    if h is None or to.b is None:
        return F.linear(x, to.dense, to.bias)
    b = to.b.to(x.dtype).t()
    if len(x) < _FEWEST:
        return F.linear(x, to.dense, to.bias).addmm_(h, b, alpha=to.scale)
    bias, beta = (h.new_empty(1), 0) if to.bias is None else (to.bias, 1)
    return torch.addmm(bias, h, b, beta=beta, alpha=to.scale).addmm_(x, to.dense.t())


def _stacked(matrices: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    return (matrices[0] if len(matrices) == 1 else torch.cat(tuple(matrices))).to(dtype)


def _joined(columns: Sequence[torch.Tensor]) -> torch.Tensor:
    return columns[0] if len(columns) == 1 else torch.cat(tuple(columns), dim=1)


def input_grad(
    gs: Sequence[torch.Tensor],
    parts: Sequence[Projection],
    *,
    adapted: Sequence[bool],
    wanted: bool = True,
    drop: Dropout | None = None,
) -> tuple[Maybe, list[Maybe]]:
    """Return the gradient of x from g = dy of every part (None if not wanted), and u = s g B [T, r] of its adapter."""
    to_x: Maybe = None
    us: list[Maybe] = []
    if wanted and drop is None and all(_in_one_pass(g, part) for g, part in zip(gs, parts, strict=True)):
        for g, part, has in zip(gs, parts, adapted, strict=True):
            a, b = (m.to(g.dtype) if has and m is not None else None for m in (part.a, part.b))
            u = None if b is None else g.new_empty(len(g), b.shape[1])
            to_x = amx_linear.linear(g, part.dense, transposed=False, down=b, up=a, h=u, scale=part.scale, into=to_x)
            us.append(u)
        return to_x, us
    for g, part, has in zip(gs, parts, adapted, strict=True):
        us.append(amx_linear.matmul(g, part.b.to(g.dtype)).mul_(part.scale) if has and part.b is not None else None)
    if not wanted:
        return None, us
    if pairs := [(u, part.a) for u, part in zip(us, parts, strict=True) if u is not None and part.a is not None]:
        to_x = amx_linear.matmul(_joined([u for u, _ in pairs]), _stacked([a for _, a in pairs], gs[0].dtype))
        to_x = to_x if drop is None else drop.apply(to_x)
    for g, part in zip(gs, parts, strict=True):
        to_x = amx_linear.matmul(g, part.dense, into=to_x)
    return to_x, us


def adapter_grads(
    gs: Sequence[torch.Tensor],
    x: Maybe,
    hs: Sequence[Maybe],
    us: Sequence[Maybe],
    parts: Sequence[Projection],
    drop: Dropout | None = None,
) -> list[Maybe]:
    """Return the gradients of A and B of every part from g = dy, h and u."""
    if x is None:
        return [None] * (2 * len(parts))
    dropped = x if drop is None else drop.apply(x)
    present = [u for u, h in zip(us, hs, strict=True) if u is not None and h is not None]
    one_pass = amx_linear.supports(x, dropped)
    if one_pass:
        of_a = iter(amx_linear.outer(u, dropped) for u in present)
    elif present:
        of_a = iter((_joined(present).t() @ dropped).to(wide(x)).split([u.shape[1] for u in present]))
    out: list[Maybe] = []
    for g, h, u, part in zip(gs, hs, us, parts, strict=True):
        if h is None or u is None:
            out += [None, None]
        elif one_pass:
            out += [next(of_a), amx_linear.outer(h, g, part.scale).t()]
        else:
            out += [next(of_a), (g.t() @ h).mul_(part.scale).to(wide(x))]
    return out


def project_backward(
    gs: Sequence[torch.Tensor],
    x: Maybe,
    hs: Sequence[Maybe],
    parts: Sequence[Projection],
    *,
    wanted: bool = True,
    drop: Dropout | None = None,
) -> tuple[Maybe, list[Maybe]]:
    """Return the gradient of x (None if not wanted), and those of A and B of every part, from g = dy."""
    to_x, us = input_grad(gs, parts, adapted=[h is not None for h in hs], wanted=wanted, drop=drop)
    return to_x, adapter_grads(gs, x, hs, us, parts, drop)


class _FusedLora(torch.autograd.Function):
    """y [T, out] as above. Gradients (g = dy, h = drop(x) A^T, u = s g B):

    dx = g W + drop'(u A), dA = u^T drop(x), dB = s g^T h; W and b are frozen.
    A quantized W (4 or 8 bit) is dequantized in each direction and never saved.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        x, weight, bias, a, b, scale, drop, unpack = args
        to = Projection(weight=weight, bias=bias, a=a, b=b, scale=scale, unpack=unpack)
        (y,), (h,) = project(x.reshape(-1, x.shape[-1]), [to], drop)
        ctx.save_for_backward(None if h is None else x, h)
        ctx.to, ctx.drop = to, drop
        ctx.shape = x.shape
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, h = ctx.saved_tensors
        (g,) = grads
        rows, wanted = (None if x is None else x.reshape(len(g), -1)), ctx.needs_input_grad[0]
        to_x, (to_a, to_b) = project_backward([g], rows, [h], [ctx.to], wanted=wanted, drop=ctx.drop)
        return to_x if to_x is None else to_x.view(ctx.shape), None, None, to_a, to_b, None, None, None


def _fused(x: torch.Tensor, *how: Any) -> torch.Tensor:
    """y [.., out]. A view made inside the function could not be written into, as Gemma 3n does."""
    y: torch.Tensor = _FusedLora.apply(x, *how)
    return y.view(*x.shape[:-1], -1)


def output(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Return a projection's output; a frozen layer without an adapter uses the function above as well."""
    part = projection(module) if type(module) is torch.nn.Linear else None
    if part is None:
        return module(x)
    return _fused(x, part.weight, part.bias, None, None, 1.0, None, None)


def fused_forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Forward pass of a fused LoRA layer."""
    if self.disable_adapters or self.merged:
        return output(self.base_layer, x)
    name, base = self.active_adapters[0], self.base_layer
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    unpack = base.dequantize if isinstance(base, QuantizedLinear) else None
    if name in self.lora_magnitude_vector:
        return _dora(self, x, Projection(weight=base.weight, bias=base.bias, a=a, b=b, unpack=unpack))
    drop = draw_mask(_rate(self), x) if torch.compiler.is_compiling() else draw(_rate(self))
    y = _fused(x, base.weight, base.bias, a, b, self.scaling[name], drop, unpack)
    bias = self.lora_B[name].bias
    return y if bias is None else y + (self.scaling[name] * bias).to(y.dtype)


def _dora(layer: Any, x: torch.Tensor, part: Projection) -> torch.Tensor:
    """DoRA (arXiv:2402.09353, with section 4.3): c = m / |W + s B A| for every row, no gradient through the length.

    y = c (drop(x) W^T + s (drop(x) A^T) B^T) + (x - drop(x)) W^T + b          as PEFT computes it
    """
    name = layer.active_adapters[0]
    scale, dropped = layer.scaling[name], layer.lora_dropout[name](x) if _rate(layer) else x
    c = layer.lora_magnitude_vector[name].weight / _lengths(layer, part, scale)
    y = _fused(dropped, part.weight, None, part.a, part.b, scale, None, part.unpack) * c.to(x.dtype)
    if dropped is not x:
        y = y + _fused(x - dropped, part.weight, None, None, None, 1.0, None, part.unpack)
    return y if part.bias is None else y + part.bias


@torch.no_grad()
def _lengths(layer: Any, part: Projection, scale: float) -> torch.Tensor:
    """|W + s B A| [out] of every row; kept while the adapter does not change, which is for all tokens of an answer."""
    name, a, b = layer.active_adapters[0], part.a, part.b
    assert a is not None and b is not None
    masters = [*layer.lora_A[name].parameters(), *layer.lora_B[name].parameters()]
    state = [(master.data_ptr(), master._version) for master in masters]
    known = getattr(layer, "byeori_lengths", None)
    if known is None or known[0] != state or layer.training:
        dtype = wide(part.dense)
        whole = torch.addmm(part.dense.to(dtype), b.to(dtype), a.to(dtype), alpha=scale)
        known = layer.byeori_lengths = (state, torch.linalg.vector_norm(whole, dim=1))
    return known[1]


def _rate(module: Any) -> float:
    """The rate of dropout now."""
    dropout = module.lora_dropout[module.active_adapters[0]]
    return float(dropout.p) if isinstance(dropout, torch.nn.Dropout) and dropout.training else 0.0


def dropout_of(parts: Sequence[Projection]) -> SeededDropout | None:
    """Return a new dropout for the input of these parts; a model's adapters have one rate."""
    return draw(max((part.rate for part in parts), default=0.0))


def fuse(model: torch.nn.Module) -> int:
    """Give LoRA layers over frozen linear layers and experts the fused forward pass; return how many.

    Other layers (Conv1D, embeddings, PEFT's other variants) keep PEFT's own.
    """
    layers = [module for module in model.modules() if _fusable(module)]
    for layer in layers:
        layer.forward = MethodType(fused_forward, layer)
    return len(layers) + grouped_experts.fuse(model)


def _fusable(module: torch.nn.Module) -> bool:
    peft_lora = sys.modules.get("peft.tuners.lora")  # without it no layer is PEFT's
    if peft_lora is None or type(module) is not peft_lora.Linear or len(module.active_adapters) != 1:
        return False
    name = module.active_adapters[0]
    plain = type(module.base_layer) in (torch.nn.Linear, QuantizedLinear) and not module.base_layer.weight.requires_grad
    variant = module.lora_variant.get(name)
    known = variant is None or type(variant).__name__ in ("DoraLinearVariant", "MiCALinearVariant")
    return plain and known and name in module.lora_A


def _is_more(module: Any) -> bool:
    """Whether a fused layer computes more than W and s B A, so that only its own forward pass does."""
    name = module.active_adapters[0]
    return name in module.lora_magnitude_vector or module.lora_B[name].bias is not None


def note(model: torch.nn.Module) -> str | None:
    """Return a sentence about layers whose adapter has no fused form, or not with what surrounds them."""
    layers = [module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")]
    own = sorted({type(each).__name__ for each in layers if not (_fusable(each) or grouped_experts.fusable(each))})
    more = [layer for layer in layers if _fusable(layer) and _is_more(layer)]
    if own:
        return f"Adapters on some layers ({', '.join(own)}) have no fused form and run PEFT's own code, which is slower"
    if more:
        kind = "DoRA" if more[0].lora_magnitude_vector else "lora_bias"
        return f"{kind}: every layer is fused for itself, attention heads and feed-forward layers as a whole are not"
    return None
