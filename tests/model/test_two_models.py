"""Two models with different accelerations live in one process: each computes what it computes alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zoo
from byeori.batch import forest as forests
from byeori.kernels import bf16_matmul, native, patch, switches
from byeori.model import forward

STEPS = 3


class Training:
    """A tiny model with some accelerations, trained a step at a time."""

    def __init__(self, kind: str, parts: list[str], dtype: torch.dtype) -> None:
        self.model, _ = zoo.tiny(kind, dtype)
        assert forward.use_forest_attention(self.model)
        patch.fuse(self.model.get_base_model(), parts)
        self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=0.05)
        self.losses: list[float] = []

    def step(self) -> None:
        with forward.accelerated(self.model):
            loss = -forward.forest_logprobs(self.model, forests.build(zoo.tree(), min_shared=1)).mean()
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())


def alone(*arguments: Any) -> list[float]:
    training = Training(*arguments)
    for _ in range(STEPS):
        training.step()
    return training.losses


@pytest.mark.parametrize("units", [True, False], ids=["bf16 units", "no bf16 units"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interleaved_steps_equal_those_of_each_alone(
    dtype: torch.dtype, units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bf16_matmul, "units", lambda: units)
    settings = [("gemma3", [], dtype), ("gemma3", list(patch.PARTS), dtype), ("qwen3", ["mlp", "heads"], dtype)]
    expected = [alone(*each) for each in settings]
    trainings = [Training(*each) for each in settings]
    for _ in range(STEPS):
        for training in trainings:
            training.step()
    assert [training.losses for training in trainings] == expected
    assert len({tuple(losses) for losses in expected}) == 3


@pytest.mark.skipif(native.problem() is not None, reason="no C kernels")
def test_only_the_model_with_kernels_calls_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with_kernels = Training("llama", list(patch.PARTS), torch.float32)
    without = Training("llama", [part for part in patch.PARTS if part != "kernels"], torch.float32)
    calls: list[str] = []
    call = native.call
    monkeypatch.setattr(native, "call", lambda name, *given: (calls.append(name), call(name, *given)))
    without.step()
    assert calls == []
    with_kernels.step()
    assert {"norm", "norm_back", "glu_back", "rope_back", "softmax_back"} <= set(calls)
    before = len(calls)
    without.step()
    assert len(calls) == before
    assert switches.current() == switches.Switches()


def test_a_step_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16_matmul, "units", lambda: False)
    training = Training("llama", [], torch.bfloat16)
    left = right = torch.ones(8, 8, dtype=torch.bfloat16)
    with pytest.raises(ZeroDivisionError), forward.accelerated(training.model):
        assert not switches.current().kernels
        assert bf16_matmul._installed
        raise ZeroDivisionError
    assert switches.current() == switches.Switches()
    monkeypatch.setattr(bf16_matmul, "_multiply", None)
    assert float((left @ right)[0, 0]) == 8  # PyTorch's own
