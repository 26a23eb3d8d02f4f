"""What PEFT trains beside LoRA: rows of the embedding (`trainable_token_indices`), and whole modules.

PEFT copies the whole embedding for every call to put the trained rows in, and trains both in the type of the base. Here
the parameters are float32, computed with in the type of the base, and only the rows of these tokens are replaced:

    embedding   y[t] = rows[place of id t] if it is one of them, else W[id t]
    head        y[:, ids] = x rows^T, all others x W^T
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F


def prepare(model: torch.nn.Module) -> None:
    """Turn the trained parameters into float32, and give their modules the forward passes above."""
    for module in model.modules():
        if type(module).__name__ == "TrainableTokensLayer" and len(module.active_adapters) == 1:
            module.forward = MethodType(_rows_forward, module)
            _widen(module.trainable_tokens_delta)
        elif type(module).__name__ == "ModulesToSaveWrapper" and len(module.active_adapters) == 1:
            trained: Any = module.modules_to_save[module.active_adapters[0]]
            first = next(trained.parameters(), None)
            if first is not None and first.dtype in (torch.bfloat16, torch.float16):
                trained.byeori_dtype, trained.byeori_inside = first.dtype, False
                trained.forward = MethodType(_whole_forward, trained)
                _widen(trained)


def _widen(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def _rows_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Forward pass of an embedding or a head with trained rows."""
    base, y = self.base_layer, self.base_layer(x)
    if self.disable_adapters or self.merged:
        return y
    name = self.active_adapters[0]
    rows = self.trainable_tokens_delta[name].to(base.weight.dtype)
    ids = torch.tensor(self.token_indices[name], device=x.device)
    if not isinstance(base, torch.nn.Embedding):
        bias = base.bias
        return y.index_copy(-1, ids, F.linear(x, rows, None if bias is None else bias[ids]))
    ordered, order = ids.sort()
    place = torch.searchsorted(ordered, x).clamp_(max=len(ids) - 1)
    new = F.embedding(order[place], rows)
    if (scale := getattr(base, "embed_scale", None)) is not None:  # Gemma
        new = new * scale.to(new.dtype) if isinstance(scale, torch.Tensor) else new * scale
    return torch.where((ordered[place] == x)[..., None], new, y)


def _whole_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Forward pass of a module with float32 parameters, computed in the type of the base."""
    if self.byeori_inside:
        return type(self).forward(self, *args, **kwargs)
    values = {name: parameter.to(self.byeori_dtype) for name, parameter in self.named_parameters()}
    self.byeori_inside = True
    try:
        return torch.func.functional_call(self, values, args, kwargs)
    finally:
        self.byeori_inside = False
