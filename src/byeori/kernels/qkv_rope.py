"""Queries, keys and values in one function: projections, adapters, norms of heads (Qwen 3, Gemma 3), rotation.

    q = turn(norm(W_q x)), k = turn(norm(W_k x)), v = W_v x
    turn(n) = n cos + half(n) sin, half(n) = (-n2, n1) for n = (n1, n2)        (RoPE: Su et al., arXiv:2104.09864)

The last layer's queries may be those of a few rows only, with keys and values of all. Kept are x (where an adapter
needs it) and what the norms take in.

    D head size, H heads, T tokens
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch

from byeori.kernels import dispatch, forest_attention
from byeori.kernels import rms_norm as norm
from byeori.kernels.lora_linear import Projection, drop_of, output, project, project_back, projection

_NAMES = ("q_proj", "k_proj", "v_proj")
_PROBE = "byeori_probe"


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadNorm:
    """An RMS norm over each head: scale [D], in float32 or wider."""

    scale: torch.Tensor
    eps: float


class _Heads(torch.autograd.Function):
    """x [n, d] -> q [n, H, D]; all [T, d] -> k and v [T, G, D]; all is None where it is x.

    turns: cos and sin of x [n, D], then those of all [T, D]. The adapters are given once more, so that autograd sees
    them.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        x, others, turns, size, parts, norms, (drop, drop_others), *_ = args
        if others is None:
            raw, hidden = project(x, parts, drop)
        else:
            few, every = project(x, parts[:1], drop), project(others, parts[1:], drop_others)
            raw, hidden = ([*one, *other] for one, other in zip(few, every, strict=True))
        heads = [states.view(len(states), -1, size) for states in raw]
        turned = [_turn(*pair) for pair in zip(heads, turns, norms, strict=False)]
        kept = [states if norm else None for states, norm in zip(heads, norms, strict=False)]
        adapted = any(h is not None for h in hidden)
        ctx.save_for_backward(*((x, others) if adapted else (None, None)), *hidden, *kept, *(r for _, r in turned))
        ctx.parts, ctx.norms, ctx.turns, ctx.joint = parts, norms, turns, others is None
        ctx.drops = drop, drop_others
        return turned[0][0], turned[1][0], heads[2]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, others, h_q, h_k, h_v, q, k, r_q, r_k = ctx.saved_tensors
        to_q = _turn_back(grads[0], q, ctx.turns[0], ctx.norms[0], r_q).flatten(1)
        to_k = _turn_back(grads[1], k, ctx.turns[1], ctx.norms[1], r_k).flatten(1)
        drop, drop_others = ctx.drops
        gs, wanted = [to_q, to_k, grads[2].flatten(1)], ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        if ctx.joint:
            to_x, found = project_back(gs, x, [h_q, h_k, h_v], ctx.parts, wanted=wanted, drop=drop)
            return to_x, *[None] * 6, *found
        to_x, of_q = project_back(gs[:1], x, [h_q], ctx.parts[:1], wanted=wanted, drop=drop)
        rest = ctx.parts[1:]
        to_rest, of_rest = project_back(gs[1:], others, [h_k, h_v], rest, wanted=wanted, drop=drop_others)
        return to_x, to_rest, *[None] * 5, *of_q, *of_rest


Turn = tuple[torch.Tensor, torch.Tensor]


