"""Queries, keys and values in one function: projections, adapters, norms over heads (Qwen 3, Gemma 3), rotation.

    q = rope(norm(W_q x)), k = rope(norm(W_k x)), v = W_v x
    rope(n) = n cos + half(n) sin, half(n) = (-n2, n1) for n = (n1, n2)        (RoPE: Su et al., arXiv:2104.09864)

The last layer's queries may be those of a few rows, with keys and values of all. Saved are x, if an adapter needs it,
and the inputs of the norms.

`KNOWN` is the table of the attention modules that compute this. tests/kernels/test_qkv_rope.py compares each entry with
the module's own code, and finds the modules of transformers that are missing; a new one is one line here.

    D head size, H heads, T tokens
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch

from byeori.kernels import dispatch, forest_attention, rms_norm
from byeori.kernels.lora_linear import Projection, dropout_of, output, project, project_backward, projection

NAMES = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionModule:
    """What an attention module computes besides projections, rotation and o_proj; attributes are the module's.

    norms: queries and keys pass q_norm and k_norm, RMS norms over each head. window: the sliding window of a module, or
    None. softcap: the cap of its scores, or None. when: whether the entry holds for a module.
    """

    norms: bool = False
    window: Callable[[Any], int | None] = lambda module: None
    softcap: Callable[[Any], float | None] = lambda module: None
    when: Callable[[Any], bool] = lambda module: True


def _window(module: Any) -> int | None:
    return module.sliding_window


def _softcap(module: Any) -> float | None:
    return module.attn_logit_softcapping


_PLAIN = AttentionModule()
_WINDOW = AttentionModule(window=_window)
_CONFIG_WINDOW = AttentionModule(window=lambda module: module.config.sliding_window)
_NORMS = AttentionModule(norms=True)
_NORMS_WINDOW = AttentionModule(norms=True, window=_window)
_SOFTCAP = AttentionModule(window=_window, softcap=_softcap)
# layers with full attention do not rotate, unless all have it
_LOCAL_ROPE = AttentionModule(norms=True, window=_window, when=lambda m: m.sliding_window is None or m.is_sliding)

_BY_KIND = {
    _PLAIN: "Arcee AriaText Emu3 Gemma Granite GraniteMoe GraniteMoeShared HyperCLOVAX Jais2 Llama MllamaTextSelf "
    "Phimoe Qwen2Moe SeedOss SolarOpen",
    _WINDOW: "Cwm Ministral Qwen2",
    _CONFIG_WINDOW: "MiniMax Mistral Mixtral Starcoder2",
    _NORMS: "Apertus HYV3",
    _NORMS_WINDOW: "Dots1 Gemma3 Mellum Qwen3 Qwen3Moe",
    _SOFTCAP: "Gemma2 VaultGemma",
    _LOCAL_ROPE: "Exaone4 ExaoneMoe Kolibri1",
    AttentionModule(when=lambda m: m.config.position_embedding_type == "rope"): "GraniteMoeHybrid",
    AttentionModule(when=lambda m: m.config.clip_qkv is None): "Olmo",
    AttentionModule(window=_window, when=lambda m: m.use_rope): "SmolLM3",
}
KNOWN = {f"{name}Attention": kind for kind, names in _BY_KIND.items() for name in names.split()}


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadNorm:
    """An RMS norm over each head: scale [D], in float32 or float64."""

    scale: torch.Tensor
    eps: float


Rope = tuple[torch.Tensor, torch.Tensor]  # cos and sin, each [T, D]


class _Qkv(torch.autograd.Function):
    """x [n, d] -> q [n, H, D]; kv_input [T, d] -> k and v [T, G, D]; kv_input is None if it is x.

    ropes: of x, and of kv_input. The adapters are passed once more, so that autograd sees them.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        x, kv_input, ropes, size, parts, norms, (drop, kv_drop), *_ = args
        if kv_input is None:
            raw, hidden = project(x, parts, drop)
        else:
            of_x, of_kv = project(x, parts[:1], drop), project(kv_input, parts[1:], kv_drop)
            raw, hidden = ([*one, *other] for one, other in zip(of_x, of_kv, strict=True))
        heads = [states.view(len(states), -1, size) for states in raw]
        rotated = [_rope(*each) for each in zip(heads, ropes, norms, strict=False)]
        normed = [states if norm else None for states, norm in zip(heads, norms, strict=False)]
        adapted = any(h is not None for h in hidden)
        inputs = (x, kv_input) if adapted else (None, None)
        ctx.save_for_backward(*inputs, *hidden, *normed, *(r for _, r in rotated))
        ctx.parts, ctx.norms, ctx.ropes, ctx.drops, ctx.joint = parts, norms, ropes, (drop, kv_drop), kv_input is None
        return rotated[0][0], rotated[1][0], heads[2]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, kv_input, h_q, h_k, h_v, q, k, r_q, r_k = ctx.saved_tensors
        to_q = _rope_backward(grads[0], q, ctx.ropes[0], ctx.norms[0], r_q).flatten(1)
        to_k = _rope_backward(grads[1], k, ctx.ropes[1], ctx.norms[1], r_k).flatten(1)
        drop, kv_drop = ctx.drops
        gs, wanted = [to_q, to_k, grads[2].flatten(1)], ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        if ctx.joint:
            to_x, adapters = project_backward(gs, x, [h_q, h_k, h_v], ctx.parts, wanted=wanted, drop=drop)
            return to_x, *[None] * 6, *adapters
        to_x, of_q = project_backward(gs[:1], x, [h_q], ctx.parts[:1], wanted=wanted, drop=drop)
        rest = ctx.parts[1:]
        to_kv, of_kv = project_backward(gs[1:], kv_input, [h_k, h_v], rest, wanted=wanted, drop=kv_drop)
        return to_x, to_kv, *[None] * 5, *of_q, *of_kv


