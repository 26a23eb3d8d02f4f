"""Layers that carry a state on a forest equal one sequence at a time: loss and every adapter gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import zoo
from byeori.batch import forest as forests
from byeori.data.tokenize import Example
from byeori.errors import ModelError
from byeori.kernels import forest_attention, patch, state_layers
from byeori.model import forward, wrap
from drawn import drawn
from forests import trees

PATHS = {"jamba", "mamba"}  # Mamba 1


def differences(model: Any, plain: Any, examples: list[Example], min_shared: int = 1) -> tuple[float, float]:
    """Relative differences of the loss and of the worst gradient."""
    assert forward.use_forest_attention(model)
    with zoo.Wide():
        expected = zoo.plain_loss(plain, examples)
        gradients = zoo.gradients(plain, expected)
        loss = -forward.forest_logprobs(model, forests.build(examples, min_shared=min_shared)).sum()
        worst = zoo.worst(zoo.gradients(model, loss), gradients)
    return abs(loss.item() - expected.item()) / abs(expected.item()), worst


@pytest.mark.parametrize("min_shared", [1, 4])
@pytest.mark.parametrize("kind", zoo.HYBRIDS)
def test_forest_equals_single_sequences(kind: str, min_shared: int) -> None:
    loss, gradient = differences(*zoo.tiny(kind), zoo.tree(), min_shared)
    assert loss < 1e-10
    assert gradient < 1e-10


@pytest.mark.parametrize("kind", zoo.HYBRIDS)
def test_float32(kind: str) -> None:
    loss, gradient = differences(*zoo.tiny(kind, torch.float32), zoo.tree())
    assert loss < 1e-5
    assert gradient < 1e-4


@pytest.mark.parametrize("kind", ["qwen3_5", "lfm2", "mamba2"])
@drawn(10)
@given(examples=trees(), min_shared=st.integers(1, 4))
def test_random_trees(kind: str, examples: list[Example], min_shared: int) -> None:
    loss, gradient = differences(*zoo.tiny(kind), examples, min_shared)
    assert loss < 1e-10
    assert gradient < 1e-10


@pytest.mark.parametrize("kind", zoo.HYBRIDS)
def test_scans_that_cannot_start_with_a_state_run_over_paths(kind: str) -> None:
    model, _ = zoo.tiny(kind)
    forward.use_forest_attention(model)
    caches = {module.byeori_state for module in model.modules() if hasattr(module, "byeori_state")}
    assert (caches == {None}) is (kind in PATHS)


FAMILIES = ["qwen3_5", "falcon_h1", "lfm2", "granitemoehybrid", "nemotron_h"]


@pytest.mark.parametrize("kind", FAMILIES)
def test_with_recomputation(kind: str) -> None:
    model, plain = zoo.tiny(kind, torch.float32)
    wrap.recompute_layers(model.get_base_model(), "full")
    loss, gradient = differences(model.train(), plain, zoo.tree())
    assert loss < 1e-5
    assert gradient < 1e-4


@pytest.mark.parametrize("kind", FAMILIES)
def test_with_fused_layers(kind: str) -> None:
    model, plain = zoo.tiny(kind)
    patch.fuse(model.get_base_model(), list(patch.PARTS))
    loss, gradient = differences(model, plain, zoo.tree())
    assert loss < 1e-10
    assert gradient < 1e-10


def test_the_schedule_of_a_forest() -> None:
    """A root with two leaves and a node of one token, which has two leaves of its own."""
    nodes = ((0, 4, -1), (4, 7, 0), (7, 8, 0), (8, 10, 2), (10, 13, 2))
    found = state_layers.schedule(nodes, torch.device("cpu"), paths=False)
    rows = [(call.index.tolist(), [run.parent for run in call.runs], call.kept) for call in found.calls]
    assert rows == [
        ([[0, 1, 2, 3]], [-1], True),
        ([[7, 10, 11, 12], [4, 5, 6, 6], [7, 8, 9, 9]], [0, 0, 0], False),
    ]
    assert found.place.tolist() == [0, 1, 2, 3, 8, 9, 10, 4, 11, 12, 5, 6, 7]
    whole = state_layers.schedule(nodes, torch.device("cpu"), paths=True)
    assert [len(call.runs) for call in whole.calls] == [3]
    assert sorted(whole.place.tolist()) == list(range(13))


def test_what_cannot_run_on_forests_runs_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = zoo.tiny("qwen3_5")
    with zoo.Wide():
        assert forward.choose(model, zoo.tree()[:4]) is None
        monkeypatch.setattr(state_layers, "_stack", lambda states, runs: {})  # no node knows its parent's state
        assert forward.choose(model, zoo.tree()[:4]) is None  # whole paths need no states
        assert {m.byeori_state for m in model.modules() if hasattr(m, "byeori_state")} == {None}
        monkeypatch.setattr(forest_attention, "backend", lambda call: forest_attention.BACKENDS[9])
        reason = forward.choose(model, zoo.tree()[:4])
        assert reason == "its code does not run on forests"
        monkeypatch.setattr(forward, "plain_logprobs", lambda model, ids, at: torch.zeros(len(at)))
        with pytest.raises(ModelError, match="so it cannot train this model"):
            forward.choose(model, zoo.tree()[:4])
