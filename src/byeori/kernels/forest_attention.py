"""Attention on a forest: every token attends to its own path from the root.

One function is registered with transformers' attention interface; it and the layers that carry a state
(state_layers.py) find the layout of the running forest in `current`, since not every model passes keyword arguments
on. Queries of a node see all keys of its ancestors, and those of the node itself causally.

`BACKENDS` lists the implementations. The first that supports a call runs it; the last two are plain PyTorch.

    D head size, H query heads, G key/value heads, T unique tokens, n a node's queries, m its path's keys (m >= n)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from byeori.batch.forest import Forest
from byeori.errors import ModelError
from byeori.kernels import cpu_attention, cpu_tiles, cuda_attention, cuda_calls, device_kind, dispatch

NAME = "byeori_forest"
# Tests set a back end's name here; it then runs every call.
OVERRIDE: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What attention needs to know of a forest; made once per micro-batch and shared by all layers.

    nodes: (start, end) of the queries and the (start, end) runs of the keys, root first, the node itself last.
    masks: (node, window, or minus the chunk) -> [n, m], added to the scores; made when a layer first needs it.
    tree: the forest's own nodes. plans: window -> the GPU kernel's calls; made when a layer first needs them.
    schedules: what layers that carry a state run, node by node and by whole paths; made when one first needs it.
    calls: how often layers asked for the layout; 0 after a forward pass means that the model does not use it.
    rows: the rows of the hidden states that predict something [n], ascending, on the model's device; some others may be
    among them to round up their number. row_numbers: the same on the host.
    kv_input: the last layer's input for keys and values [T, d] if its queries are those of `rows` alone.
    """

    nodes: tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...]
    rows: torch.Tensor
    row_numbers: list[int]
    kv_input: torch.Tensor | None = None
    tree: tuple[tuple[int, int, int], ...] = ()
    masks: dict[tuple[int, int | None], torch.Tensor] = field(default_factory=dict)
    plans: dict[int | None, list[cuda_calls.Call]] = field(default_factory=dict)
    schedules: dict[bool, Any] = field(default_factory=dict)
    calls: list[int] = field(default_factory=lambda: [0])


_current: Layout | None = None


def current() -> Layout | None:
    """Return the layout of the forest that is running, or None."""
    return _current


@contextmanager
def using(layout: Layout | None) -> Iterator[None]:
    """Run layers over a forest of this layout inside; None: over plain sequences."""
    global _current
    before, _current = _current, layout
    try:
        yield
    finally:
        _current = before


def recompute_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return what torch's checkpoint enters for a layer's forward pass, and when it runs the layer again."""
    return nullcontext(), using(_current)


def layout(forest: Forest, numbers: list[int] | None = None, rows: torch.Tensor | None = None) -> Layout:
    """Return the layout of a forest.

    numbers, rows: the layout's row_numbers and rows; by default those of the targets, on the CPU.
    """
    paths: list[tuple[tuple[int, int], ...]] = []
    for start, end, parent in forest.nodes:
        above = paths[parent] if parent >= 0 else ()
        if above and above[-1][1] == start:  # a first child starts where its parent ends: one run, no copy
            paths.append((*above[:-1], (above[-1][0], end)))
        else:
            paths.append((*above, (start, end)))
    nodes = tuple((start, end, path) for (start, end, _), path in zip(forest.nodes, paths, strict=True))
    numbers = sorted(set(forest.target_index.tolist())) if numbers is None else numbers
    rows = torch.tensor(numbers) if rows is None else rows
    return Layout(nodes=nodes, rows=rows, row_numbers=numbers, tree=forest.nodes)


def of_rows(whole: Layout, kv_input: torch.Tensor) -> Layout:
    """Return the layout with the queries of `rows` alone; a run of neighbours is a node, its path ends at the last."""
    nodes, at = [], 0
    rows = whole.row_numbers
    for _, end, path in whole.nodes:
        while at < len(rows) and rows[at] < end:
            stop = at + 1
            while stop < len(rows) and rows[stop] == rows[stop - 1] + 1 and rows[stop] < end:
                stop += 1
            nodes.append((at, stop, (*path[:-1], (path[-1][0], rows[stop - 1] + 1))))
            at = stop
    return Layout(nodes=tuple(nodes), rows=whole.rows, row_numbers=rows, kv_input=kv_input, calls=whole.calls)


def dense_mask(whole: Layout, dtype: torch.dtype) -> torch.Tensor:
    """Return the forest as a mask [1, 1, T, T]: 0 where a query sees a key, else the smallest number of the type."""
    lowest, device = torch.finfo(dtype).min, whole.rows.device
    tokens = max(end for _, end, _ in whole.nodes)
    mask = torch.full((tokens, tokens), lowest, dtype=dtype, device=device)
    for start, end, path in whole.nodes:
        for begin, stop in path:
            mask[start:end, begin:stop] = 0
        own = torch.full((end - start, end - start), lowest, dtype=dtype, device=device)
        mask[start:end, start:end] = own.triu_(1)
    return mask[None, None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One layer's attention: query [1, H, T, D], key and value [1, G, T, D]; the rest as in `forest_attention`.

    chunk: a token sees those of its own chunk of positions, [0, chunk), [chunk, 2 chunk), ... (Llama 4).
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    layout: Layout
    scale: float
    window: int | None = None
    chunk: int | None = None
    dropout: float = 0.0
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def standard(self) -> bool:
        """Whether the weights are a plain softmax of the scores."""
        return self.softcap is None and self.sinks is None

    @property
    def by_token(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value as [T, heads, D]."""
        query, key, value = (states.squeeze(0).transpose(0, 1) for states in (self.query, self.key, self.value))
        return query, key, value


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """One implementation: run(call) -> [1, T, H, D], for calls that it supports."""

    name: str
    supports: Callable[[Call], bool]
    run: Callable[[Call], torch.Tensor]


