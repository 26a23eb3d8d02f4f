"""How a forest is cut into the sequences of a GPU's variable-length attention kernel.

A node and its first child are neighbours, so a forest falls into runs, each a causal sequence of its own:

    run        a root or a later child, followed by its first child, that one's first child, ...
    light      the tokens below a node that are not in its own run; depth-first order keeps them contiguous

Full attention is a cascade: one causal call over the runs, then for every depth one call without a mask, in which the
light tokens of that depth's nodes attend to the nodes' own keys. Every pair of query and key occurs once; nothing is
copied if only one node has light tokens (a pair of answers to one prompt). Two answers `c d` and `x y` to `a b`:

    index      0 1 | 2 3 | 4 5
    token      a b | c d | x y        runs (0, 4), (4, 6); light tokens of the prompt (4, 6) see its keys (0, 2)

A window shorter than a path needs the keys in the path's order: they are gathered, and the kernel's causal mask is
aligned to the last key.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch

from byeori.support.text_files import one_line

# (start, end, parent) of a forest's node; a first child follows its parent.
Node = tuple[int, int, int]
# (start, end) of some queries and the (start, end) runs of their keys; the last query is that of the last key.
Path = tuple[int, int, tuple[tuple[int, int], ...]]
Rows: TypeAlias = slice | torch.Tensor

# How full attention runs; a window always gathers. benchmarks/gpu.py measures both.
FULL: Literal["cascade", "gather"] = "cascade"


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One call of the kernel: sequence i has queries cu_q[i]..cu_q[i+1] of `queries`, keys likewise.

    queries, keys: rows of the query and key states. once: no key occurs twice.
    causal: the last query sees all keys, the one before it all but the last, ...; otherwise each sees all.
    window: keys that a query sees, its own included. cu_q, cu_k: int32 on the device [sequences + 1].
    max_q, max_k: of the longest sequence.
    """

    queries: Rows
    keys: Rows
    once: bool
    causal: bool
    window: int | None
    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    max_k: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Spans:
    """A call before it is on the device: (start, end) of the queries of each sequence, and its keys' rows."""

    queries: list[tuple[int, int]]
    keys: list[np.ndarray]


def plan(
    tree: Sequence[Node],
    paths: Sequence[Path],
    *,
    window: int | None,
    device: torch.device,
    full: str | None = None,
) -> list[Call]:
    """Return the calls of a forest's attention, the causal one first; all their indices travel in one copy.

    tree: the forest's nodes; empty if the queries are those of some tokens alone. paths: the same with their keys;
    their queries are all queries, in order. window: tokens that a query sees, itself included. full: overrides FULL.
    """
    if window is not None and window >= max(sum(end - start for start, end in keys) for _, _, keys in paths):
        window = None
    cascade = bool(tree) and window is None and (full or FULL) == "cascade"
    return _place(_cascade(tree) if cascade else [_gathered(paths, window)], window, device)


def _run_ends(nodes: Sequence[Node]) -> list[int]:
    """The end of each node's run."""
    ends = [end for _, end, _ in nodes]
    for index in range(len(nodes) - 1, -1, -1):
        start, _, parent = nodes[index]
        if parent >= 0 and nodes[parent][1] == start:
            ends[parent] = ends[index]
    return ends


def _starts_run(nodes: Sequence[Node], index: int) -> bool:
    start, _, parent = nodes[index]
    return parent < 0 or nodes[parent][1] != start


def _cascade(nodes: Sequence[Node]) -> list[_Spans]:
    run_ends = _run_ends(nodes)
    below = [end for _, end, _ in nodes]
    depths: list[int] = []
    for _, _, parent in nodes:
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    for index in range(len(nodes) - 1, -1, -1):
        parent = nodes[index][2]
        if parent >= 0:
            below[parent] = max(below[parent], below[index])
    runs = [(nodes[i][0], run_ends[i]) for i in range(len(nodes)) if _starts_run(nodes, i)]
    out = [_Spans(queries=runs, keys=[np.arange(*run, dtype=np.int32) for run in runs])]
    for depth in range(max(depths, default=0)):
        light = [i for i, at in enumerate(depths) if at == depth and below[i] > run_ends[i]]
        if light:
            keys = [np.arange(nodes[i][0], nodes[i][1], dtype=np.int32) for i in light]
            out.append(_Spans(queries=[(run_ends[i], below[i]) for i in light], keys=keys))
    return out


def _gathered(paths: Sequence[Path], window: int | None) -> _Spans:
    spans = _Spans(queries=[], keys=[])
    for start, end, keys in _joined(paths):
        every = np.concatenate([np.arange(*run, dtype=np.int32) for run in keys])
        seen = len(every) if window is None else end - start + window - 1
        spans.queries.append((start, end))
        spans.keys.append(every[-seen:])
    return spans


def _joined(paths: Sequence[Path]) -> list[Path]:
    """Join paths that continue the one before them."""
    out: list[Path] = []
    for start, end, keys in paths:
        before = out[-1] if out else None
        if (
            before
            and before[1] == start
            and (*before[2][:-1], before[2][-1][0]) == (*keys[:-1], keys[-1][0])
            and before[2][-1][1] + end - start == keys[-1][1]
        ):
            out[-1] = (before[0], end, keys)
        else:
            out.append((start, end, keys))
    return out


def _place(spans: list[_Spans], window: int | None, device: torch.device) -> list[Call]:
    """Copy the indices of all calls to the device at once."""
    numbers: list[np.ndarray] = []
    for part in spans:
        lengths = ([end - start for start, end in part.queries], [len(keys) for keys in part.keys])
        queries = np.concatenate([np.arange(*span, dtype=np.int32) for span in part.queries])
        numbers += [queries, np.concatenate(part.keys), *(np.cumsum([0, *each], dtype=np.int32) for each in lengths)]
    sizes = [len(each) for each in numbers]
    parts = list(to_device(torch.from_numpy(np.concatenate(numbers)), device).split(sizes))
    calls = []
    for at in range(0, len(parts), 4):
        queries, keys, cu_q, cu_k = numbers[at : at + 4]
        calls.append(
            Call(
                queries=_rows(queries, parts[at]),
                keys=_rows(keys, parts[at + 1]),
                once=len(np.unique(keys)) == len(keys),
                causal=at == 0,
                window=window,
                cu_q=parts[at + 2],
                cu_k=parts[at + 3],
                max_q=max(2, int(np.diff(cu_q).max())),  # 1 would select the kernel's code for generation
                max_k=int(np.diff(cu_k).max()),
            )
        )
    return calls


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a copy on the device; to a GPU from pinned memory, so that the host does not wait for the GPU."""
    if device.type != "cuda" or pinning_problem():
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


@functools.cache
def pinning_problem() -> str | None:
    """Return why copies from pinned memory do not work on this GPU, or None: tried once."""
    numbers = torch.arange(1000)
    try:
        arrived = numbers.pin_memory().to("cuda", non_blocking=True).cpu()
    except Exception as error:  # a limit on locked memory, a driver
        return one_line(error, 200)
    return None if torch.equal(arrived, numbers) else "other numbers arrive"


def _rows(rows: np.ndarray, placed: torch.Tensor) -> Rows:
    """A slice if the rows are contiguous, which then needs no copy of the states."""
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows) and np.all(np.diff(rows) == 1):
        return slice(first, last + 1)
    return placed
