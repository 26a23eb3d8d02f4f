"""Adapters on experts by grouped products, without ever adding them to the weights.

transformers sorts the tokens by expert and multiplies each group by its expert's weight in one call
(`torch.nn.functional.grouped_mm`). PEFT gives it W + s B A, a second set of a layer's experts in the forward pass and a
gradient of the same size in the backward pass. Here the product is taken apart, and only A and B have gradients:

    y = x W_e + s (x A_e^T) B_e^T          for the rows x of every expert e, three grouped products

    E experts, S rows of all groups, r the rank of one expert
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F

_ALIGNED = 16  # bytes that rows of a grouped product's matrices are multiples of


class Stack:
    """Stands for the weights of all experts [E, ., .] in a grouped product with rows [S, in] on the left.

    a: [E, r, in]. b: [E, r, out].
    """

    def __init__(self, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
        self.weight, self.a, self.b, self.scale = weight, a, b, scale
        self.dtype, self.device = weight.dtype, weight.device

    def transpose(self, one: int, other: int) -> Stack:
        """Return the stack with weights as [E, in, out]; A and B are the same."""
        return Stack(self.weight.transpose(one, other), self.a, self.b, self.scale)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any, kwargs: Any = None) -> torch.Tensor:
        x, stack, offs = args[0], args[1], kwargs["offs"]
        if func.__name__ != "_grouped_mm" or not isinstance(stack, cls):
            return NotImplemented
        inner = F.grouped_mm(x, stack.a.transpose(1, 2), offs=offs)
        return F.grouped_mm(x, stack.weight, offs=offs) + stack.scale * F.grouped_mm(inner, stack.b, offs=offs)


def _stack(wrapper: Any) -> Stack:
    """The parameter of PEFT's wrapper with its A [E r, in] and B [out, r E]."""
    name, weight = wrapper.active_adapters[0], wrapper.get_param()
    a, b = (part[name].weight.to(weight.dtype) for part in (wrapper.lora_A, wrapper.lora_B))
    a = a.view(wrapper.num_experts, -1, a.shape[1])
    b = b.view(b.shape[0], -1, wrapper.num_experts).permute(2, 1, 0).contiguous()
    short = -a.shape[1] % (_ALIGNED // weight.itemsize)
    a, b = (F.pad(part, (0, 0, 0, short)) if short else part for part in (a, b))
    return Stack(weight, a, b, wrapper.scaling[name])


def wrappers(outer: Any) -> list[Any]:
    """Return PEFT's wrappers of one module, one for each of its parameters, the outermost first."""
    found = [outer]
    while hasattr(found[-1].base_layer, "parameter_name"):
        found.append(found[-1].base_layer)
    return found


@contextmanager
def _attributes(module: torch.nn.Module, values: dict[str, Stack]) -> Iterator[None]:
    """Inside, a module's parameters read as these; instance attributes hide parameters."""
    before = {name: module.__dict__[name] for name in values if name in module.__dict__}  # of quantized experts
    module.__dict__.update(values)
    try:
        yield
    finally:
        for name in values:
            del module.__dict__[name]
        module.__dict__.update(before)


def fused_forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Forward pass of the outermost wrapper of a layer's experts."""
    found = wrappers(self)
    module = self.get_base_layer()
    if any(each.disable_adapters or each.merged for each in found) or not runs_grouped(module):
        return type(self).forward(self, x, *args, **kwargs)
    with _attributes(module, {each.parameter_name: _stack(each) for each in found}):
        return module(x, *args, **kwargs)


def runs_grouped(module: Any) -> bool:
    """Return whether a module multiplies its experts' weights by grouped products."""
    config = getattr(module, "config", None)
    return hasattr(module, "is_transposed") and getattr(config, "_experts_implementation", None) == "grouped_mm"


def fusable(wrapper: Any) -> bool:
    """Return whether a wrapper of PEFT's, and those inside it, can run as above."""
    peft = sys.modules.get("peft.tuners.lora.layer")
    if peft is None or type(wrapper) is not peft.ParamWrapper or not runs_grouped(wrapper.get_base_layer()):
        return False
    return all(
        each.num_experts > 1
        and len(each.active_adapters) == 1
        and each.active_adapters[0] in each.lora_A
        and each.get_param().is_floating_point()
        and not each.get_param().requires_grad
        for each in wrappers(wrapper)
    )


def fuse(model: torch.nn.Module) -> int:
    """Give wrappers of experts the forward pass above; return how many modules have it."""
    inner = {id(each.base_layer) for each in model.modules() if hasattr(each, "parameter_name")}
    outer = [each for each in model.modules() if id(each) not in inner and fusable(each)]
    for wrapper in outer:
        wrapper.forward = MethodType(fused_forward, wrapper)
    return len(outer)
