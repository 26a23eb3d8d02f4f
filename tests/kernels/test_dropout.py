"""Dropout whose mask is made again: the same everywhere, random enough, and the one that gradients know of."""

from __future__ import annotations

import copy

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear

import kernel_cases
import zoo
from byeori.batch import forest as forests
from byeori.config import SPEED
from byeori.data.tokenize import Example
from byeori.kernels import dropout, last_layer, lora_linear, patch, switches
from byeori.kernels.dropout import SeededDropout
from byeori.model import forward, wrap

ONES = torch.ones(200, 300)


def mixed(v: int) -> int:
    v ^= v >> 16
    v = v * 0x7FEB352D % 2**32
    v ^= v >> 15
    v = v * 0x846CA68B % 2**32
    return v ^ v >> 16


def test_the_mask_is_the_formula() -> None:
    found = SeededDropout(0.3, 123_456_789).apply(ONES[:7, :11].contiguous().double()).tolist()
    least = round(0.3 * 2**16)
    for row, values in enumerate(found):
        for column, value in enumerate(values):
            drawn = mixed((row * 6 + column % 6 + 123_456_789) % 2**32)
            stays = (drawn >> 16 if column >= 6 else drawn % 2**16) >= least
            assert value == (2**16 / (2**16 - least) if stays else 0)


@kernel_cases.needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_drops_the_same(dtype: torch.dtype) -> None:
    for drop in (SeededDropout(0.05, 0), SeededDropout(0.9, 2**31 - 1), SeededDropout(0.9999999, 3)):
        for x in (torch.randn(37, 53).to(dtype), torch.randn(3, 1).to(dtype), torch.randn(9, 160).to(dtype)):
            found = drop.apply(x)
            with switches.using(switches.Switches(kernels=False)):
                expected = drop.apply(x)
            torch.testing.assert_close(found, expected, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=0)
            assert torch.equal(found == 0, expected == 0)


def test_masks_are_as_random_as_they_should_be() -> None:
    """Shares, and of two masks or of a mask and itself one number, one row or more further on: within 5 errors."""
    masks = [SeededDropout(0.2, seed).apply(ONES) > 0 for seed in (0, 1, 2, 4, 2**20, 977_531, 2**31 - 1)]
    one = (0.2 * 0.8 / ONES.numel()) ** 0.5
    for mask in masks:
        assert abs(float(mask.float().mean()) - 0.8) < 5 * one
        assert abs(float(mask.float().mean(0).std()) / (0.2 * 0.8 / len(ONES)) ** 0.5 - 1) < 0.25
        flat = mask.flatten()
        for shift in (1, 2, 150, 256, 300, 4096):
            both = float((flat[shift:] & flat[:-shift]).float().mean())
            assert abs(both - 0.64) < 8 * one
    for at, mask in enumerate(masks):
        for other in masks[:at]:
            assert abs(float((mask & other).float().mean()) - 0.64) < 8 * one


def test_numbers_are_drawn_only_where_something_is_dropped() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert dropout.draw(0.0) is None
    assert torch.equal(torch.get_rng_state(), before)
    first, second = dropout.draw(0.1), dropout.draw(0.1)
    assert isinstance(first, SeededDropout)
    assert isinstance(second, SeededDropout)
    assert first.seed != second.seed


class Masked(torch.nn.Module):
    """Dropout with one mask for each shape."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return SeededDropout(0.4, 5).apply(x.reshape(-1, x.shape[-1])).view_as(x)


@pytest.mark.parametrize("parts", [[], [part for part in SPEED if part != "last_layer"]], ids=["alone", "fused"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "mixtral", "cohere"])
def test_a_model_with_dropout_equals_pefts_with_the_same_masks(
    kind: str, parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (lora_linear, dropout):
        monkeypatch.setattr(module, "draw", lambda rate: SeededDropout(rate, 5) if rate else None)
    model, plain = zoo.tiny(kind)
    row = Example(token_ids=list(range(3, 23)), targets=((8, 20),))
    for part in (model, plain):
        for layer in part.modules():
            if isinstance(layer, LoraLinear):
                layer.lora_dropout["default"] = Masked() if part is plain else torch.nn.Dropout(0.4)
    assert forward.use_forest_attention(model)
    patch.fuse(model, parts)
    model.train()
    plain.train()
    with zoo.Wide(), forward.accelerated(model):
        loss = -forward.forest_logprobs(model, forests.build([row])).sum()
        expected = zoo.plain_loss(plain, [row])
        assert abs(loss.item() - expected.item()) / expected.item() < 1e-10
        assert zoo.worst(zoo.gradients(model, loss), zoo.gradients(plain, expected)) < 1e-10


@pytest.mark.parametrize("recompute", [False, True])
def test_few_rows_and_recomputed_layers(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient is that of the loss with the same seeds, by differences along a direction in float64."""
    monkeypatch.setattr(last_layer, "_AT_MOST_ONE_IN", 1)
    model, _ = zoo.tiny("qwen3")
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            layer.lora_dropout["default"] = torch.nn.Dropout(0.3)
    assert forward.use_forest_attention(model)
    patch.fuse(model, list(SPEED))
    model.train()
    if recompute:
        wrap.recompute_layers(model.get_base_model(), "full")
    forest = forests.build(zoo.tree(), min_shared=1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [copy.deepcopy(p.detach()) for p in parameters]
    torch.manual_seed(1)
    ways = [torch.randn_like(p) for p in parameters]

    def loss(step: float) -> torch.Tensor:
        with torch.no_grad():
            for p, start, way in zip(parameters, before, ways, strict=True):
                p.copy_(start + step * way)
        torch.manual_seed(7)
        return forward.forest_logprobs(model, forest).sum()

    with zoo.Wide():
        slope = (loss(1e-5) - loss(-1e-5)).item() / 2e-5
        grads = torch.autograd.grad(loss(0.0), parameters)
    along = sum(float((grad * way).sum()) for grad, way in zip(grads, ways, strict=True))
    assert abs(along - slope) / abs(slope) < 1e-6


def test_a_mask_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """In compiled layers: of the input's shape, and the one that the backward pass knows of."""
    assert dropout.draw_mask(0.0, ONES) is None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    model, _ = zoo.tiny("llama")
    layer = next(each for each in model.modules() if isinstance(each, LoraLinear)).train()
    layer.lora_dropout["default"] = torch.nn.Dropout(0.4)
    x = torch.randn(1, 7, layer.in_features, dtype=torch.float64, requires_grad=True)

    def through(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return layer(x)

    assert not torch.allclose(through(x), layer.eval()(x))
    layer.train()
    assert torch.autograd.gradcheck(through, (x,))
