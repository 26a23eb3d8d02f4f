"""Products with an adapter in one pass, in each way that kernels.c can multiply, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from byeori.kernels import amx_linear, lora_linear, native
from byeori.kernels.dropout import DropoutMask
from byeori.model import load
from ways import WAYS, library


@pytest.fixture(params=WAYS, autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    found = library(request.param)
    monkeypatch.setattr(native, "_library", lambda: found)
    monkeypatch.setattr(native, "tiles", lambda: 2)  # as where there are matrix units


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16)


SIZES = [(133, 640, 2048, 16), (70, 2048, 640, 16), (5, 70, 90, 3), (1, 32, 32, 1), (257, 100, 16, 8), (40, 33, 31, 40)]


@pytest.mark.parametrize("into", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_product_with_its_adapter(sizes: tuple[int, int, int, int], transposed: bool, into: bool) -> None:
    torch.manual_seed(0)
    rows, k, n, r = sizes
    turn = (lambda matrix: matrix.t().contiguous()) if transposed else (lambda matrix: matrix)
    x, w, down, up, before = random(rows, k), random(k, n), random(k, r), random(r, n), random(rows, n)
    h = torch.empty(rows, r, dtype=torch.bfloat16)
    how: dict[str, Any] = {"transposed": transposed, "into": before.clone() if into else None}
    found = amx_linear.linear(x, turn(w), down=turn(down), up=turn(up), h=h, scale=0.5, **how)
    assert distance(h, 0.5 * x.double() @ down.double()) < 2**-8
    plain = before.double() if into else 0
    assert distance(found, x.double() @ w.double() + h.double() @ up.double() + plain) < 2**-8
    how["into"] = before.clone() if into else None
    given = amx_linear.linear(x, turn(w), up=turn(up), h=h, **how)
    assert torch.equal(given, found)
    how["into"] = before.clone() if into else None
    alone = amx_linear.linear(x, turn(w), **how)
    assert distance(alone, x.double() @ w.double() + plain) < 2**-8


@pytest.mark.parametrize("sizes", [(133, 16, 640), (64, 8, 256), (5, 3, 31), (1, 1, 1), (70, 40, 90)], ids=str)
def test_the_sum_over_rows(sizes: tuple[int, int, int]) -> None:
    torch.manual_seed(2)
    rows, r, k = sizes
    u, x = random(rows, r), random(rows, k)
    found = amx_linear.outer(u, x, 0.5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), 0.5 * u.double().t() @ x.double(), rtol=1e-4, atol=1e-4)


def projection(width: int, out: int, *, r: int) -> lora_linear.Projection:
    """With an adapter of rank r, if any."""
    a, b = (torch.randn(r, width), torch.randn(out, r)) if r else (None, None)
    return lora_linear.Projection(weight=random(out, width), bias=None, a=a, b=b, scale=0.3)


@pytest.mark.parametrize("in_one_pass", [True, False])
@pytest.mark.parametrize("dropout", [False, True])
def test_projections_of_one_input_and_their_gradients(
    dropout: bool, in_one_pass: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    if not in_one_pass:
        monkeypatch.setattr(amx_linear, "supports", lambda *_: False)
    x = random(70, 96)
    parts = [projection(96, 64, r=8), projection(96, 32, r=0), projection(96, 16, r=5)]
    gs = [random(70, len(part.weight)) for part in parts]
    keep = torch.empty(70, 96, dtype=torch.bfloat16).bernoulli_(0.75).div_(0.75) if dropout else None
    drop = None if keep is None else DropoutMask(keep)
    ys, hs = lora_linear.project(x, parts, drop)
    to_x, found = lora_linear.project_backward(gs, x, hs, parts, drop=drop)
    wide = x.double().requires_grad_()
    dropped = wide if keep is None else wide * keep.double()
    matrices = [(p.a.double().requires_grad_(), p.b.double().requires_grad_()) for p in parts if p.a is not None]
    left = iter(matrices)
    for y, g, part in zip(ys, gs, parts, strict=True):
        expected = wide @ part.weight.double().t()
        if part.a is not None:
            a, b = next(left)
            expected = expected + 0.3 * (dropped @ a.t()) @ b.t()
        assert distance(y, expected.detach()) < 2**-7
        expected.backward(g.double(), retain_graph=True)
    wanted = [wide.grad, *(m.grad for pair in matrices for m in pair)]
    assert [grad is None for grad in found] == [False, False, True, True, False, False]
    for one, other in zip([to_x, *(grad for grad in found if grad is not None)], wanted, strict=True):
        assert one is not None
        assert distance(one, other) < 2**-6


def test_it_is_taken_where_the_types_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = random(16, 32), random(32, 32)
    assert amx_linear.supports(x, w)
    assert not amx_linear.supports(x.float(), w.float())
    assert not amx_linear.supports(x.t(), w)
    assert not amx_linear.supports(x[:15], w)
    assert not amx_linear.supports(random(16, 8193), random(8193, 2))
    assert not amx_linear.supports(random(16, 0), random(0, 2))  # a block of words all of which are rare
    monkeypatch.setattr(native, "tiles", lambda: 1)
    assert not amx_linear.supports(x, w)


def test_micro_batches_are_larger_where_tiles_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert [load.micro_batch_tokens(dtype, cpu) for dtype in ("bfloat16", "float32")] == [4096, 2048]
    monkeypatch.setattr(native, "tiles", lambda: 1)
    assert load.micro_batch_tokens("bfloat16", cpu) == 2048
    gpu = torch.device("cuda")
    assert load.micro_batch_tokens("bfloat16", gpu) == 4096


def test_micro_batches_of_small_models_are_larger_on_a_gpu() -> None:
    """4 operations a weight and token: 2e13 are 8,333 tokens of a model of 0.6 billion weights."""
    found = {n: load.micro_batch_tokens("auto", torch.device("cuda"), int(n * 1e9)) for n in (8, 1.3, 1, 0.6, 0.1)}
    assert found == {8: 4096, 1.3: 4096, 1: 8192, 0.6: 16_384, 0.1: 32_768}
    assert load.micro_batch_tokens("float32", torch.device("cpu"), 10**8) == 2048
