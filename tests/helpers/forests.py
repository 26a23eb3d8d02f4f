"""Forests of examples, drawn and written out, and the GPU calls that they become."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from byeori.batch import forest as forests
from byeori.data.tokenize import Example
from byeori.kernels import cuda_calls


@st.composite
def trees(draw: st.DrawFn) -> list[Example]:
    pool: list[list[int]] = []
    for _ in range(draw(st.integers(1, 5))):
        stem: list[int] = []
        if pool and draw(st.integers(0, 3)):
            parent = draw(st.sampled_from(pool))
            stem = parent[: draw(st.integers(0, len(parent)))]
        pool.append(stem + draw(st.lists(st.integers(3, 8), min_size=max(0, 2 - len(stem)), max_size=9)))
    out = []
    for ids in pool:
        start = draw(st.integers(1, len(ids) - 1))
        out.append(Example(token_ids=ids, targets=((start, draw(st.integers(start + 1, len(ids)))),)))
    return out


def deep() -> forests.Forest:
    """Depth 4; two light branches at the root, one further down, one below a later child; a second root."""
    rows = ["abcdefg", "abcdefh", "abcdxy", "abcdxz", "abpqr", "abpqs", "mnop"]
    examples = [
        Example(token_ids=[ord(c) for c in row] + [0], targets=((len(row), len(row) + 1),), row=at)
        for at, row in enumerate(rows)
    ]
    return forests.build(examples, min_shared=1)


def plan(nodes: list[cuda_calls.Node], *, window: int | None = None, full: str | None = None) -> list[cuda_calls.Call]:
    """The calls of a forest of depth 1 at most."""
    tree = tuple(nodes)
    paths = []
    for start, end, parent in nodes:
        above = () if parent < 0 else (tree[parent][:2],)
        paths.append((start, end, ((above[0][0], end),) if above and above[0][1] == start else (*above, (start, end))))
    return cuda_calls.plan(tree, paths, window=window, device=torch.device("cpu"), full=full)
