"""Examples -> Forest: every prefix that examples share is laid out, and so computed, once.

Two examples `a b c d` and `a b x y` become three nodes (tokens depth-first, positions from the root):

    index      0 1 | 2 3 | 4 5
    token      a b | c d | x y        nodes (0, 2, -1), (2, 4, 0), (4, 6, 0)
    position   0 1 | 2 3 | 2 3

Target `c` is predicted from index 1, and so is target `x`: the last shared token is gathered once per branch.
Tokens behind an example's last target predict nothing and are not laid out.

T: unique tokens. M: targets. N: examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from byeori.data.tokenize import Example

# Shorter shared prefixes (a lone beginning-of-text token) save less than the gather of their keys costs.
MIN_SHARED = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Forest:
    """The packed examples of one micro-batch.

    token_ids: [T] int64, depth-first, so that a node's descendants are contiguous.
    positions: [T] int64, distance from the root.
    nodes: (start, end, parent) per node; parent is an index into nodes, or -1.
    target_index: [M] int64, the row of the hidden states that predicts each target.
    target_ids: [M] int64. target_weight: [M] float32. target_owner: [M] int64, the example of each target.
    rows: the source row of each example [N]. separate_tokens: tokens before sharing.
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

    @property
    def unique_tokens(self) -> int:
        """T."""
        return len(self.token_ids)

    @property
    def target_count(self) -> int:
        """M."""
        return len(self.target_ids)


def needed(example: Example) -> Sequence[int]:
    """The tokens that the model must read: everything before the last target."""
    return example.token_ids[: example.targets[-1][1] - 1]


def build(examples: Sequence[Example], *, share: bool = True, min_shared: int = MIN_SHARED) -> Forest:
    """Merge examples into tries.

    share: False lays every example out alone (one node each).
    min_shared: shortest run of tokens worth a node of its own.
    """
    inputs = [list(needed(example)) for example in examples]
    order = sorted(range(len(inputs)), key=lambda index: inputs[index]) if share else list(range(len(inputs)))
    nodes: list[tuple[int, int, int]] = []
    tokens: list[int] = []
    positions: list[int] = []
    path: list[list[tuple[int, int]]] = [
        [] for _ in inputs
    ]  # per example: (start in the forest, tokens) by depth
    stack = [
        (group, 0, -1) for group in reversed(_groups(inputs, order, 0) if share else [[i] for i in order])
    ]
    while stack:
        group, depth, parent = stack.pop()
        common = _common(inputs, group)
        if len(group) > 1 and common - depth < min_shared and len(inputs[group[0]]) > common:
            stack.extend((part, depth, parent) for part in reversed(_groups(inputs, group, common)))
            continue
        start, node = len(tokens), parent
        if common > depth:
            tokens.extend(inputs[group[0]][depth:common])
            positions.extend(range(depth, common))
            node = len(nodes)
            nodes.append((start, len(tokens), parent))
            for index in group:
                path[index].append((start, common - depth))
        rest = [index for index in group if len(inputs[index]) > common]
        stack.extend((part, common, node) for part in reversed(_groups(inputs, rest, common)))
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
    )


def _common(inputs: list[list[int]], group: list[int]) -> int:
    """Length of the prefix that a sorted group shares: that of its first and last member."""
    first, last = inputs[group[0]], inputs[group[-1]]
    for depth, (a, b) in enumerate(zip(first, last, strict=False)):
        if a != b:
            return depth
    return min(len(first), len(last))


def _groups(inputs: list[list[int]], group: list[int], at: int) -> list[list[int]]:
    """A sorted group, split by the token at depth `at`; members that end before it stand alone."""
    out: list[list[int]] = []
    last: int | None = None
    for index in group:
        token = inputs[index][at] if len(inputs[index]) > at else None
        if token is None or token != last:
            out.append([])
        out[-1].append(index)
        last = token
    return out


def _targets(
    example: Example, path: list[tuple[int, int]], owner: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    where = np.concatenate([np.arange(start, start + count) for start, count in path])
    at = np.concatenate([np.arange(start, end) for start, end in example.targets])
    ids = np.asarray(example.token_ids, dtype=np.int64)[at]
    return where[at - 1].astype(np.int64), ids, np.full(len(at), owner, dtype=np.int64)


def shared_fraction(examples: Sequence[Example]) -> float:
    """Share of the examples' tokens that need not be computed again when all of them meet in one forest."""
    forest = build(examples)
    return 1 - forest.unique_tokens / max(1, forest.separate_tokens)
