"""Attention by tiles, in each way that kernels.c can multiply them, against a softmax written out in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from byeori.kernels import cpu_attention, cpu_tiles, forest_attention, native
from ways import WAYS, library

Nodes = cpu_attention.Nodes

CHAIN: Nodes = ((0, 133, ((0, 133),)),)
# Two nodes in one tile of 32 tokens, a path that leaves a tile and comes back to it, a node of one token.
TREE: Nodes = (
    (0, 40, ((0, 40),)),
    (40, 57, ((0, 57),)),
    (57, 100, ((0, 40), (57, 100))),
    (100, 132, ((0, 40), (57, 70), (100, 132))),
    (132, 133, ((0, 3), (5, 9), (132, 133))),
)
FEW: Nodes = ((0, 3, ((0, 40), (57, 60))), (3, 4, ((0, 40), (57, 100))))


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    found = library(request.param)
    monkeypatch.setattr(native, "_library", lambda: found)
    return str(request.param)


def written_out(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, nodes: Nodes, window: int | None, scale: float
) -> torch.Tensor:
    each, found = query.shape[1] // key.shape[1], []
    for start, end, path in nodes:
        keys, values = (
            torch.cat([states[run[0] : run[1]] for run in path]).repeat_interleave(each, 1) for states in (key, value)
        )
        n, m = end - start, len(keys)
        back = torch.arange(m - n, m)[:, None] - torch.arange(m)[None]
        seen = (back >= 0) & (back < (window or m))
        scores = torch.einsum("nhd,mhd->hnm", query[start:end], keys).mul(scale).masked_fill(~seen, -torch.inf)
        found.append(torch.einsum("hnm,mhd->nhd", scores.softmax(-1), values))
    return torch.cat(found)


def results(attend: Any, states: list[torch.Tensor], grad: torch.Tensor, *how: Any) -> list[torch.Tensor]:
    """The output and the gradients of query, key and value."""
    states = [tensor.clone().requires_grad_() for tensor in states]
    out = attend(*states, *how)
    out.backward(grad)
    return [out.detach(), *(tensor.grad for tensor in states if tensor.grad is not None)]


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def random_states(n: int, tokens: int, sizes: tuple[int, int, int, int]) -> list[torch.Tensor]:
    """query, key, value and a gradient of the output; sizes: H, G, D, E."""
    heads, groups, d, e = sizes
    torch.manual_seed(0)
    shapes = ((n, heads, d), (tokens, groups, d), (tokens, groups, e), (n, heads, e))
    return [torch.randn(*shape, dtype=torch.bfloat16) for shape in shapes]


@pytest.mark.parametrize("window", [None, 20, 1])
@pytest.mark.parametrize(
    "sizes", [(4, 1, 256, 256), (8, 4, 64, 64), (3, 3, 80, 48), (2, 1, 8, 8), (5, 1, 128, 128)], ids=str
)
@pytest.mark.parametrize("nodes", [CHAIN, TREE, FEW], ids=["chain", "tree", "few"])
def test_tiles_against_a_written_out_softmax(
    way: str, nodes: Nodes, sizes: tuple[int, int, int, int], window: int | None
) -> None:
    query, key, value, grad = random_states(nodes[-1][1], 133, sizes)
    states, scale = [query, key, value], sizes[2] ** -0.5
    found = results(cpu_tiles.attend, states, grad, nodes, window, scale)
    expected = results(written_out, [t.double() for t in states], grad.double(), nodes, window, scale)
    for part, wanted in zip(found, expected, strict=True):
        assert part.dtype == torch.bfloat16
        if wanted.norm() < 1e-9:  # one key has no choice: its gradient is zero
            assert part.abs().max() < 1e-3
        else:
            assert distance(part, wanted) < 2**-8


def test_tiles_are_closer_than_blocks(way: str) -> None:
    """Scores stay float32 here, where blocks round them."""
    query, key, value, grad = random_states(133, 133, (4, 1, 64, 64))
    states = [query, key, value]
    expected = results(written_out, [t.double() for t in states], grad.double(), TREE, None, 0.125)

    def blocks(*given: Any) -> torch.Tensor:
        turned = (states.transpose(0, 1)[None] for states in given[:3])
        return cpu_attention.attend(*turned, *given[3:])[0]

    near = results(cpu_tiles.attend, states, grad, TREE, None, 0.125)
    far = results(blocks, states, grad, TREE, None, 0.125)
    for one, other, wanted in zip(near, far, expected, strict=True):
        assert distance(one, wanted) <= distance(other, wanted) * 1.01


def test_tiles_do_not_depend_on_threads(way: str) -> None:
    query, key, value, grad = random_states(133, 133, (4, 2, 64, 64))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(results(cpu_tiles.attend, [query, key, value], grad, TREE, 50, 0.125))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))


def test_other_branches_change_nothing(way: str) -> None:
    query, key, value, grad = random_states(133, 133, (4, 1, 64, 64))
    before = results(cpu_tiles.attend, [query, key, value], grad, TREE, None, 0.125)
    key[100:], value[100:] = 1000.0, -1000.0
    after = results(cpu_tiles.attend, [query, key, value], grad, TREE, None, 0.125)
    for one, other in zip(before[:2], after[:2], strict=True):
        assert torch.equal(one[:100], other[:100])
        assert not torch.equal(one[100:132], other[100:132])


def test_attention_goes_through_tiles_where_there_are_units(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value, _ = random_states(133, 133, (4, 2, 64, 64))
    turned = [states.transpose(0, 1)[None] for states in (query, key, value)]
    layout = forest_attention.Layout(nodes=TREE, rows=torch.tensor([0]), row_numbers=[0])
    ours = cpu_tiles.attend(query, key, value, TREE, None, 0.125)
    for units in (1, 0):
        monkeypatch.setattr(native, "tiles", lambda units=units: units)
        found = forest_attention.forest_attention(torch.nn.Module(), *turned, None, forest_layout=layout)[0][0]
        assert torch.equal(found, ours) is bool(units)
        assert distance(found, ours.double()) < 2e-2


def test_no_memory_is_said(way: str) -> None:
    """The kernel asks for what one call needs before it begins."""
    query, key, value, _ = random_states(4, 133, (1, 1, 64, 64))
    out, sums = torch.empty_like(query), torch.empty(4, 1, 2)
    nodes = torch.tensor([0, 4, 1, 0, 4])
    with pytest.raises(MemoryError, match="attend cannot allocate"):
        native.call("attend", query, key, value, out, sums, nodes, 1, 2**45, 1, 1, 64, 64, 2**45, 0.125)


def test_a_whole_number_is_a_scale_too(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configurations write 1 for 1.0, and C would read another register."""
    monkeypatch.setattr(native, "tiles", lambda: 1)
    turned = [states.transpose(0, 1)[None] for states in random_states(133, 133, (4, 2, 64, 64))[:3]]
    layout = forest_attention.Layout(nodes=TREE, rows=torch.tensor([0]), row_numbers=[0])
    one, other = (
        forest_attention.forest_attention(torch.nn.Module(), *turned, None, forest_layout=layout, scaling=scaling)[0]
        for scaling in (1, 1.0)
    )
    assert torch.equal(one, other)
