"""Triton's kernels against PyTorch's operations in float64, and whether a model's layers take them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kernel_cases
import zoo
from byeori.batch import forest as forests
from byeori.kernels import dispatch, last_layer, patch, switches, triton_kernels
from byeori.kernels.dropout import SeededDropout
from byeori.kernels.lm_head import Head, target_logprobs
from byeori.model import forward

pytest.importorskip("triton")

GPU = torch.device("cuda")
STORES = [torch.float32, torch.bfloat16, torch.float16]


# 18 fills no tile, of 128 several rows do, and of 8,192 half a row does
@pytest.mark.parametrize("size", [2, 18, 128, 1000, pytest.param(8192, marks=pytest.mark.silicon)])
@pytest.mark.parametrize("dtype", STORES)
def test_kernels(dtype: torch.dtype, size: int) -> None:
    kernel_cases.check(dtype, size, GPU)


def test_many_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "TILE", 8)
    kernel_cases.check(torch.float32, 18, GPU)


def test_a_nan_goes_through_every_kernel() -> None:
    kernel_cases.check_nan(GPU)


@pytest.mark.parametrize("tile", [8, triton_kernels.TILE])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("dtype", STORES)
def test_log_probs_and_their_gradient(
    dtype: torch.dtype, scale: float, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of 64 of 300 words, so that most targets lie in another block; one block has a rest of 44."""
    monkeypatch.setattr(triton_kernels, "TILE", tile)
    calls = counted(monkeypatch)
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 300, device=GPU, dtype=dtype).requires_grad_(False)
    hidden = torch.randn(9, 32, device=GPU, dtype=dtype, requires_grad=True)
    ids, weights = torch.randint(0, 300, (9,), device=GPU), torch.linspace(-1, 2, 9, device=GPU)
    found = target_logprobs(
        Head(module=head, scale=scale), hidden, ids, chunk_bytes=4 * 9 * 300, block_bytes=4 * 9 * 64
    )
    assert calls == ["online_softmax"] * 5
    wide = hidden.detach().double().requires_grad_()
    logits = scale * (wide @ head.weight.double().t() + head.bias.double())
    exact = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), exact, rtol=limit, atol=limit)
    (ours,) = torch.autograd.grad((found * weights).sum(), hidden)
    (right,) = torch.autograd.grad(exact @ weights.double(), wide)
    assert float((ours.double() - right).norm() / right.norm()) < limit


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are called from here on."""
    names: list[str] = []
    before = triton_kernels.call

    def call(name: str, *arguments: Any) -> None:
        names.append(name)
        before(name, *arguments)

    monkeypatch.setattr(triton_kernels, "call", call)
    return names


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "mistral", "granite"])
def test_a_model_takes_them(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients in float32 against single sequences in float64 on the CPU."""
    monkeypatch.setattr(last_layer, "_AT_MOST_ONE_IN", 1)
    calls = counted(monkeypatch)
    model, plain = zoo.tiny(kind, torch.float32)
    model, plain = model.to(GPU), plain.double()
    assert forward.use_forest_attention(model)
    patch.fuse(model, patch.parts(["auto"], GPU))
    loss = -forward.forest_logprobs(model, forests.build(zoo.tree(), min_shared=1)).sum()
    found = zoo.gradients(model, loss)
    with zoo.Wide():
        expected = zoo.plain_loss(plain, zoo.tree())
        exact = zoo.gradients(plain, expected)
    assert abs(loss.item() - expected.item()) / expected.item() < 1e-5
    assert zoo.worst({name: grad.cpu().double() for name, grad in found.items()}, exact) < 1e-4
    assert set(calls) == {"norm", "norm_back", "glu", "glu_back", "rope", "rope_back", "online_softmax"}


@pytest.mark.parametrize("dtype", STORES)
def test_dropout_leaves_out_what_it_does_on_the_cpu(dtype: torch.dtype) -> None:
    for drop in (SeededDropout(0.05, 16), SeededDropout(0.9, 2**31 - 1)):
        for x in (torch.randn(60, 70).to(dtype), torch.randn(7, 131).to(dtype)):
            found, expected = drop.apply(x.to(GPU)).cpu(), drop.apply(x.double())
            assert torch.equal(found == 0, expected == 0)
            torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=0)


def test_without_them_nothing_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    with switches.using(switches.Switches(kernels=False)):
        assert not dispatch.supports(torch.ones(4, device=GPU), kernel="norm")
    assert dispatch.supports(torch.ones(4, device=GPU), kernel="norm")
    assert not dispatch.supports(torch.ones(4, device=GPU, dtype=torch.float64), kernel="norm")
    assert not dispatch.supports(torch.ones(4, 4, device=GPU).t(), kernel="norm")
    assert calls == []
