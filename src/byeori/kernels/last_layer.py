"""The last layer at the rows that predict something: keys and values of all tokens, everything else for these alone.

No later layer looks at the other rows, so nothing changes but the time: answers are a small part of most rows.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch

from byeori.kernels import forest_attention, qkv_rope

# Picking rows costs a few copies; it pays where at most one row in this many is wanted.
_AT_MOST_ONE_IN = 2


def _forward(
    self: Any,
    hidden_states: torch.Tensor,
    *args: Any,
    forest_layout: forest_attention.Layout | None = None,
    **rest: Any,
) -> Any:
    if forest_layout is None:
        return type(self).forward(self, hidden_states, *args, **rest)
    few = len(forest_layout.row_numbers) * _AT_MOST_ONE_IN <= hidden_states.shape[1]
    if few and qkv_rope.ready(self.self_attn) is not None:
        forest_layout = forest_attention.of_rows(forest_layout, self.input_layernorm(hidden_states).squeeze(0))
        hidden_states = hidden_states[:, forest_layout.rows]
    return type(self).forward(self, hidden_states, *args, forest_layout=forest_layout, **rest)


@torch.no_grad()
def prune(model: Any) -> bool:
    """Give the last layer the forward pass above; False where that computes something else, or cannot be run.

    model: its attention modules have been fused (heads.py), for these alone know rows that have no query.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = getattr(causal.base_model, "layers", None)
    last: Any = layers[-1] if isinstance(layers, torch.nn.ModuleList) and len(layers) else None
    if not hasattr(getattr(last, "self_attn", None), "byeori_attention"):
        return False
    weight = next(p for p in last.parameters() if p.is_floating_point() and not p.requires_grad)
    if weight.is_meta:  # a rehearsal: there are no numbers to compare
        last.forward = MethodType(_forward, last)
        return True
    generator = torch.Generator().manual_seed(0)
    size = last.self_attn.head_dim
    hidden, cos, sin = (
        torch.randn(1, 24, d, generator=generator).to(weight)
        for d in (causal.config.get_text_config().hidden_size, size, size)
    )
    rows = [3, 4, 17]
    layout = forest_attention.Layout(
        nodes=((0, 24, ((0, 24),)),), rows=torch.tensor(rows, device=weight.device), row_numbers=rows
    )
    training = last.training
    last.eval()
    try:
        how: dict[str, Any] = {"position_embeddings": (cos, sin), "forest_layout": layout}
        whole = type(last).forward(last, hidden, **how)[:, rows]
        few = _forward(last, hidden, **how)
        same = float((whole - few).norm() / whole.norm()) < (1e-4 if weight.dtype.itemsize > 2 else 2e-2)
    except Exception:  # code of any kind, which asks for other things
        same = False
    last.train(training)
    if same:
        last.forward = MethodType(_forward, last)
    return same
