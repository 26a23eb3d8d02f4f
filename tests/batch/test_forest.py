"""The forest reconstructs every example, and holds every shared token once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from byeori.batch import forest as forests
from byeori.batch.forest import Forest
from byeori.data.tokenize import Example
from drawn import drawn


def spans(trained: list[bool]) -> tuple[tuple[int, int], ...]:
    at = [index for index, flag in enumerate(trained) if flag and index]
    return tuple((index, index + 1) for index in at)


@st.composite
def example_sets(draw: st.DrawFn) -> list[Example]:
    """Sequences grown from one another: shared prefixes at any depth, duplicates, prefixes of others, strangers."""
    pool: list[list[int]] = []
    for _ in range(draw(st.integers(1, 7))):
        stem: list[int] = []
        if pool and draw(st.integers(0, 4)):
            parent = draw(st.sampled_from(pool))
            stem = parent[: draw(st.integers(0, len(parent)))]
        tail = draw(st.lists(st.integers(0, 2), min_size=max(0, 2 - len(stem)), max_size=8))
        pool.append(stem + tail)
    out = []
    for row, ids in enumerate(pool):
        trained = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        trained[draw(st.integers(1, len(ids) - 1))] = True
        out.append(Example(token_ids=ids, targets=spans(trained), row=row * 3))
    return out


def path_rows(forest: Forest, owner_row: int) -> list[int]:
    """The rows of the hidden states from the root down to a row, found through the parents alone."""
    node = next(i for i, (start, end, _) in enumerate(forest.nodes) if start <= owner_row < end)
    rows = list(range(forest.nodes[node][0], owner_row + 1))
    while (node := forest.nodes[node][2]) >= 0:
        rows = list(range(*forest.nodes[node][:2])) + rows
    return rows


def check_reconstruction(forest: Forest, examples: list[Example]) -> None:
    expected = [
        (owner, example.token_ids[at], list(example.token_ids[:at]))
        for owner, example in enumerate(examples)
        for start, end in example.targets
        for at in range(start, end)
    ]
    found = []
    for index, target, owner in zip(forest.target_index, forest.target_ids, forest.target_owner, strict=True):
        rows = path_rows(forest, int(index))
        assert forest.positions[rows].tolist() == list(range(len(rows)))
        found.append((int(owner), int(target), forest.token_ids[rows].tolist()))
    assert found == expected
    assert forest.target_weight.tolist() == [1.0] * len(expected)


def check_shape(forest: Forest) -> None:
    assert [start for start, _, _ in forest.nodes] == [0, *(end for _, end, _ in forest.nodes[:-1])]
    assert all(start < end for start, end, _ in forest.nodes)
    assert forest.nodes[-1][1] == forest.unique_tokens == len(forest.positions)
    for node, (_, _, parent) in enumerate(forest.nodes):
        assert parent < node
        family = {node}
        for other, (_, _, above) in enumerate(forest.nodes):
            if above in family:
                family.add(other)
        assert sorted(family) == list(range(node, node + len(family)))  # descendants are contiguous


@drawn(150)
@given(example_sets(), st.sampled_from([1, 2, 3, 16]))
def test_every_path_is_its_example(examples: list[Example], min_shared: int) -> None:
    forest = forests.build(examples, min_shared=min_shared)
    check_reconstruction(forest, examples)
    check_shape(forest)
    assert forest.rows == tuple(example.row for example in examples)
    assert forest.separate_tokens == sum(len(forests.needed(example)) for example in examples)


@drawn(100)
@given(example_sets())
def test_shared_tokens_are_held_once(examples: list[Example]) -> None:
    prefixes = {tuple(forests.needed(e)[:end]) for e in examples for end in range(1, len(forests.needed(e)) + 1)}
    assert forests.build(examples, min_shared=1).unique_tokens == len(prefixes)


@drawn(100)
@given(example_sets(), st.sampled_from([2, 3, 5]))
def test_no_shared_node_is_shorter_than_min_shared(examples: list[Example], min_shared: int) -> None:
    forest = forests.build(examples, min_shared=min_shared)
    parents = {parent for _, _, parent in forest.nodes} - {-1}
    assert all(forest.nodes[node][1] - forest.nodes[node][0] >= min_shared for node in parents)


@drawn(60)
@given(example_sets())
def test_share_off_lays_each_example_out_alone(examples: list[Example]) -> None:
    forest = forests.build(examples, share=False)
    check_reconstruction(forest, examples)
    assert forest.unique_tokens == forest.separate_tokens
    assert [parent for _, _, parent in forest.nodes] == [-1] * len(examples)
    tokens = [token for example in examples for token in forests.needed(example)]
    assert forest.token_ids.tolist() == tokens


@drawn(40)
@given(example_sets())
def test_building_twice_is_the_same(examples: list[Example]) -> None:
    one, two = forests.build(examples, min_shared=2), forests.build(examples, min_shared=2)
    assert one.nodes == two.nodes
    for name in ("token_ids", "positions", "target_index", "target_ids", "target_owner"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def simple(ids: list[int], first_target: int) -> Example:
    return Example(token_ids=ids, targets=((first_target, len(ids)),))


def test_the_docstring_example() -> None:
    forest = forests.build([simple([1, 2, 3, 4, 9], 2), simple([1, 2, 7, 8, 9], 2)], min_shared=1)
    assert forest.token_ids.tolist() == [1, 2, 3, 4, 7, 8]
    assert forest.positions.tolist() == [0, 1, 2, 3, 2, 3]
    assert forest.nodes == ((0, 2, -1), (2, 4, 0), (4, 6, 0))
    assert forest.target_index.tolist() == [1, 2, 3, 1, 4, 5]  # both branches gather row 1
    assert forest.target_ids.tolist() == [3, 4, 9, 7, 8, 9]
    assert forest.target_owner.tolist() == [0, 0, 0, 1, 1, 1]


def test_depth_three() -> None:
    rows = [[1, 2, 3, 4, 0], [1, 2, 3, 5, 0], [1, 2, 6, 0], [1, 7, 0], [8, 0]]
    forest = forests.build([simple(ids, 1) for ids in rows], min_shared=1)
    assert forest.nodes == ((0, 1, -1), (1, 2, 0), (2, 3, 1), (3, 4, 2), (4, 5, 2), (5, 6, 1), (6, 7, 0), (7, 8, -1))
    assert forest.token_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_prefix_of_another_costs_nothing() -> None:
    forest = forests.build([simple([1, 2, 3, 4, 5, 0], 1), simple([1, 2, 0], 1), simple([1, 2, 0], 2)])
    assert forest.token_ids.tolist() == [1, 2, 3, 4, 5]
    assert forest.nodes == ((0, 5, -1),)


def test_tokens_behind_the_last_target_are_left_out() -> None:
    forest = forests.build([Example(token_ids=[1, 2, 3, 4, 5], targets=((1, 3),))])
    assert forest.token_ids.tolist() == [1, 2]
    assert forest.separate_tokens == 2


def test_a_shared_target_counts_once_per_example() -> None:
    forest = forests.build([simple([1, 2, 3], 1)] * 3, min_shared=1)
    assert forest.unique_tokens == 2
    assert forest.target_index.tolist() == [0, 1] * 3
    assert forest.target_owner.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(("min_shared", "tokens"), [(3, 5), (4, 8)])
def test_min_shared_is_inclusive(min_shared: int, tokens: int) -> None:
    rows = [simple([1, 2, 3, 4, 0], 1), simple([1, 2, 3, 5, 0], 1)]
    assert forests.build(rows, min_shared=min_shared).unique_tokens == tokens


def test_shared_fraction_by_hand() -> None:
    head = list(range(20))
    assert forests.shared_fraction([simple([*head, 21, 0], 20), simple([*head, 22, 0], 20)]) == pytest.approx(20 / 42)
