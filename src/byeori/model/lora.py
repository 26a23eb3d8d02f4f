"""PEFT adapters, with a forward and backward that keep to the compute type.

PEFT's own forward casts activations to float32 for a float32 adapter. Here the adapter keeps float32 master weights
and computes in the type of the activations:

    y = x W^T + b + s (drop(x) A^T) B^T          x [T, in], W [out, in], A [r, in], B [out, r], s = alpha / r

The backward saves x once (projections of one input share it) and the rank-r product, nothing else. Parameters, names
and the state dict stay PEFT's.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear

from byeori.config import nearest
from byeori.errors import ModelError


class _FusedLora(torch.autograd.Function):
    """y as above. Gradients (g = dy, h = drop(x) A^T, u = s g B):

    dx = g W + drop'(u A), dA = u^T drop(x), dB = s g^T h; W and b are frozen.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        x, weight, bias, a, b, scale, keep = args
        a16, b16 = a.to(x.dtype), b.to(x.dtype)
        dropped = x if keep is None else x * keep
        h = F.linear(dropped, a16)
        y = F.linear(x, weight, bias)
        flat = y.view(-1, y.shape[-1])
        flat.addmm_(h.view(-1, h.shape[-1]), b16.t(), alpha=scale)
        ctx.save_for_backward(x, weight, a16, b16, h, keep)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, a, b, h, keep = ctx.saved_tensors
        g = grads[0].reshape(-1, grads[0].shape[-1])
        u = (g @ b).mul_(ctx.scale)
        rows = x.reshape(-1, x.shape[-1])
        dropped = rows if keep is None else rows * keep.view(rows.shape)
        grad_a = (u.t() @ dropped).to(torch.promote_types(a.dtype, torch.float32))
        grad_b = (g.t() @ h.reshape(-1, h.shape[-1])).mul_(ctx.scale).to(grad_a.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = g @ weight
            if keep is None:
                grad_x.addmm_(u, a)
            else:
                grad_x += (u @ a).mul_(keep.view(rows.shape))
            grad_x = grad_x.view(x.shape)
        return grad_x, None, None, grad_a, grad_b, None, None


def _fused_forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if self.disable_adapters or self.merged:
        return self.base_layer(x, *args, **kwargs)
    name = self.active_adapters[0]
    keep = None
    rate = self.lora_dropout[name].p if isinstance(self.lora_dropout[name], torch.nn.Dropout) else 0.0
    if self.training and rate:
        keep = torch.empty_like(x).bernoulli_(1 - rate).div_(1 - rate)
    base, a, b = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
    return _FusedLora.apply(x, base.weight, base.bias, a, b, self.scaling[name], keep)


def fuse(model: torch.nn.Module) -> int:
    """Give plain LoRA layers over frozen float weights the fused forward; returns how many.

    Layers of another kind (quantised, DoRA, Conv1D, embeddings) keep PEFT's own.
    """
    count = 0
    for module in model.modules():
        if type(module) is not LoraLinear or len(module.active_adapters) != 1:
            continue
        name = module.active_adapters[0]
        plain = type(module.base_layer) is torch.nn.Linear and not module.base_layer.weight.requires_grad
        if plain and name in module.lora_A and not module.lora_variant.get(name) and not module.lora_bias.get(name):
            module.forward = MethodType(_fused_forward, module)
            count += 1
    return count


def target_names(model: torch.nn.Module, wanted: list[str]) -> list[str] | str:
    """Check target modules against the layers that are there.

    Raises:
        ModelError: a name that ends no layer's name; the sentence lists the names there are.
    """
    if wanted == ["all-linear"]:
        return "all-linear"
    from transformers.pytorch_utils import Conv1D

    kinds = (torch.nn.Linear, torch.nn.Embedding, Conv1D)
    names = [
        name for name, module in model.named_modules() if isinstance(module, kinds) or hasattr(module, "quant_state")
    ]
    there = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    for name in wanted:
        if not any(full == name or full.endswith("." + name) for full in names):
            raise ModelError(
                f"--lora_target_modules names {name!r}, which ends no layer's name{nearest(name, there)}; "
                f"the layers are {', '.join(there)}"
            )
    return wanted


def attach(model: torch.nn.Module, *, r: int, alpha: float, dropout: float, targets: list[str], seed: int) -> PeftModel:
    """Put a new LoRA adapter on the model; its parameters are float32, everything else is frozen.

    Raises:
        ModelError: a target that is not there, or one that PEFT refuses.
    """
    torch.manual_seed(seed)  # A is drawn at random; B starts at zero
    config = LoraConfig(
        r=r,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        lora_dropout=dropout,
        target_modules=target_names(model, targets),
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config, autocast_adapter_dtype=True)
    except (ValueError, TypeError) as error:
        raise ModelError(f"PEFT cannot put an adapter on {', '.join(targets)}: {error}") from None
