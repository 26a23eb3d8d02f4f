"""The GPU path's sequences, merging and gradients, with a written-out softmax in place of the GPU's kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from byeori.batch import forest as forests
from byeori.data.tokenize import Example
from byeori.kernels import cuda_attention, cuda_calls, forest_attention
from byeori.plan.memory_tracker import Tracker
from drawn import drawn
from forests import deep, plan, trees
from written_out import WRITTEN_OUT, pieces

CPU = torch.device("cpu")


def compare(forest: forests.Forest, *, heads: int, groups: int, window: int | None, full: str) -> float:
    """Largest difference to the path of the CPU, over the output and three gradients."""
    torch.manual_seed(forest.unique_tokens)
    tokens = forest.unique_tokens
    states = [torch.randn(1, count, tokens, 8, dtype=torch.float64) for count in (heads, groups, groups)]
    grad = torch.randn(1, tokens, heads, 8, dtype=torch.float64)
    for state in states:
        state.requires_grad_()
    layout = forest_attention.layout(forest)
    expected, _ = forest_attention.forest_attention(
        torch.nn.Module(), *states, None, forest_layout=layout, scaling=0.4, sliding_window=window
    )
    expected_grads = torch.autograd.grad(expected, states, grad)
    calls = cuda_calls.plan(layout.tree, layout.nodes, window=window, device=CPU, full=full)
    rows = [state[0].transpose(0, 1) for state in states]
    found = cuda_attention.attend(*rows, calls, scale=0.4, kernel=WRITTEN_OUT)[None]
    found_grads = torch.autograd.grad(found, states, grad)
    pairs = zip((found, *found_grads), (expected, *expected_grads), strict=True)
    return max(float((left - right).detach().abs().max()) for left, right in pairs)


@drawn(60)
@given(
    examples=trees(),
    min_shared=st.integers(1, 3),
    shape=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    window=st.sampled_from([None, None, 2, 5]),
    full=st.sampled_from(["cascade", "gather"]),
)
def test_random_forests_against_the_cpu_path(
    examples: list[Example], min_shared: int, shape: tuple[int, int], window: int | None, full: str
) -> None:
    forest = forests.build(examples, min_shared=min_shared)
    assert compare(forest, heads=shape[0], groups=shape[1], window=window, full=full) < 1e-12


@pytest.mark.parametrize("full", ["cascade", "gather"])
@pytest.mark.parametrize("window", [None, 1, 3, 5, 100])
def test_a_deep_forest(window: int | None, full: str) -> None:
    forest = deep()
    depths: list[int] = []
    for _, _, parent in forest.nodes:
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    assert max(depths) == 3
    assert compare(forest, heads=4, groups=2, window=window, full=full) < 1e-12


def spans(call: cuda_calls.Call) -> list[tuple[list[int], list[int]]]:
    """The tokens of the queries and keys of each sequence."""
    every = torch.arange(100)
    queries, keys = every[call.queries], every[call.keys]
    return [(queries[q].tolist(), keys[k].tolist()) for q, k in pieces(call)]


def test_a_pair_of_answers_is_two_calls_without_copies() -> None:
    """Prompt 0 1 2, answers 3 4 and 5 6: the first answer runs on from the prompt, the second meets it apart."""
    nodes = [(0, 3, -1), (3, 5, 0), (5, 7, 0)]
    first, second = plan(nodes)
    assert spans(first) == [([0, 1, 2, 3, 4], [0, 1, 2, 3, 4]), ([5, 6], [5, 6])]
    assert spans(second) == [([5, 6], [0, 1, 2])]
    assert first.causal
    assert not second.causal
    assert all(isinstance(rows, slice) for call in (first, second) for rows in (call.queries, call.keys))
    assert (first.max_q, first.max_k, second.max_q, second.max_k) == (5, 5, 2, 3)
    assert first.cu_q.dtype == torch.int32


def test_without_shared_prefixes_it_is_one_call() -> None:
    for full in ("cascade", "gather"):
        (call,) = plan([(0, 3, -1), (3, 4, -1)], full=full)
        assert call.queries == call.keys == slice(0, 4)
        assert call.cu_q.tolist() == call.cu_k.tolist() == [0, 3, 4]


def test_a_window_keeps_the_last_keys_of_the_path() -> None:
    nodes = [(0, 3, -1), (3, 5, 0), (5, 7, 0)]
    (call,) = plan(nodes, window=2)
    assert spans(call) == [([0, 1, 2, 3, 4], [0, 1, 2, 3, 4]), ([5, 6], [2, 5, 6])]
    assert (call.causal, call.window, call.once) == (True, 2, False)


@pytest.mark.parametrize("window", [None, 3])
def test_queries_of_some_tokens_alone(window: int | None) -> None:
    """Rows 1, 2 and 6 of a prompt and two answers: their paths without the tree; the output is that of all rows."""
    torch.manual_seed(0)
    states = [torch.randn(7, count, 8, dtype=torch.float64) for count in (4, 2, 2)]
    tree, rows = ((0, 3, -1), (3, 5, 0), (5, 7, 0)), torch.tensor([1, 2, 6])
    whole = cuda_attention.attend(*states, plan(list(tree), window=window), scale=1.0, kernel=WRITTEN_OUT)
    paths = [(0, 2, ((0, 3),)), (2, 3, ((0, 3), (5, 7)))]
    calls = cuda_calls.plan((), paths, window=window, device=CPU)
    found = cuda_attention.attend(states[0][rows], *states[1:], calls, scale=1.0, kernel=WRITTEN_OUT)
    torch.testing.assert_close(found, whole[rows], rtol=1e-12, atol=1e-12)


def test_a_window_as_long_as_the_longest_path_is_none() -> None:
    nodes = [(0, 3, -1), (3, 5, 0), (5, 7, 0)]
    assert len(plan(nodes, window=5)) == 2
    assert len(plan(nodes, window=4)) == 1


def test_the_kernel_is_called_as_pytorch_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Argument for argument what torch.nn.attention.varlen hands to the same kernel."""
    from torch.nn.attention import varlen

    seen: list[tuple[Any, ...]] = []

    def record(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        seen.append((args[3:], {k: v for k, v in kwargs.items() if v is not None and k != "return_debug_mask"}))
        return tuple(torch.zeros(2, 1, 8) for _ in range(5))

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", record)
    states = torch.zeros(2, 1, 8)
    for nodes, window, sizes in (([(0, 2, -1)], None, (-1, 0)), ([(0, 2, -1)], 1, (0, 0))):
        (call,) = plan(nodes, window=window)
        cuda_attention.FLASH.forward(states, states, states, call, 0.5)
        cu, other, longest = call.cu_q, call.cu_k, call.max_q
        varlen._varlen_attn._init_fn(
            states, states, states, cu, other, longest, longest, sizes == (-1, 0), 0.5, list(sizes)
        )
        ours, theirs = seen[-2:]
        assert ours[1] == theirs[1]
        for left, right in zip(ours[0], theirs[0], strict=False):  # ours names return_debug_mask by position
            assert left is right or left == right


@pytest.mark.parametrize("wrong", ["cpu", "float32", "sizes"])
def test_what_the_kernel_does_not_take(wrong: str) -> None:
    device = "cpu" if wrong == "cpu" else "meta"
    query = torch.zeros(1, 2, 3, 8, dtype=torch.float32 if wrong == "float32" else torch.bfloat16, device=device)
    assert not cuda_attention.supports(query, query, query[..., :4] if wrong == "sizes" else query)


def test_deterministic_algorithms_are_switched_back() -> None:
    with cuda_attention._deterministic():
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory is True


def test_a_plan_counts_what_the_kernel_holds_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of 4,096 tokens, 32 heads of 128 over 8: ceil(132 / 32) = 5 sums; in two rows ceil(132 / 64) = 3."""
    query, key = (torch.empty(4096, heads, 128, dtype=torch.bfloat16, device="meta") for heads in (32, 8))

    def taken(*given: Any) -> int:
        return sum(part.nbytes for part in cuda_attention.backward_scratch(*given))

    copies = 2 * 4096 * 32 * 128 * 2
    assert taken(query, key, 1) == 5 * 4224 * 32 * 128 * 4 + 32 * 4224 * 4 + copies
    assert taken(query, query, 2) == 3 * 4352 * 32 * 128 * 4 + 32 * 4352 * 4
    assert taken(query[:, :, :80], query[:, :, :80], 1) == 5 * 4224 * 32 * 96 * 4 + 32 * 4224 * 4
    monkeypatch.setattr(cuda_attention, "DETERMINISTIC", False)
    assert taken(query, key, 1) == 4224 * 32 * 128 * 4 + 32 * 4224 * 4 + copies


def test_a_rehearsal_holds_it_while_the_kernel_runs() -> None:
    """The peak of a backward pass on the meta device, with and without."""
    layout = forest_attention.layout(forests.build([Example(token_ids=range(512), targets=((1, 512),))]))
    calls = cuda_calls.plan(layout.tree, layout.nodes, window=None, device=torch.device("meta"))
    query, key = (
        torch.empty(512, heads, 64, dtype=torch.bfloat16, device="meta", requires_grad=True) for heads in (8, 4)
    )
    out = cuda_attention.attend(query, key, key, calls, scale=1.0)
    scratch = sum(part.nbytes for part in cuda_attention.backward_scratch(query, key, 1))
    tracker = Tracker()
    with tracker:
        out.sum().backward()
    found = max(peak.total for peak in tracker.peaks.values())
    assert scratch < found < scratch + 8 * query.nbytes
