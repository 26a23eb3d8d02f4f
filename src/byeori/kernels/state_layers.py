"""Layers that carry a state (Mamba 2, gated delta nets, short convolutions) on a forest.

Since version 5 transformers' layers read and write their convolution and recurrent states through one cache protocol.
Here such a layer runs over the nodes of the forest, parents first, with a stand-in for the cache that gives every node
its parent's final states and keeps its own; both are differentiable.

    nodes 0 | 1 2 (children of 0) | 3 (child of 2)      calls: [0], [2], then the leaves [1, 3] as rows of one batch

Leaves need no final state, so they are padded on the right and run together, whatever their depth. A layer whose code
knows no initial state (Mamba 1), or keeps its states elsewhere (MiniMax, RecurrentGemma), runs over whole paths;
all other layers still compute a shared prefix once.

T tokens, B rows of a call, L its length
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch.utils import _pytree as pytree

from byeori.kernels import device_kind, forest_attention

_WRITES = {"update_conv_state", "update_recurrent_state"}
_CACHES = ("cache_params", "past_key_values")
_INITIAL = {"initial_state", "initial_states"}
# Layers that carry a state past that protocol: in a cache or in attributes of their own.
_OTHERS = {"MiniMaxLightningAttention", "RecurrentGemmaRecurrentBlock"}
# Padded leaves are at most this much more than their tokens; a GPU rather computes idle tokens than starts kernels.
_PADDED = {"cpu": 1.25, "cuda": 2.0}

States = dict[tuple[str, int], torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One row of a call. node: of the forest. tokens: those that it computes, and before them those of ancestors
    that have no call of their own. parent: the node whose final states it starts with, or -1.
    """

    node: int
    tokens: list[int]
    parent: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """runs: the rows. index [B, L]: the token in each place. own: the places [n] of the B L whose output is kept.
    kept: whether final states are needed.
    """

    runs: list[Run]
    index: torch.Tensor
    own: torch.Tensor
    kept: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """calls: in order. place: [T], where the calls' outputs, one after the other, have each token."""

    calls: list[Call]
    place: torch.Tensor


def schedule(nodes: tuple[tuple[int, int, int], ...], device: torch.device, *, paths: bool) -> Schedule:
    """Return the calls for a forest's nodes (start, end, parent). paths: every leaf computes its whole path."""
    inner = {parent for _, _, parent in nodes}
    carried: dict[int, tuple[list[int], int]] = {-1: ([], -1)}
    depth, by_depth, leaves = {-1: 0}, dict[int, list[Run]](), list[Run]()
    for node, (start, end, parent) in enumerate(nodes):
        lead, state = carried.get(parent, ([], parent))
        tokens = [*lead, *range(start, end)]
        if node in inner and (paths or len(tokens) == 1):  # one token is a step of decoding to these layers
            carried[node] = tokens, state
            continue
        run, depth[node] = Run(node=node, tokens=tokens, parent=state), depth[state] + 1
        (by_depth.setdefault(depth[node], []) if node in inner else leaves).append(run)
    groups = [(group, True) for level in sorted(by_depth) for group in _equal(by_depth[level])]
    groups += [(group, False) for group in _similar(leaves, _PADDED[device_kind.kind_of(device)])]
    place, done, calls = [-1] * nodes[-1][1], 0, []
    for runs, kept in groups:
        own: list[int] = []
        length = max(2, *(len(run.tokens) for run in runs))
        for row, run in enumerate(runs):
            for at, token in enumerate(run.tokens):
                if place[token] < 0:
                    place[token] = done + len(own)
                    own.append(row * length + at)
        done += len(own)
        rows = [run.tokens + run.tokens[-1:] * (length - len(run.tokens)) for run in runs]
        index = torch.tensor(rows, device=device)
        calls.append(Call(runs=runs, index=index, own=torch.tensor(own, device=device), kept=kept))
    return Schedule(calls=calls, place=torch.tensor(place, device=device))


def _equal(runs: list[Run]) -> list[list[Run]]:
    """Runs of one depth whose final states are needed, by length: padding would change the states."""
    groups: dict[int, list[Run]] = {}
    for run in runs:
        groups.setdefault(len(run.tokens), []).append(run)
    return list(groups.values())


def _similar(runs: list[Run], padded: float) -> Iterator[list[Run]]:
    """Groups of similar length, longest first."""
    group: list[Run] = []
    tokens = 0
    for run in sorted(runs, key=lambda run: -len(run.tokens)):
        tokens += len(run.tokens)
        if group and len(group[0].tokens) * (len(group) + 1) > padded * tokens:
            yield group
            group, tokens = [], len(run.tokens)
        group.append(run)
    if group:
        yield group