def _rope(x: torch.Tensor, rope: Rope, norm: HeadNorm | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x [T, H, D], cos and sin [T, D] -> the same shape, and 1 / rms [T, H, 1] if there is a norm."""
    cos, sin = rope
    if dispatch.supports(x, cos, sin, kernel="rope"):
        out, r = torch.empty_like(x), x.new_empty(*x.shape[:2], 1, dtype=torch.float32) if norm else None
        scale, eps = (norm.scale, norm.eps) if norm else (None, 0.0)
        dispatch.call("rope", x, cos, sin, scale, eps, out, r, *x.shape)
        return out, r
    n, r = x.to(dispatch.wide(x)), None
    if norm:
        r = n.square().mean(dim=-1, keepdim=True).add_(norm.eps).rsqrt_()
        n = n * r * norm.scale
    one, two = n.chunk(2, dim=-1)
    half = torch.cat([-two, one], dim=-1)
    return (n * cos[:, None] + half * sin[:, None]).to(x.dtype), r


def _rope_backward(
    grad: torch.Tensor, x: torch.Tensor | None, rope: Rope, norm: HeadNorm | None, r: torch.Tensor | None
) -> torch.Tensor:
    """The gradient of _rope's x; x itself is needed only if there is a norm."""
    cos, sin = rope
    if dispatch.supports(cos, sin, kernel="rope") and grad.dtype == cos.dtype:
        grad, out = grad.contiguous(), torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        dispatch.call("rope_back", grad, x, cos, sin, norm.scale if norm else None, r, out, *grad.shape)
        return out
    g = grad.to(dispatch.wide(grad))
    one, two = (g * sin[:, None]).chunk(2, dim=-1)
    g = g * cos[:, None] + torch.cat([two, -one], dim=-1)
    if norm and x is not None and r is not None:
        unit = x.to(g.dtype) * r
        g = g * norm.scale
        g = (g - unit * (g * unit).mean(dim=-1, keepdim=True)) * r
    return g.to(grad.dtype)


def ready(module: Any) -> list[Projection] | None:
    """Return the projections of a fused module; None if it has to run its own code now, for instance for dropout."""
    if not hasattr(module, "byeori_attention") or (module.training and getattr(module, "attention_dropout", 0.0)):
        return None
    parts = [part for name in NAMES if (part := projection(getattr(module, name)))]
    return parts if len(parts) == len(NAMES) else None


def fused_forward(
    self: Any,
    hidden_states: torch.Tensor,
    position_embeddings: Any = None,
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    **rest: Any,
) -> Any:
    """Forward pass of a fused attention module."""
    parts, forest_layout = ready(self), forest_attention.current()
    if parts is None or forest_layout is None or past_key_values is not None:
        return type(self).forward(
            self,
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **rest,
        )
    kv_input, rows = forest_layout.kv_input, forest_layout.rows
    rope = tuple(part[0].contiguous() for part in position_embeddings)
    of_rows = rope if kv_input is None else tuple(part[rows] for part in rope)
    x = hidden_states.squeeze(0)
    drops = (dropout_of(parts), None) if kv_input is None else (dropout_of(parts[:1]), dropout_of(parts[1:]))
    qkv = compute(x, kv_input, (of_rows, rope), self.head_dim, parts, self.byeori_norms, drops)
    states = (part.transpose(0, 1)[None] for part in qkv)
    out, _ = forest_attention.forest_attention(
        self, *states, None, forest_layout=forest_layout, **self.byeori_attention
    )
    return output(self.o_proj, out.flatten(2)), None


def compute(
    x: torch.Tensor,
    kv_input: torch.Tensor | None,
    ropes: tuple[Any, Any],
    size: int,
    parts: list[Any],
    norms: tuple[HeadNorm | None, HeadNorm | None],
    drops: tuple[Any, Any] = (None, None),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q [n, H, D], k and v [T, G, D] for x [n, d] and kv_input [T, d] or None, with the ropes of both."""
    return _Qkv.apply(x, kv_input, ropes, size, parts, norms, drops, *(m for part in parts for m in (part.a, part.b)))


def fuse_attention(model: torch.nn.Module) -> int:
    """Give the attention modules of the table the function above; return how many."""
    count = 0
    for module in model.modules():
        known = _known(module)
        if known is None:
            continue
        norms = [head_norm(module, name) if known.norms else None for name in ("q_norm", "k_norm")]
        if known.norms and None in norms:
            continue
        module.byeori_attention = {
            "scaling": module.scaling,
            "sliding_window": known.window(module),
            "softcap": known.softcap(module),
        }
        module.byeori_norms = norms
        module.forward = MethodType(fused_forward, module)
        count += 1
    return count


def unknown(model: torch.nn.Module) -> list[str]:
    """Return the classes of attention modules with separate projections that have no fused form."""
    kinds = {type(m).__name__ for m in model.modules() if _projections(m) and not hasattr(m, "byeori_attention")}
    return sorted(kinds)


def _projections(module: Any) -> bool:
    return all(projection(getattr(module, name, module)) for name in NAMES) and hasattr(module, "o_proj")


def _known(module: Any) -> AttentionModule | None:
    """The module's entry in the table, if it holds for this layer."""
    kind = type(module)
    known = KNOWN.get(kind.__name__) if kind.__module__.startswith("transformers.") else None
    if known is None or not _projections(module):
        return None
    return known if _rotates_whole_heads(module.config) and known.when(module) else None


def _rotates_whole_heads(config: Any) -> bool:
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *rope.values()]  # one dict, or one for each kind of layer
    return all(each.get("partial_rotary_factor", 1.0) == 1.0 for each in kinds if isinstance(each, dict))


@torch.no_grad()
def head_norm(module: Any, name: str) -> HeadNorm | None:
    """Return a module's norm over each head; None if it is of another kind."""
    norm = getattr(module, name)
    whole = copy.deepcopy(norm).to("cpu", dispatch.wide(norm.weight))
    whole.__dict__.pop("forward", None)
    scale = rms_norm.scale_of(whole)
    return (
        None if scale is None else HeadNorm(scale=scale.to(next(module.parameters()).device), eps=rms_norm.eps_of(norm))
    )
