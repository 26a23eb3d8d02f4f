"""Units that share a prefix go together, stay whole, and keep within the tokens of a micro-batch."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from byeori.batch import forest, packing
from byeori.data.tokenize import Example
from drawn import drawn

Unit = list[list[int]]


def units_of(lengths: list[int]) -> list[Unit]:
    """Units of one example each that share nothing."""
    return [[[index] + [0] * (length - 1)] for index, length in enumerate(lengths)]


@drawn(60)
@given(st.lists(st.integers(1, 500), max_size=30), st.integers(1, 5))
def test_processes_share_a_step_without_loss(lengths: list[int], world: int) -> None:
    units = units_of(lengths)
    shares = [packing.share_of(rank, world, units) for rank in range(world)]
    assert sorted(index for share in shares for index in share) == list(range(len(units)))
    loads = [sum(packing.cost(lengths[index]) for index in share) for share in shares]
    assert max(loads) - min(loads) <= packing.cost(max(lengths, default=0))


def test_the_heaviest_row_goes_alone() -> None:
    units = units_of([10, 1, 2, 7])
    assert packing.share_of(0, 2, units) == [0]
    assert packing.share_of(1, 2, units) == [1, 2, 3]


def test_attention_makes_a_long_row_more_expensive() -> None:
    assert packing.cost(16_384) == 2 * 16_384
    units = units_of([8192, 4096, 4096])  # 12,288 against two of 5,120
    assert packing.share_of(0, 2, units) == [0]


@drawn(80)
@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 60))
def test_micro_batches_hold_all_rows_within_the_tokens(lengths: list[int], tokens: int) -> None:
    groups = packing.micro_batches(units_of(lengths), size=None, tokens=tokens)
    assert [index for group in groups for index in group] == list(range(len(lengths)))
    assert all(len(group) == 1 or sum(lengths[index] for index in group) <= tokens for group in groups)


def test_micro_batches_of_a_size() -> None:
    assert packing.micro_batches(units_of([9] * 5), size=2, tokens=1) == [[0, 1], [2, 3], [4]]
    assert packing.micro_batches([], size=2, tokens=1) == []


HEADERS = [list(range(100, 140)), list(range(200, 240))]


def header_units(count: int) -> list[Unit]:
    """Pairs under two headers of 40 tokens in turn; each pair shares 20 tokens more."""
    return [
        [[*HEADERS[index % 2], *[index] * 20, 300, index], [*HEADERS[index % 2], *[index] * 20, 301, index]]
        for index in range(count)
    ]


def test_rows_with_the_same_header_go_together() -> None:
    groups = packing.micro_batches(header_units(8), size=None, tokens=60, share=True)
    assert all(len({index % 2 for index in group}) == 1 for group in groups)
    assert sorted(index for group in groups for index in group) == list(range(8))
    # a pair adds 24 tokens of its own to its header of 40, which lets a micro-batch grow by 80: 60 + 80 = 5 * 24 + 20
    assert [len(group) for group in groups] == [4, 4]


def test_processes_get_runs_of_rows_that_meet() -> None:
    shares = [packing.share_of(rank, 2, header_units(8), share=True) for rank in range(2)]
    assert [{index % 2 for index in share} for share in shares] == [{0}, {1}]


def test_own_tokens() -> None:
    pair = header_units(1)[0]
    assert packing.own_tokens(pair, share=False) == 124
    assert packing.own_tokens(pair, share=True) == 64
    assert packing.shared([1, 2, 3], [1, 2, 4]) == 0  # shorter than a forest shares


@st.composite
def trees(draw: st.DrawFn) -> list[Unit]:
    """Pairs that branch off a few stems at random depths."""
    stems = [[stem * 50 + at for at in range(40)] for stem in range(2)]
    out = []
    for _ in range(draw(st.integers(1, 7))):
        stem, depth = draw(st.sampled_from(stems)), draw(st.integers(0, 40))
        prompt = stem[:depth] + draw(st.lists(st.integers(0, 3), max_size=30))
        out.append([prompt + draw(st.lists(st.integers(0, 3), min_size=2, max_size=9)) for _ in range(2)])
    return out


@drawn(100)
@given(trees(), st.integers(10, 200))
def test_micro_batches_keep_pairs_and_their_tokens(units: list[Unit], tokens: int) -> None:
    groups = packing.micro_batches(units, size=None, tokens=tokens, share=True)
    assert sorted(index for group in groups for index in group) == list(range(len(units)))
    for group in groups:
        if len(group) == 1:
            continue
        examples = [Example(token_ids=[*ids, 0], targets=((1, len(ids) + 1),)) for i in group for ids in units[i]]
        built = forest.build(examples)
        prefix = min(packing.shared(units[a][-1], units[b][0]) for a in group for b in group if a != b)
        longest = max(len(ids) for index in group for ids in units[index])
        assert built.unique_tokens <= tokens + 3 * max(prefix, longest)
