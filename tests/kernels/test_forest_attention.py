"""One forest equals one sequence at a time: loss and every adapter gradient."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

import zoo
from byeori.batch import forest as forests
from byeori.data.tokenize import Example
from byeori.errors import ModelError
from byeori.kernels import forest_attention, state_layers
from byeori.model import forward, load
from byeori.plan.memory_tracker import Tracker
from drawn import drawn
from forests import trees

pair = functools.cache(zoo.tiny)


def forest_loss(model: Any, examples: list[Example], *, share: bool = True, min_shared: int = 1) -> torch.Tensor:
    forest = forests.build(examples, share=share, min_shared=min_shared)
    logprobs = forward.forest_logprobs(model, forest)
    return -(logprobs * torch.from_numpy(forest.target_weight).to(logprobs)).sum()


def plain_result(kind: str, dtype: torch.dtype, examples: list[Example]) -> tuple[float, dict[str, torch.Tensor]]:
    _, plain = pair(kind, dtype)
    with zoo.Wide():
        loss = zoo.plain_loss(plain, examples)
        return loss.item(), zoo.gradients(plain, loss)


@functools.cache
def plain_tree(kind: str, dtype: torch.dtype) -> tuple[float, dict[str, torch.Tensor]]:
    return plain_result(kind, dtype, zoo.tree())


def differences(
    kind: str, dtype: torch.dtype, examples: list[Example] | None = None, **how: Any
) -> tuple[float, float]:
    """Relative differences of the loss and of the worst gradient; of the fixed tree where no examples are given."""
    model, _ = pair(kind, dtype)
    assert forward.use_forest_attention(model)
    expected, gradients = plain_tree(kind, dtype) if examples is None else plain_result(kind, dtype, examples)
    with zoo.Wide():
        loss = forest_loss(model, zoo.tree() if examples is None else examples, **how)
        gradient = zoo.worst(zoo.gradients(model, loss), gradients)
    return abs(loss.item() - expected) / abs(expected), gradient


@pytest.mark.parametrize("how", [{"min_shared": 1}, {"min_shared": 4}, {"share": False}], ids=str)
@pytest.mark.parametrize("kind", zoo.KINDS)
def test_forest_equals_single_sequences(kind: str, how: dict[str, Any]) -> None:
    loss, gradient = differences(kind, torch.float64, **how)
    assert loss < 1e-10
    assert gradient < 1e-10


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gemma2", "gpt2"])
def test_float32(kind: str) -> None:
    loss, gradient = differences(kind, torch.float32)
    assert loss < 1e-5
    assert gradient < 1e-4


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@drawn(15)
@given(examples=trees(), min_shared=st.integers(1, 4))
def test_random_trees(kind: str, examples: list[Example], min_shared: int) -> None:
    loss, gradient = differences(kind, torch.float64, examples, min_shared=min_shared)
    assert loss < 1e-10
    assert gradient < 1e-10


def test_the_window_matters() -> None:
    """The sliding layers are really shorter than the sequences, so that the tests above see them."""
    model, _ = pair("mistral", torch.float64)
    forward.use_forest_attention(model)
    config = model.get_base_model().config
    narrow = forest_loss(model, zoo.tree()).item()
    try:
        config.sliding_window = None
        assert abs(forest_loss(model, zoo.tree()).item() - narrow) > 1e-3
    finally:
        config.sliding_window = zoo.WINDOW


def test_one_call_a_layer() -> None:
    model, _ = pair("llama", torch.float64)
    forward.use_forest_attention(model)
    layout = forest_attention.layout(forests.build(zoo.tree()))
    with forest_attention.using(layout):
        model.get_base_model().model(
            input_ids=torch.from_numpy(forests.build(zoo.tree()).token_ids)[None], use_cache=False
        )
    assert layout.calls == [2]


def test_a_first_child_needs_no_gather() -> None:
    forest = forests.build(
        [Example(token_ids=[1, 2, 3, 0], targets=((3, 4),)), Example(token_ids=[1, 2, 4, 0], targets=((3, 4),))],
        min_shared=1,
    )
    assert forest_attention.layout(forest).nodes == ((0, 2, ((0, 2),)), (2, 3, ((0, 3),)), (3, 4, ((0, 2), (3, 4))))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 3])
def test_a_node_against_a_written_out_softmax(softcap: float | None, window: int | None) -> None:
    torch.manual_seed(0)
    forest = forests.build(
        [
            Example(token_ids=[1, 2, 3, 4, 9], targets=((4, 5),)),
            Example(token_ids=[1, 2, 5, 6, 7, 9], targets=((5, 6),)),
        ],
        min_shared=1,
    )
    query = torch.randn(1, 4, 7, 8, dtype=torch.float64)
    key, value = torch.randn(2, 1, 2, 7, 8, dtype=torch.float64)
    found, _ = forest_attention.forest_attention(
        torch.nn.Module(),
        query,
        key,
        value,
        None,
        forest_layout=forest_attention.layout(forest),
        scaling=0.5,
        softcap=softcap,
        sliding_window=window,
    )
    paths = {0: [0], 1: [0, 1], 2: [0, 1, 2], 3: [0, 1, 2, 3], 4: [0, 1, 4], 5: [0, 1, 4, 5], 6: [0, 1, 4, 5, 6]}
    for row, path in paths.items():
        seen = path if window is None else path[-window:]
        for head in range(4):
            scores = torch.stack([query[0, head, row] @ key[0, head // 2, at] * 0.5 for at in seen])
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            expected = sum(w * value[0, head // 2, at] for w, at in zip(scores.softmax(0), seen, strict=True))
            torch.testing.assert_close(found[0, row, head], expected, rtol=1e-12, atol=1e-12)


def test_attention_dropout_is_right_on_average() -> None:
    torch.manual_seed(0)
    forest = forests.build([Example(token_ids=[1, 2, 3, 9], targets=((3, 4),))])
    query, key, value = torch.randn(3, 1, 2, 3, 4, dtype=torch.float64)
    how: dict[str, Any] = {"forest_layout": forest_attention.layout(forest)}
    exact, _ = forest_attention.forest_attention(torch.nn.Module(), query, key, value, None, **how)
    for softcap in (None, 1e9):
        draws = [
            forest_attention.forest_attention(
                torch.nn.Module(), query, key, value, None, dropout=0.3, softcap=softcap, **how
            )[0]
            for _ in range(800)
        ]
        assert not torch.equal(draws[0], draws[1])
        torch.testing.assert_close(torch.stack(draws).mean(0), exact, atol=0.15, rtol=0)


def test_without_a_layout_it_refuses() -> None:
    states = torch.zeros(1, 1, 2, 4)
    with pytest.raises(RuntimeError, match="without a layout"):
        forest_attention.forest_attention(torch.nn.Module(), states, states, states, None)


@pytest.mark.parametrize("kind", zoo.STATEFUL)
def test_models_with_states_run_one_at_a_time(kind: str) -> None:
    model, plain = zoo.tiny(kind)
    assert forward.use_forest_attention(model) is False
    examples = zoo.tree()[2:5]
    with zoo.Wide():
        parts = [forward.forest_logprobs(model, forests.build([example]), plain=True) for example in examples]
        loss, expected = -torch.cat(parts).sum(), zoo.plain_loss(plain, examples)
        assert abs(loss.item() - expected.item()) / expected.item() < 1e-10
        assert zoo.worst(zoo.gradients(model, loss), zoo.gradients(plain, expected)) < 1e-10
        assert forward.self_check(model, examples[:1], plain=True) < 1e-10


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_self_check_passes(kind: str) -> None:
    model, _ = pair(kind, torch.float64)
    assert forward.use_forest_attention(model)
    with zoo.Wide():
        assert forward.self_check(model, zoo.tree()[:4]) < 1e-10
    assert model.get_base_model().config._attn_implementation == forest_attention.NAME


def test_a_self_check_takes_less_memory_than_a_step() -> None:
    """Logits of 262,144 words at 600 targets would be 1.6 GB, and 0.2 GB of it at those that are compared."""
    config = zoo.ALL["llama"]().config
    config.vocab_size, config.max_position_embeddings = 2**18, 1024
    forest_attention.register()
    model = LlamaForCausalLM(config)
    assert forward.use_forest_attention(model)
    row = Example(token_ids=[5, *range(3, 603)], targets=((1, 601),))
    with Tracker() as tracker:
        assert forward.self_check(model, [row]) < 1e-4
    assert max(peak.total for peak in tracker.peaks.values()) < 250e6


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss", "mamba", "llama"])
def test_every_kind_can_be_loaded_and_switched_back(kind: str, tmp_path: Path) -> None:
    """Some have no scaled_dot_product_attention; asking for it would refuse them."""
    zoo.ALL[kind]().save_pretrained(tmp_path)
    model = load.load_model(str(tmp_path), dtype=torch.float32, device=torch.device("cpu"))
    assert forward.use_forest_attention(model)
    forward.use_plain_attention(model)
    assert model.config._attn_implementation == ("sdpa" if kind == "llama" else "eager")
    assert torch.isfinite(model(input_ids=torch.tensor([[3, 4, 5]])).logits).all()


def test_self_check_stops_a_wrong_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = zoo.tiny("lfm2")
    monkeypatch.setattr(state_layers, "attach", lambda causal, paths: 0)  # as if convolutions were harmless
    monkeypatch.setattr(forward, "_STATES", set())
    assert forward.use_forest_attention(model)
    with pytest.raises(ModelError, match=r"from those of this model's own forward pass \(mean relative difference"):
        forward.self_check(model, zoo.tree()[:4])


def test_a_model_without_the_interface_is_named() -> None:
    model, _ = zoo.tiny("lfm2")  # its layers run with their own attention as long as nobody switches it
    with pytest.raises(ModelError, match="do not use transformers' attention interface"):
        forward.forest_logprobs(model, forests.build(zoo.tree()[:1]))
