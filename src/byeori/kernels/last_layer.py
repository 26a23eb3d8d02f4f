"""The last layer at the rows that predict something: keys and values of all tokens, everything else for these alone.

No later layer reads the other rows, so nothing changes but the time: answers are a small part of most rows.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch

from byeori.kernels import bf16_matmul, forest_attention, qkv_rope

# Picking rows costs a few copies; it pays if at most one row in this many is wanted.
_AT_MOST_ONE_IN = 2


def fused_forward(self: Any, hidden_states: torch.Tensor, *args: Any, **rest: Any) -> Any:
    """Forward pass of a last layer that computes the rows that predict something."""
    layout = forest_attention.current()
    if layout is not None:
        few = len(layout.row_numbers) * _AT_MOST_ONE_IN <= hidden_states.shape[1]
        if few and qkv_rope.ready(self.self_attn) is not None:
            layout = forest_attention.of_rows(layout, self.input_layernorm(hidden_states).squeeze(0))
            hidden_states = hidden_states[:, layout.rows]
    with forest_attention.using(layout):
        return type(self).forward(self, hidden_states, *args, **rest)


@torch.no_grad()
def prune(model: Any) -> bool:
    """Give the last layer the forward pass above; False if that computes something else, or cannot run.

    model: with fused attention modules (qkv_rope.py), since only these support rows without a query.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = getattr(causal.base_model, "layers", None)
    last: Any = layers[-1] if isinstance(layers, torch.nn.ModuleList) and len(layers) else None
    if not hasattr(getattr(last, "self_attn", None), "byeori_attention"):
        return False
    weight = next(p for p in last.parameters() if p.is_floating_point() and not p.requires_grad)
    if weight.is_meta or _same(last, causal.config.get_text_config().hidden_size, weight):
        last.forward = MethodType(fused_forward, last)
        return True
    return False


def is_pruned(layer: Any) -> bool:
    """Return whether a layer has the forward pass above."""
    return getattr(vars(layer).get("forward"), "__func__", None) is fused_forward


def _same(last: Any, hidden_size: int, weight: torch.Tensor) -> bool:
    """Whether the layer computes the same at 3 of 24 rows as at all of them, up to rounding."""
    generator = torch.Generator().manual_seed(0)
    size, rows = last.self_attn.head_dim, [3, 4, 17]
    hidden, cos, sin = (torch.randn(1, 24, d, generator=generator).to(weight) for d in (hidden_size, size, size))
    layout = forest_attention.Layout(
        nodes=((0, 24, ((0, 24),)),), rows=torch.tensor(rows, device=weight.device), row_numbers=rows
    )
    training = last.training
    last.eval()
    try:
        inputs: dict[str, Any] = {"position_embeddings": (cos, sin)}
        with bf16_matmul.prepared(weight.dtype, weight.device), forest_attention.using(layout):
            whole = type(last).forward(last, hidden, **inputs)[:, rows]
            few = fused_forward(last, hidden, **inputs)
        return float((whole - few).norm() / whole.norm()) < (1e-4 if weight.dtype.itemsize > 2 else 2e-2)
    except Exception:  # any model's code, which may need other arguments
        return False
    finally:
        last.train(training)
