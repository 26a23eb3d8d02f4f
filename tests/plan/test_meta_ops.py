"""Remembered operations give what PyTorch gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zoo
from byeori.plan import meta_ops, rehearsal
from byeori.plan.rehearsal import Adapter


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "mixtral", "mamba"])
def test_a_rehearsal_is_the_same_without_remembering(kind: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = zoo.tree()[:1] if kind in zoo.STATEFUL else zoo.tree()
    config = zoo.ALL[kind]().config
    adapter = Adapter(r=3, alpha=5, dropout=0.1, targets=tuple(zoo.TARGETS.get(kind, ["all-linear"])))

    def run() -> rehearsal.Rehearsal:
        rehearsal._on_meta.cache_clear()
        how: dict[str, Any] = {"dtype": torch.bfloat16, "recompute": "selective", "device": device, "explain": True}
        return rehearsal.rehearse(rehearsal.architecture(config), adapter, rows, **how)

    first, second = run(), run()
    monkeypatch.setattr(meta_ops, "call", lambda func, args, kwargs: func(*args, **kwargs))
    assert first == second == run()


def test_strides_types_and_aliases() -> None:
    def made(x: torch.Tensor) -> list[torch.Tensor]:
        parts = [x.t(), x.t() + 1, (x.t() > 0), x.sum(0), torch.cat([x, x], 1), x.t().contiguous(), x.double().exp()]
        return [*parts, *torch.sort(x, dim=0), *x.split(2), torch.empty_like(x.t()), torch.softmax(x, 1)]

    expected = made(torch.ones(4, 6))
    for _ in range(2):
        with meta_ops.Remembering():
            found = made(torch.empty(4, 6, device="meta"))
        for one, other in zip(found, expected, strict=True):
            assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def test_in_place_operations_return_their_argument_and_views_share_it() -> None:
    with meta_ops.Remembering():
        x = torch.empty(3, 4, device="meta")
        assert x.add_(1) is x
        y = torch.empty(3, 4, device="meta")
        assert torch.add(x, 1, out=y) is y
        assert x.view(4, 3).untyped_storage()._cdata == x.untyped_storage()._cdata
        torch._foreach_mul_([x, y], 2.0)
        z = x.new_zeros(0).resize_(5)
        assert z.shape == (5,)


def test_real_tensors_are_computed() -> None:
    with meta_ops.Remembering():
        x = torch.ones(3)
        assert x.add_(1).sum().item() == 6