def _turn(x: torch.Tensor, turn: Turn, norm: HeadNorm | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x [T, H, D], cos and sin [T, D] -> the same shape, and 1 / rms [T, H, 1] where there is a norm."""
    cos, sin = turn
    if dispatch.runs(x, cos, sin):
        out, r = torch.empty_like(x), x.new_empty(*x.shape[:2], 1, dtype=torch.float32) if norm else None
        scale, eps = (norm.scale, norm.eps) if norm else (None, 0.0)
        dispatch.call("turn", x, cos, sin, scale, eps, out, r, *x.shape)
        return out, r
    wide, r = x.to(_wide(x)), None
    if norm:
        r = wide.square().mean(dim=-1, keepdim=True).add_(norm.eps).rsqrt_()
        wide = wide * r * norm.scale
    one, two = wide.chunk(2, dim=-1)
    half = torch.cat([-two, one], dim=-1)
    return (wide * cos[:, None] + half * sin[:, None]).to(x.dtype), r


def _turn_back(
    grad: torch.Tensor,
    x: torch.Tensor | None,
    turn: Turn,
    norm: HeadNorm | None,
    r: torch.Tensor | None,
) -> torch.Tensor:
    """The gradient of _turn's x; x itself is needed only where there is a norm."""
    cos, sin = turn
    if dispatch.runs(cos, sin) and grad.dtype == cos.dtype:
        grad, out = grad.contiguous(), torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        dispatch.call("turn_back", grad, x, cos, sin, norm.scale if norm else None, r, out, *grad.shape)
        return out
    wide = grad.to(_wide(grad))
    one, two = (wide * sin[:, None]).chunk(2, dim=-1)
    wide = wide * cos[:, None] + torch.cat([two, -one], dim=-1)
    if norm and x is not None and r is not None:
        unit = x.to(wide.dtype) * r
        wide = wide * norm.scale
        wide = (wide - unit * (wide * unit).mean(dim=-1, keepdim=True)) * r
    return wide.to(grad.dtype)


def _wide(states: torch.Tensor) -> torch.dtype:
    return torch.promote_types(states.dtype, torch.float32)


def ready(module: Any) -> list[Projection] | None:
    """The projections of a fused module; None where dropout, say, makes it run its own code now."""
    if not hasattr(module, "byeori_attention") or (module.training and getattr(module, "attention_dropout", 0.0)):
        return None
    parts = [part for name in _NAMES if (part := projection(getattr(module, name)))]
    return parts if len(parts) == len(_NAMES) else None


def _forward(
    self: Any,
    hidden_states: torch.Tensor,
    position_embeddings: Any = None,
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    forest_layout: forest_attention.Layout | None = None,
    **rest: Any,
) -> Any:
    parts = ready(self)
    if parts is None or forest_layout is None or past_key_values is not None:
        given = {} if forest_layout is None else {"forest_layout": forest_layout}
        return type(self).forward(
            self,
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **given,
            **rest,
        )
    others, rows = forest_layout.others, forest_layout.rows
    turn = tuple(part[0].contiguous() for part in position_embeddings)
    short = turn if others is None else tuple(part[rows] for part in turn)
    x = hidden_states.squeeze(0)
    drops = (drop_of(parts), None) if others is None else (drop_of(parts[:1]), drop_of(parts[1:]))
    found = compute(x, others, (short, turn), self.head_dim, parts, self.byeori_norms, drops)
    states = (part.transpose(0, 1)[None] for part in found)
    out, _ = forest_attention.forest_attention(
        self, *states, None, forest_layout=forest_layout, **self.byeori_attention
    )
    return output(self.o_proj, out.flatten(2)), None


def compute(
    x: torch.Tensor,
    others: torch.Tensor | None,
    turns: tuple[Any, Any],
    size: int,
    parts: list[Any],
    norms: tuple[HeadNorm | None, HeadNorm | None],
    drops: tuple[Any, Any] = (None, None),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [n, d], others [T, d] or None, turns of both -> q [n, H, D], k and v [T, G, D]."""
    return _Heads.apply(x, others, turns, size, parts, norms, drops, *(m for part in parts for m in (part.a, part.b)))


def fuse_heads(model: torch.nn.Module) -> int:
    """Give attention modules the function above; returns how many.

    A module is taken where its own code, run on narrow matrices, hands the same queries, keys and values to the
    attention interface and multiplies the result by o_proj.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen: list[Any] = []

    def probe(module: Any, query: Any, key: Any, value: Any, mask: Any, **how: Any) -> Any:
        seen[:] = [query, key, value, how]
        return query.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register(_PROBE, probe)
    count = 0
    for module in model.modules():
        if all(projection(getattr(module, name, module)) for name in _NAMES) and hasattr(module, "o_proj"):
            norms = _equal(module, seen)
            if norms is not None:
                passed = {"scaling", "sliding_window", "softcap"}
                module.byeori_attention = {name: seen[3].get(name) for name in passed}
                module.byeori_norms = norms
                module.forward = MethodType(_forward, module)
                count += 1
    return count


@torch.no_grad()
def _equal(module: Any, seen: list[Any]) -> tuple[HeadNorm | None, HeadNorm | None] | None:
    """The norms with which the function equals the module; None where it does not."""
    try:
        size = module.head_dim
        small, parts, norms = _narrow(module)
        generator = torch.Generator().manual_seed(0)
        x, cos, sin = (torch.randn(1, 5, d, generator=generator, dtype=_wide(parts[0].weight)) for d in (6, size, size))
        out = type(module).forward(small, hidden_states=x, position_embeddings=(cos, sin), attention_mask=None)[0]
        ours = compute(x[0], None, ((cos[0], sin[0]), (cos[0], sin[0])), size, parts, norms)
        expected = [states[0].transpose(0, 1) for states in seen[:3]] + [
            small.o_proj(seen[0].transpose(1, 2).flatten(2))
        ]
        unknown = {name for name, value in seen[3].items() if value is not None} - _KNOWN
    except Exception:  # code of any kind, which asks for other things
        return None
    same = all(
        left.shape == right.shape and torch.allclose(left, right, rtol=1e-4, atol=1e-5)
        for left, right in zip([*ours, out], expected, strict=True)
    )
    if not same or unknown:
        return None
    device = next(module.parameters()).device
    query, key = (HeadNorm(scale=kept.scale.to(device), eps=kept.eps) if kept else None for kept in norms)
    return query, key


_KNOWN = {"dropout", "scaling", "sliding_window", "softcap"}


def _narrow(module: Any) -> tuple[Any, list[Projection], tuple[HeadNorm | None, HeadNorm | None]]:
    """A module with the same code, sizes of heads and norms, but 6 columns wide, in float32 or wider on the CPU."""
    small = copy.copy(module)
    small.config = copy.deepcopy(module.config)
    small.config._attn_implementation = _PROBE
    generator = torch.Generator().manual_seed(1)
    wide = _wide(next(module.parameters()))
    layers: dict[str, Any] = {}
    for name in (*_NAMES, "o_proj"):
        whole = getattr(module, name)
        shape = (whole.in_features, 6) if name == "o_proj" else (6, whole.out_features)
        layers[name] = torch.nn.Linear(*shape, bias=False, dtype=wide, device="cpu")
        layers[name].weight.normal_(generator=generator)
    query, key = (_head_norm(module, name, layers, wide) for name in ("q_norm", "k_norm"))
    small._modules = {**module._modules, **layers}
    small.training = False
    return small, [Projection(weight=layers[name].weight, bias=None) for name in _NAMES], (query, key)


def _head_norm(module: Any, name: str, layers: dict[str, Any], wide: torch.dtype) -> HeadNorm | None:
    """A norm of the module's, a copy of which goes to `layers`."""
    own = getattr(module, name, None)
    if own is None:
        return None
    layers[name] = copy.deepcopy(own).to("cpu", wide)
    layers[name].__dict__.pop("forward", None)
    return HeadNorm(scale=norm.scale_of(layers[name]), eps=norm.eps_of(own))