class _Cache:
    """What a layer gets for a cache; its states are of one call."""

    def __init__(self, before: States) -> None:
        self.before, self.after = before, dict[tuple[str, int], torch.Tensor]()

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self.before.get(("conv", state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self.before.get(("recurrent", state_idx))

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **rest: Any,
    ) -> torch.Tensor:
        size, key = conv_kernel_size or conv_states.shape[-1], ("conv", state_idx)
        if key in self.before:
            whole = torch.cat([self.before[key].to(conv_states), conv_states], dim=-1)
        else:
            whole = torch.nn.functional.pad(conv_states, (max(0, size - conv_states.shape[-1]), 0))
        self.after[key] = whole[..., -size:]
        return whole

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **rest: Any
    ) -> torch.Tensor:
        self.after["recurrent", state_idx] = recurrent_states
        return recurrent_states

    def is_recording_past(self, layer_idx: int) -> bool:
        """Layers that record the past do not overwrite their states."""
        return True


@torch._disable_dynamo
def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    layout = forest_attention.current()
    if layout is None:
        return type(self).forward(self, *args, **kwargs)
    layout.calls[0] += 1
    names = list(inspect.signature(type(self).forward).parameters)[1:]
    given = dict(zip(names, args, strict=False)) | kwargs
    given |= dict.fromkeys({"attention_mask"} & set(given))
    tokens, device = layout.tree[-1][1], layout.rows.device
    cache = self.byeori_state
    plan = layout.schedules.get(cache is None)
    if plan is None:
        plan = layout.schedules[cache is None] = schedule(layout.tree, device, paths=cache is None)
    if cache is None:
        given |= dict.fromkeys(set(_CACHES) & set(given))
    states: dict[int, States] = {}
    parts: list[Any] = []
    for call in plan.calls:
        before = _Cache(_stack(states, call.runs))
        inputs = pytree.tree_map(lambda value, index=call.index: _take(value, index, tokens), given)
        output = type(self).forward(self, **inputs | ({} if cache is None else {cache: before}))
        parts.append(pytree.tree_map(lambda value, call=call: _own(value, call), output))
        if call.kept:
            for row, run in enumerate(call.runs):
                states[run.node] = {key: value[row : row + 1] for key, value in before.after.items()}
    return pytree.tree_map(lambda *values: _joined(values, plan.place), *parts)


def _stack(states: dict[int, States], runs: list[Run]) -> States:
    """The states that a call starts with: empty if all rows are roots; a root among others starts with zeros."""
    found = next((states[run.parent] for run in runs if run.parent >= 0), None)
    if found is None:
        return {}
    zeros = {key: torch.zeros_like(value) for key, value in found.items()}
    rows = [states.get(run.parent, zeros) for run in runs]
    return {key: torch.cat([row[key] for row in rows]) for key in found}


def _take(value: Any, index: torch.Tensor, tokens: int) -> Any:
    """A tensor [1, T, ...] at the places of a call [B, L, ...]; anything else as it is."""
    if not isinstance(value, torch.Tensor) or value.dim() < 2 or value.shape[:2] != (1, tokens):
        return value
    return value[0][index]  # not index_select, whose backward pass adds in no fixed order on a GPU


def _own(value: Any, call: Call) -> Any:
    """The kept places of an output [B, L, ...]; None for final states, which some layers return as well."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.flatten(0, 1)[call.own] if value.shape[:2] == call.index.shape else None


def _joined(values: tuple[Any, ...], place: torch.Tensor) -> Any:
    return torch.cat(values)[place][None] if isinstance(values[0], torch.Tensor) else values[0]


def carries_state(module: torch.nn.Module) -> bool:
    """Return whether a module writes its states to transformers' cache."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return bool(code and _WRITES & set(code.co_names))


def by_paths(module: torch.nn.Module) -> bool:
    """Return whether a module keeps a recurrent state that its scan cannot start with, or keeps it elsewhere."""
    if type(module).__name__ in _OTHERS:
        return True
    code = inspect.unwrap(type(module).forward).__code__
    named = {name for constant in code.co_consts if isinstance(constant, tuple) for name in constant}
    return "update_recurrent_state" in code.co_names and not _INITIAL & named


def attach(model: torch.nn.Module, *, paths: bool = False) -> int:
    """Give the layers that carry a state the function above; return how many. paths: run all of them over paths."""
    found = [each for each in model.modules() if carries_state(each) or type(each).__name__ in _OTHERS]
    for module in found:
        names = inspect.signature(type(module).forward).parameters
        module.byeori_state = None if paths or by_paths(module) else next(name for name in _CACHES if name in names)
        module.forward = MethodType(_forward, module)
    return len(found)


def note(model: torch.nn.Module) -> str | None:
    """Return a sentence about how a model's layers with states run, or None if it has none."""
    caches = [module.byeori_state for module in model.modules() if hasattr(module, "byeori_state")]
    if not caches:
        return None
    if None in caches:
        return (
            f"{len(caches)} layers carry a state that their scan cannot start with: they run over whole rows, "
            "everything else once per shared prefix"
        )
    return f"{len(caches)} layers carry a state: a shared prefix is computed once in them too, and its state handed on"
