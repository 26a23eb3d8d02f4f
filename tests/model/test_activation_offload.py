"""Activations in the CPU's memory: what is used has arrived, what is freed has left, and copies overlap the layers.

The way between GPU and CPU is replaced by one on which a copy is made only when it is waited for, from a source that
may be gone by then.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from byeori.batch import forest as forests
from byeori.model import activation_offload, forward, wrap
from zoo import gradients, tiny, tree, worst


class Late(activation_offload.Link):
    """A stream that lags as far behind as it may. started: every copy; done: how many of them are made."""

    def __init__(self) -> None:
        self.started: list[Callable[[], None]] = []
        self.done = 0

    @property
    def under_way(self) -> int:
        return len(self.started) - self.done

    def accepts(self, tensor: torch.Tensor) -> bool:
        return tensor.numel() > 0 and not isinstance(tensor, torch.nn.Parameter)

    def empty_like(self, like: torch.Tensor) -> torch.Tensor:
        return torch.full_like(like, torch.nan)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> int:
        held, into = weakref.ref(source), weakref.ref(target)

        def make() -> None:
            left, arrives = held(), into()
            if arrives is not None:
                arrives.data.copy_(torch.full_like(arrives, torch.nan) if left is None else left)

        self.started.append(make)
        return len(self.started)

    def wait(self, copied: int) -> None:
        for make in self.started[self.done : copied]:
            make()
        self.done = max(self.done, copied)


class Layers(torch.nn.Module):
    """Checkpointed layers; `look` is called before each one computes."""

    def __init__(self, count: int, look: Callable[[int], None] = lambda index: None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linears = torch.nn.ModuleList(torch.nn.Linear(8, 8, dtype=torch.float64) for _ in range(count))
        self.look = look

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index in range(len(self.linears)):
            x = checkpoint(self._layer, x, index, use_reentrant=False)
        return x

    def _layer(self, x: torch.Tensor, index: int) -> torch.Tensor:
        self.look(index)
        return torch.tanh(self.linears[index](x))


def there_and_back(layers: Layers) -> list[torch.Tensor]:
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(3, 8).requires_grad_()
    return list(torch.autograd.grad(layers(x).square().sum(), [x, *layers.parameters()]))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_what_is_used_has_arrived_and_what_is_freed_has_left(count: int) -> None:
    expected, layers, link = there_and_back(Layers(count)), Layers(count), Late()
    activation_offload.offload(layers, link)
    for _ in range(2):
        assert all(torch.equal(*pair) for pair in zip(there_and_back(layers), expected, strict=True))
    assert len(link.started) == 2 * (count + max(0, count - 2))  # all go, the last two need not come back


def test_copies_are_under_way_while_layers_work() -> None:
    link, seen = Late(), list[tuple[int, int]]()
    layers = Layers(6, lambda index: seen.append((index, link.under_way)))
    activation_offload.offload(layers, link)
    there_and_back(layers)
    out, back = seen[:6], seen[6:]
    assert out == [(0, 1), (1, 2), (2, 2), (3, 2), (4, 2), (5, 2)]  # a layer's own input and the one before
    assert back == [(5, 0), (4, 1), (3, 1), (2, 1), (1, 1), (0, 0)]  # the next one's comes meanwhile


def test_a_pass_that_fails_leaves_no_copy_under_way() -> None:
    link, failing = Late(), [True]

    def look(index: int) -> None:
        if index == 3 and failing[0] and len(link.started) > 6:
            raise RuntimeError("out of memory")

    layers = Layers(6, look)
    activation_offload.offload(layers, link)
    with pytest.raises(RuntimeError, match="out of memory"):
        there_and_back(layers)
    gc.collect()
    assert link.under_way == 0
    failing[0] = False
    assert all(torch.equal(*pair) for pair in zip(there_and_back(layers), there_and_back(Layers(6)), strict=True))


def test_a_models_layers_keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their inputs are what is moved; the gradients are those without it."""

    def found(*kinds: str) -> dict[str, torch.Tensor]:
        model, _ = tiny("llama")
        for kind in kinds:
            wrap.recompute_layers(model.get_base_model(), kind)
        forward.use_forest_attention(model)
        return gradients(model, forward.forest_logprobs(model.train(), forests.build(tree())).sum())

    moved: list[Any] = []

    class Noted(Late):
        def copy(self, source: torch.Tensor, target: torch.Tensor) -> int:
            moved.append(tuple(source.shape))
            return super().copy(source, target)

    monkeypatch.setattr(activation_offload, "Link", Noted)
    assert worst(found("offload"), found("none")) < 1e-12
    assert moved.count((1, forests.build(tree()).unique_tokens, 16)) >= 2  # one for each layer
    moved.clear()
    assert worst(found("offload", "full"), found("none")) < 1e-12 and not moved  # what was turned on last counts


def test_small_tensors_weights_and_those_of_the_cpu_stay() -> None:
    stack = activation_offload._Stack(activation_offload.Link())
    for tensor in (torch.zeros(2**20), torch.nn.Parameter(torch.zeros(3))):
        assert stack.put(tensor) is tensor
        assert stack.take(tensor) is tensor