@torch._disable_dynamo  # as torch.compiler.disable, which would import the compiler with this file (1 to 2 s)
def forest_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    forest_layout: Layout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for transformers' interface: query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D].

    softcap: scores become softcap * tanh(scores / softcap) (Gemma 2, arXiv:2408.00118). s_aux: a score per head [H]
    that takes its share of the softmax and has no value (attention sinks, gpt-oss). dropout: a query on a shared
    prefix draws one mask for all branches.

    Raises:
        RuntimeError: if it is called without a layout. ModelError: if the model passes a mask of its own.
    """
    forest_layout = forest_layout or _current
    if forest_layout is None:
        raise RuntimeError("forest attention was called without a layout")
    if attention_mask is not None:
        raise ModelError("its attention masks tokens by rules of its own")
    if rest.get("position_bias") is not None:  # made for the order of a row
        raise ModelError("its attention adds a bias by distance to the scores")
    forest_layout.calls[0] += 1
    window, chunk = _limits(module, sliding_window, forest_layout)
    call = Call(
        query=query,
        key=key,
        value=value,
        layout=forest_layout,
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=window,
        chunk=chunk,
        dropout=dropout,
        softcap=softcap,
        sinks=s_aux,
    )
    return backend(call).run(call).contiguous(), None  # some models view it as [1, T, H D]


def _limits(module: Any, window: int | None, layout: Layout) -> tuple[int | None, int | None]:
    """The window and the chunk of a layer: some models put them into their masks alone (Llama 4's chunks)."""
    config, index = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None) or ()
    kind = kinds[index] if isinstance(index, int) and index < len(kinds) else None
    if config is not None and kind == "chunked_attention":
        chunk = int(config.attention_chunk_size)
        longest = max(sum(stop - begin for begin, stop in path) for _, _, path in layout.nodes)
        return None, chunk if longest > chunk else None
    if kind == "sliding_attention" and not window:
        window = getattr(config, "sliding_window", None)
    return window or None, None


def backend(call: Call) -> Backend:
    """Return the implementation that runs a call."""
    if OVERRIDE is not None:
        return next(each for each in BACKENDS if each.name == OVERRIDE)
    return next(each for each in BACKENDS if each.supports(call))


def _run_flash(call: Call) -> torch.Tensor:
    layout = call.layout
    if call.window not in layout.plans:
        device = call.query.device
        layout.plans[call.window] = cuda_calls.plan(layout.tree, layout.nodes, window=call.window, device=device)
    return cuda_attention.attend(*call.by_token, layout.plans[call.window], scale=call.scale)[None]


def _run_tiles(call: Call) -> torch.Tensor:
    return cpu_tiles.attend(*call.by_token, call.layout.nodes, call.window, call.scale)[None]


def _run_blocks(call: Call) -> torch.Tensor:
    return cpu_attention.attend(call.query, call.key, call.value, call.layout.nodes, call.window, call.scale)


