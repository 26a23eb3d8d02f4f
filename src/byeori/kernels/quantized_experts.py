"""Experts in 4 or 8 bit: a layer's weights [experts, ., .], opened for a product and again for its backward pass.

The codes are a parameter under the name that the weights had. The module's code finds an `Experts` in its place, which
knows their shape and opens them where they are multiplied: those of all experts for a grouped product, those of one
where the code goes through them one by one.

    y = x W_e      saved: the codes      dx = dy W_e^T, with W_e opened again
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch

from byeori.kernels.quantized_weight import QuantizedWeight

_SCALES = "_scales"
_GROUPED = ("_grouped_mm", "grouped_mm", "grouped_mm_fallback", "transformers::grouped_mm_fallback")
_PRODUCTS = ("matmul", "__matmul__", "bmm", "mm")


class Experts:
    """Stands for a parameter [experts, ., .], or for one expert's [., .], of a module that holds its codes.

    turned: whether the last two dimensions are exchanged.
    """

    requires_grad = False

    def __init__(self, module: Any, name: str, expert: int | None = None, turned: bool = False) -> None:
        self.module, self.key, self.expert, self.turned = module, name, expert, turned

    @property
    def scales(self) -> QuantizedWeight:
        found: QuantizedWeight = self.module._modules[self.key + _SCALES]
        return found

    @property
    def codes(self) -> torch.Tensor:
        """As the module holds them now: whole for the length of a layer where they are sharded."""
        found: torch.Tensor = self.module._parameters[self.key]
        return found

    @property
    def shape(self) -> torch.Size:
        experts, rows, columns = self.scales.sizes
        sides = (columns, rows) if self.turned else (rows, columns)
        return torch.Size(sides if self.expert is not None else (experts, *sides))

    @property
    def dtype(self) -> torch.dtype:
        return self.scales.compute_dtype

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def is_floating_point(self) -> bool:
        return True

    def transpose(self, one: int, other: int) -> Any:
        """Return the weights of all experts, or of one, with the last two dimensions exchanged."""
        if {one % self.ndim, other % self.ndim} != {self.ndim - 2, self.ndim - 1}:
            return self.opened().transpose(one, other)
        return Experts(self.module, self.key, self.expert, not self.turned)

    def __getitem__(self, index: Any) -> Any:
        single = isinstance(index, int) or (isinstance(index, torch.Tensor) and index.ndim == 0)
        if not single or self.expert is not None or getattr(index, "is_meta", False):
            return self.opened()[index]
        return Experts(self.module, self.key, int(index), self.turned)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(torch.Tensor, name):
            raise AttributeError(name)
        return getattr(self.opened(), name)

    def opened(self, codes: torch.Tensor | None = None) -> torch.Tensor:
        """Return the weights in the compute type."""
        codes = self.codes if codes is None else codes
        if self.expert is None:
            weight = self.scales.open(codes)
        else:
            weight = self.scales.open(codes, self.expert, self.expert + 1)[0]
        return weight.mT if self.turned else weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, weight = getattr(func, "__name__", str(func)), args[1] if len(args) > 1 else None
        if isinstance(weight, cls) and isinstance(args[0], torch.Tensor) and args[0].ndim >= 2:
            x, more = args[0], args[2:]
            if name in _GROUPED:
                return _Product.apply(x, weight.codes, weight, func, *(more or (kwargs["offs"],)))
            if name == "linear":
                bias = more[0] if more else kwargs.get("bias")
                y = _Product.apply(x, weight.codes, weight.transpose(-1, -2), torch.matmul)
                return y if bias is None else y + bias
            if name in _PRODUCTS and x.ndim == weight.ndim:
                return _Product.apply(x, weight.codes, weight, torch.matmul)
        return func(*map(_opened, args), **{key: _opened(value) for key, value in kwargs.items()})


def _opened(value: Any) -> Any:
    return value.opened() if isinstance(value, Experts) else value


class _Product(torch.autograd.Function):
    """x W, saving the codes of W only: dx = dy W^T."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        x, codes, ctx.weight, ctx.product, *offs = args
        ctx.save_for_backward(codes, *offs)
        return _product(ctx.product, x, ctx.weight.opened(codes), offs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        codes, *offs = ctx.saved_tensors
        dx = _product(ctx.product, grads[0].contiguous(), ctx.weight.opened(codes).mT, offs)
        return dx, None, None, None, *([None] * len(offs))


def _product(func: Any, x: torch.Tensor, weight: torch.Tensor, offs: Any) -> torch.Tensor:
    y: torch.Tensor = func(x, weight, offs=offs[0]) if offs else func(x, weight)
    return y


def hold(module: Any, name: str, scales: QuantizedWeight) -> None:
    """Give a module empty codes in place of a parameter [experts, ., .]."""
    module._parameters[name] = scales.empty_codes()
    module.add_module(name + _SCALES, scales)
    module.__dict__[name] = Experts(module, name)


def scales_of(module: Any, name: str) -> QuantizedWeight | None:
    """Return what opens a parameter of a module, or None if it is not quantized so."""
    return module._modules.get(name + _SCALES) if isinstance(module.__dict__.get(name), Experts) else None


def let_peft_add(model: torch.nn.Module) -> None:
    """Have PEFT's wrappers of experts add their adapter to opened weights where no grouped product does."""
    for wrapper in model.modules():
        if hasattr(wrapper, "parameter_name") and scales_of(wrapper.get_base_layer(), wrapper.parameter_name):
            wrapper.__dict__["_activate_lora"] = MethodType(_activate_lora, wrapper)


@contextmanager
def _activate_lora(self: Any, adapters: list[str]) -> Iterator[None]:
    module, name = self.get_base_layer(), self.parameter_name
    stand_in, codes = module.__dict__.pop(name), module._parameters[name]
    module._parameters[name] = torch.nn.Parameter(stand_in.scales.open(codes), requires_grad=False)
    try:
        with type(self)._activate_lora(self, adapters):
            yield
    finally:
        module._parameters[name] = codes
        module.__dict__[name] = stand_in
