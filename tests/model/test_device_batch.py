"""A forest on its device: every number, and no waiting for the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from byeori.batch import forest as forests
from byeori.data.tokenize import Example
from byeori.kernels import forest_attention
from byeori.model import forward
from byeori.model.device_batch import place, windows
from zoo import WORDS, tiny, tree

CPU = torch.device("cpu")


class Reads(TorchDispatchMode):
    """Counts what makes a host wait for its GPU: reading a number, and shapes that depend on numbers."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "_unique2", "equal", "repeat_interleave")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name in self.NAMES:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "mistral"])
def test_nothing_is_read_between_forward_and_backward(kind: str) -> None:
    model, _ = tiny(kind)
    forward.use_forest_attention(model)
    batch = place(forests.build(tree(), min_shared=1), CPU)
    with Reads() as reads:
        (-forward.forest_logprobs(model, batch)).sum().backward()
    assert reads.found == []
    with Reads() as reads:
        torch.ones(3).sum().item()
    assert reads.found == ["_local_scalar_dense"]


def test_a_placed_forest_holds_the_forest() -> None:
    forest = forests.build(tree(), min_shared=1)
    batch = place(forest, CPU)
    for found, expected in (
        (batch.ids[0], forest.token_ids),
        (batch.positions[0], forest.positions),
        (batch.index, forest.target_index),
        (batch.target_ids, forest.target_ids),
        (batch.targets.weights, forest.target_weight),
        (batch.targets.owner, forest.target_owner),
    ):
        assert found.tolist() == expected.tolist()
        assert found.is_contiguous()
    assert batch.ids.dtype == torch.int64
    assert batch.targets.weights.dtype == torch.float32
    assert (batch.targets.reference, batch.targets.examples) == (None, len(forest.rows))
    layout = forest_attention.layout(forest)
    assert (batch.layout.nodes, batch.layout.tree) == (layout.nodes, forest.nodes)
    assert batch.layout.rows.tolist() == batch.layout.row_numbers == sorted(set(forest.target_index.tolist()))
    assert batch.layout.rows[batch.index_of_rows].tolist() == forest.target_index.tolist()


@pytest.mark.parametrize(
    ("tokens", "filled"), [(30, 30), (512, 512), (515, 528), (2000, 2048), (2035, 2048), (1000, 1024)]
)
def test_idle_tokens_fill_a_forest_where_they_are_few(tokens: int, filled: int) -> None:
    """They are a tree of their own, so nobody sees them; the last layer's rows are filled up with idle ones."""
    forest = forests.build([Example(token_ids=[7] * (tokens + 1), targets=((tokens - 2, tokens + 1),))])
    batch = place(forest, CPU)
    assert batch.ids.shape == batch.positions.shape == (1, filled)
    assert batch.positions[0, tokens:].tolist() == list(range(filled - tokens))
    assert batch.forest is forest
    idle = () if filled == tokens else ((tokens, filled, -1),)
    assert batch.layout.tree == (*forest.nodes, *idle)
    assert batch.layout.rows[batch.index_of_rows].tolist() == forest.target_index.tolist() == batch.index.tolist()
    assert batch.layout.row_numbers == sorted(set(batch.layout.row_numbers))
    assert len(batch.layout.row_numbers) == (16 if tokens >= 512 else 3)


def test_idle_tokens_change_no_log_prob() -> None:
    """Against the model's own pass over each row alone."""
    model, _ = tiny("gemma3")
    forward.use_forest_attention(model)
    rng = np.random.default_rng(0)
    rows = [[int(token) for token in rng.integers(3, WORDS, size)] for size in (263, 260)]
    examples = [Example(token_ids=row, targets=((len(row) - 5, len(row)),)) for row in rows]
    forest = forests.build(examples)
    assert place(forest, CPU).ids.shape[1] > forest.unique_tokens
    found = forward.forest_logprobs(model, forest)
    forward.use_plain_attention(model)
    alone = [forward.plain_logprobs(model, row, list(range(len(row) - 5, len(row)))) for row in rows]
    torch.testing.assert_close(found, torch.cat(alone).to(found), rtol=1e-6, atol=1e-6)


def test_reference_log_probs_travel_along() -> None:
    example = Example(token_ids=[3, 4, 5], targets=((1, 3),), reference=(-0.5, -2.0))
    assert place(forests.build([example]), CPU).targets.reference.tolist() == [-0.5, -2.0]


@pytest.mark.parametrize(
    ("kind", "expected"), [("llama", {None}), ("gemma3", {None, 4}), ("mistral", {4}), ("qwen3", {None})]
)
def test_windows_are_known_before_the_first_layer(kind: str, expected: set[int | None]) -> None:
    model, _ = tiny(kind)
    assert windows(model.config) == expected