def _node_by_node(attend: Callable[..., torch.Tensor]) -> Callable[[Call], torch.Tensor]:
    """An implementation that calls attend(call, queries, keys, values, mask) for each node, its path gathered."""

    def run(call: Call) -> torch.Tensor:
        # a window's masks are shared by all layers, so they are made before any output
        masks = [_mask(call, index) for index in range(len(call.layout.nodes))]
        outputs = []
        for (start, end, path), mask in zip(call.layout.nodes, masks, strict=True):
            keys, values = cpu_attention.gather(call.key, path), cpu_attention.gather(call.value, path)
            outputs.append(attend(call, call.query[:, :, start:end], keys, values, mask))
        return torch.cat(outputs, dim=2).transpose(1, 2)

    return run


def _mask(call: Call, index: int) -> torch.Tensor | None:
    """0 where a query sees a key, else -inf: [n, m] in the queries' type; None where plain causal is the same."""
    (start, end, path), window, like = call.layout.nodes[index], call.window, call.query
    if call.chunk is not None:
        window = -call.chunk
    n, m = end - start, sum(stop - begin for begin, stop in path)
    if window is not None and m <= abs(window):
        window = None
    if window is None and n == m:
        return None
    if (index, window) not in call.layout.masks:
        row, column = torch.arange(m - n, m, device=like.device)[:, None], torch.arange(m, device=like.device)[None, :]
        seen = row >= column
        if window is not None:
            seen &= (row - column < window) if window > 0 else (row // -window == column // -window)
        call.layout.masks[index, window] = like.new_zeros(n, m).masked_fill_(~seen, float("-inf"))
    return call.layout.masks[index, window]


def _sdpa(
    call: Call, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    if query.is_meta and device_kind.kind(query) == "cuda":
        return _rehearsed_sdpa(call, query, key, value, mask)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=call.dropout,
        is_causal=mask is None,
        scale=call.scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )


def _rehearsed_sdpa(
    call: Call, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """In a rehearsal: what PyTorch would choose on the GPU (aten/native/transformers/cuda/sdp_utils.cpp).

    A fused kernel saves the output and a number per row, the written-out form all scores. Flash attention has heads of
    up to 256 numbers and no masks; the memory-efficient kernel has both, but not fewer heads for keys than for queries.
    """
    size, half, new = query.shape[-1], query.dtype.itemsize == 2, device_kind.capability(query.device) >= 8
    flash = new and half and size <= 256 and value.shape[-1] == size and mask is None
    efficient = query.shape[1] == key.shape[1] and (new or query.dtype != torch.bfloat16)
    output: torch.Tensor
    if flash or efficient:
        fused = torch.ops.aten._scaled_dot_product_flash_attention
        output = fused(query, key, value, call.dropout, mask is None, scale=call.scale)[0]
    else:
        written_out = torch.ops.aten._scaled_dot_product_attention_math
        how = {"dropout_p": call.dropout, "is_causal": mask is None, "scale": call.scale, "enable_gqa": True}
        output = written_out(query, key, value, mask, **how)[0]
    return output


def _eager(
    call: Call, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """What scaled_dot_product_attention does not offer: capped scores and sinks."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * call.scale
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    if mask is None:
        mask = torch.full_like(scores[0, 0], float("-inf")).triu_(1)
    scores = scores + mask
    if call.sinks is not None:
        sinks = call.sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks.to(scores)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=dispatch.wide(scores)).to(value.dtype)[..., : key.shape[2]]
    return F.dropout(weights, call.dropout) @ value


def _plain(call: Call) -> bool:
    return call.standard and not call.dropout and call.chunk is None


BACKENDS = (
    Backend(
        name="flash",
        supports=lambda call: _plain(call) and cuda_attention.supports(call.query, call.key, call.value),
        run=_run_flash,
    ),
    Backend(
        name="tiles",
        supports=lambda call: _plain(call) and cpu_tiles.supports(call.query, call.key, call.value),
        run=_run_tiles,
    ),
    Backend(name="blocks", supports=lambda call: _plain(call) and cpu_attention.supports(call.query), run=_run_blocks),
    Backend(name="sdpa", supports=lambda call: call.standard, run=_node_by_node(_sdpa)),
    Backend(name="eager", supports=lambda call: True, run=_node_by_node(_eager)),
)


def register() -> None:
    """Add the function to transformers' attention interface under NAME, which no other model uses."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS[NAME] = forest_attention
