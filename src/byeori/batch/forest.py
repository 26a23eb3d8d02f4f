"""Examples -> Forest: a prefix that examples share is laid out once, and so computed once.

Two examples `a b c d` and `a b x y` become three nodes (tokens depth-first, positions from the root):

    index      0 1 | 2 3 | 4 5
    token      a b | c d | x y        nodes (0, 2, -1), (2, 4, 0), (4, 6, 0)
    position   0 1 | 2 3 | 2 3

Targets `c` and `x` are both predicted from index 1: the last shared token is gathered once per branch. Tokens from an
example's last target on predict nothing and are left out.

T: unique tokens. M: targets. N: examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from byeori.data.tokenize import Example

# Sharing a shorter prefix (a beginning-of-text token, say) saves less than the gather of its keys costs.
MIN_SHARED = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Forest:
    """The packed examples of one micro-batch.

    token_ids: [T] int64, depth-first, so that a node's descendants are contiguous.
    positions: [T] int64, distance from the root.
    nodes: (start, end, parent) per node; parent is an index into nodes, or -1.
    target_index: [M] int64, the row of the hidden states that predicts each target.
    target_ids: [M] int64. target_weight: [M] float32. target_owner: [M] int64, the example of each target.
    reference: [M] float32, a reference model's log-prob of each target, or None.
    rows: [N], the source row of each example. separate_tokens: the number of tokens without sharing.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    nodes: tuple[tuple[int, int, int], ...]
    target_index: np.ndarray
    target_ids: np.ndarray
    target_weight: np.ndarray
    target_owner: np.ndarray
    rows: tuple[int, ...]
    separate_tokens: int
    reference: np.ndarray | None = None

    @property
    def unique_tokens(self) -> int:
        """T."""
        return len(self.token_ids)

    @property
    def target_count(self) -> int:
        """M."""
        return len(self.target_ids)


def needed(example: Example) -> Sequence[int]:
    """Return the tokens that the model must read: everything before the last target."""
    return example.token_ids[: example.targets[-1][1] - 1]


def build(examples: Sequence[Example], *, share: bool = True, min_shared: int = MIN_SHARED) -> Forest:
    """Merge examples into tries.

    share: if False, every example is one node of its own. min_shared: the length from which a shared prefix gets a
    node.
    """
    inputs = [list(needed(example)) for example in examples]
    order = sorted(range(len(inputs)), key=lambda index: inputs[index]) if share else list(range(len(inputs)))
    nodes: list[tuple[int, int, int]] = []
    tokens: list[int] = []
    positions: list[int] = []
    path: list[list[tuple[int, int]]] = [[] for _ in inputs]  # per example: (start in the forest, length) by depth
    stack = [(group, 0, -1) for group in reversed(_split(inputs, order, 0) if share else [[i] for i in order])]
    while stack:
        group, depth, parent = stack.pop()
        end = _branching(inputs, group)
        ended = [index for index in group if len(inputs[index]) <= end]
        branches = _split(inputs, [index for index in group if len(inputs[index]) > end], end)
        if branches and end - depth < min_shared:
            branches[0] = ended + branches[0]  # examples that ended are prefixes of every branch, so of the first
            stack.extend((branch, depth, parent) for branch in reversed(branches))
            continue
        start, node = len(tokens), len(nodes)
        tokens.extend(inputs[group[-1]][depth:end])
        positions.extend(range(depth, end))
        nodes.append((start, len(tokens), parent))
        for index in group:
            path[index].append((start, min(len(inputs[index]), end) - depth))
        stack.extend((branch, end, node) for branch in reversed(branches))
    targets = [_targets(example, path[index], index) for index, example in enumerate(examples)]
    target_index, target_ids, target_owner = (np.concatenate(column) for column in zip(*targets, strict=True))
    return Forest(
        token_ids=np.array(tokens, dtype=np.int64),
        positions=np.array(positions, dtype=np.int64),
        nodes=tuple(nodes),
        target_index=target_index,
        target_ids=target_ids,
        target_weight=np.ones(len(target_ids), dtype=np.float32),
        target_owner=target_owner,
        rows=tuple(example.row for example in examples),
        separate_tokens=sum(map(len, inputs)),
        reference=_reference(examples),
    )


def _branching(inputs: list[list[int]], group: list[int]) -> int:
    """Return the depth at which a sorted group branches; members that end before it are prefixes of the others."""
    while True:
        first, last = inputs[group[0]], inputs[group[-1]]
        shortest = min(len(first), len(last))
        depth = next((at for at in range(shortest) if first[at] != last[at]), shortest)
        longer = [index for index in group if len(inputs[index]) > depth]
        if len(first) > depth or not longer:
            return depth
        group = longer


def _split(inputs: list[list[int]], group: list[int], at: int) -> list[list[int]]:
    """Split a sorted group by the token at depth `at`."""
    return [list(part) for _, part in groupby(group, key=lambda index: inputs[index][at])]


def _targets(example: Example, path: list[tuple[int, int]], owner: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    where = np.concatenate([np.arange(start, start + count) for start, count in path])
    at = np.concatenate([np.arange(start, end) for start, end in example.targets])
    ids = np.asarray(example.token_ids, dtype=np.int64)[at]
    return where[at - 1].astype(np.int64), ids, np.full(len(at), owner, dtype=np.int64)


def _reference(examples: Sequence[Example]) -> np.ndarray | None:
    if examples[0].reference is None:
        return None
    return np.concatenate([np.asarray(example.reference, dtype=np.float32) for example in examples])


def shared_fraction(examples: Sequence[Example]) -> float:
    """Return the share of the examples' tokens that one forest of all of them need not compute again."""
    forest = build(examples)
    return 1 - forest.unique_tokens / max(1, forest.separate_tokens)
