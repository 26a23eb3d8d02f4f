"""Attention on a GPU against float64: every head size, grouped heads, windows, both ways; and its kernel's contract.

bf16 is held to what computing every node apart in bf16 gives: the error of the forest's way is no larger by more than
the chance of two different orders of rounding.
"""

from __future__ import annotations

import pytest
import torch

from byeori.batch import forest as forests
from byeori.data.tokenize import Example
from byeori.kernels import cuda_attention, cuda_calls, forest_attention
from forests import deep, plan
from written_out import WRITTEN_OUT

Parts = list[torch.Tensor]
GPU = torch.device("cuda")
CHANCE = 1.25


def long_forest() -> forests.Forest:
    """Prompts of 300 with answers of 40 to 90, one of them branching again, a row alone, tokens in the hundreds."""
    generator = torch.Generator().manual_seed(0)

    def words(count: int) -> list[int]:
        return torch.randint(3, 900, (count,), generator=generator).tolist()

    rows = []
    for _ in range(2):
        prompt, stem = words(300), words(40)
        rows += [prompt + words(90), prompt + words(61), prompt + stem + words(33), prompt + stem + words(17)]
    rows.append(words(130))
    return forests.build([Example(token_ids=row, targets=((len(row) - 5, len(row)),)) for row in rows])


def states(forest: forests.Forest, heads: int, groups: int, size: int) -> Parts:
    """Query, key, value and the output's gradient, in bf16."""
    generator = torch.Generator(GPU).manual_seed(size)
    shapes = [(1, count, forest.unique_tokens, size) for count in (heads, groups, groups)]
    shapes.append((1, forest.unique_tokens, heads, size))
    return [torch.randn(shape, device=GPU, generator=generator).bfloat16() for shape in shapes]


def run(
    forest: forests.Forest, parts: list[torch.Tensor], dtype: torch.dtype, window: int | None
) -> list[torch.Tensor]:
    """Output and gradients of query, key and value, in float64."""
    query, key, value = (part.to(dtype).requires_grad_() for part in parts[:3])
    layout = forest_attention.layout(forest)
    out, _ = forest_attention.forest_attention(
        torch.nn.Module(), query, key, value, None, forest_layout=layout, scaling=None, sliding_window=window
    )
    return [part.double() for part in (out, *torch.autograd.grad(out, (query, key, value), parts[3].to(dtype)))]


def errors(found: Parts, exact: Parts) -> list[float]:
    """Relative to the exact one, or to a hundredth of the largest: a query that sees one key has no gradient."""
    norms = [float(part.detach().norm()) for part in exact]
    least = max(norms) / 100
    apart = [float((left - right).detach().norm()) for left, right in zip(found, exact, strict=True)]
    return [error / max(norm, least) for error, norm in zip(apart, norms, strict=True)]


@pytest.mark.parametrize("full", ["cascade", "gather"])
@pytest.mark.parametrize("window", [None, 1, 50, 310])
@pytest.mark.parametrize(("heads", "groups"), [(8, 2), (4, 4), (6, 1)])
@pytest.mark.parametrize("size", [64, 96, 128, 256])
def test_bf16_is_no_further_from_float64_than_nodes_apart(
    size: int, heads: int, groups: int, window: int | None, full: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forest = long_forest()
    parts = states(forest, heads, groups, size)
    exact = run(forest, parts, torch.float64, window)
    monkeypatch.setattr(cuda_calls, "FULL", full)
    assert cuda_attention.supports(*parts[:3])
    together = errors(run(forest, parts, torch.bfloat16, window), exact)
    monkeypatch.setattr(cuda_attention, "supports", lambda *_: False)
    apart = errors(run(forest, parts, torch.bfloat16, window), exact)
    for ours, theirs in zip(together, apart, strict=True):
        assert ours <= CHANCE * theirs + 1e-5, (together, apart)
        assert ours < 1e-2


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("size", [64, 128])
def test_float32(size: int, window: int | None) -> None:
    forest = long_forest()
    parts = states(forest, 8, 2, size)
    exact = run(forest, parts, torch.float64, window)
    assert max(errors(run(forest, parts, torch.float32, window), exact)) < 1e-5


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("full", ["cascade", "gather"])
def test_short_nodes(window: int | None, full: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes of one and two tokens, depth 4: where the kernel has shortcuts of its own."""
    monkeypatch.setattr(cuda_calls, "FULL", full)
    forest = deep()
    parts = states(forest, 8, 2, 64)
    exact = run(forest, parts, torch.float64, window)
    assert max(errors(run(forest, parts, torch.bfloat16, window), exact)) < 1e-2


@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 2), (False, None)])
def test_the_kernel_is_aligned_to_the_last_key(causal: bool, window: int | None) -> None:
    """Fewer queries than keys, a sequence of one query, keys that no query of theirs sees."""
    call = cuda_calls.Call(
        queries=slice(0, 5),
        keys=slice(0, 12),
        once=True,
        causal=causal,
        window=window,
        cu_q=torch.tensor([0, 1, 5], dtype=torch.int32, device=GPU),
        cu_k=torch.tensor([0, 4, 12], dtype=torch.int32, device=GPU),
        max_q=4,
        max_k=8,
    )
    torch.manual_seed(0)
    query, key, value = (torch.randn(n, heads, 64, device=GPU) for n, heads in ((5, 4), (12, 2), (12, 2)))
    exact = WRITTEN_OUT.forward(query.double(), key.double(), value.double(), call, 0.2)
    half = [part.bfloat16() for part in (query, key, value)]
    out, lse = cuda_attention.FLASH.forward(*half, call, 0.2)
    assert lse.shape == (4, 5)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), exact[1], rtol=0, atol=2e-2)
    torch.testing.assert_close(out.double(), exact[0], rtol=0, atol=3e-2)
    grad = torch.randn(5, 4, 64, device=GPU)
    expected = WRITTEN_OUT.backward(grad.double(), query.double(), key.double(), value.double(), *exact, call, 0.2)
    found = cuda_attention.FLASH.backward(grad.bfloat16(), *half, out, lse, call, 0.2)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left.double(), right, rtol=0, atol=5e-2)


def test_the_same_bits_twice() -> None:
    forest = long_forest()
    parts = states(forest, 8, 2, 128)
    for window in (None, 50):
        one, two = (run(forest, parts, torch.bfloat16, window) for _ in range(2))
        assert all(torch.equal(left, right) for left, right in zip(one, two, strict=True))


def test_queries_of_some_tokens_alone() -> None:
    tree, rows = [(0, 30, -1), (30, 50, 0), (50, 70, 0)], torch.tensor([28, 29, 69], device=GPU)
    torch.manual_seed(0)
    query, key, value = (torch.randn(70, heads, 64, device=GPU, dtype=torch.bfloat16) for heads in (4, 2, 2))
    whole = cuda_attention.attend(query, key, value, [_on_gpu(call) for call in plan(tree)], scale=0.1)
    paths = [(0, 2, ((0, 30),)), (2, 3, ((0, 30), (50, 70)))]
    calls = cuda_calls.plan((), paths, window=None, device=GPU)
    found = cuda_attention.attend(query[rows], key, value, calls, scale=0.1)
    torch.testing.assert_close(found.float(), whole[rows].float(), rtol=0, atol=2e-2)


def _on_gpu(call: cuda_calls.Call) -> cuda_calls.Call:
    from dataclasses import replace

    return replace(call, cu_q=call.cu_q.to(GPU), cu_k=call.cu_k.to(GPU))
