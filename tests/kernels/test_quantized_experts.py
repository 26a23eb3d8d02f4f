"""Experts in 4 and 8 bit against the same model with their opened weights written out, through PEFT's own layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb

from byeori.batch import forest as forests
from byeori.distributed.processes import ALONE
from byeori.kernels import lora_linear, quantized_experts, switches
from byeori.kernels.quantized_linear import QuantizedLinear
from byeori.kernels.quantized_weight import QuantizedWeight
from byeori.model import adapter, experts, forward, load, load_streamed
from byeori.model.adapter import Variant
from mixtures import saved
from zoo import gradients, tree, worst

# stored one by one; [experts, in, out] with biases; [experts, out, in] in one tensor; products of all experts at once
KINDS = ("mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "llama4_text")


def by_bitsandbytes(weight: torch.Tensor) -> torch.Tensor:
    """All experts of a layer, opened again; their sizes are multiples of a block."""
    flat = bnb.quantize_4bit(weight.reshape(-1), blocksize=64, compress_statistics=True, quant_type="nf4")
    return bnb.dequantize_4bit(*flat).view(weight.shape)


def both(folder: Path, bits: int, variant: Variant) -> list[Any]:
    """The quantized model, and one with its opened weights as PEFT makes it; the same adapter on both."""
    base = load_streamed.load_streamed(str(folder), dtype=torch.float32, processes=ALONE, bits=bits)
    plain = load.load_model(str(folder), dtype=torch.float32, device=ALONE.device)
    stacks = experts.stacks(plain)
    assert stacks and len(experts.stacks(base)) == len(stacks)
    for path, module, short, parameter in stacks:
        held = base.get_submodule(path)
        scales = quantized_experts.scales_of(held, short)
        assert scales is not None and not held._parameters[short].is_floating_point()
        opened = by_bitsandbytes(parameter.data) if bits == 4 else scales.open(held._parameters[short])
        assert 0 < float((opened - parameter.data).norm() / parameter.data.norm()) < (0.12 if bits == 4 else 0.01)
        module._parameters[short].data = opened
    for name, layer in base.named_modules():
        if isinstance(layer, QuantizedLinear):
            plain.get_submodule(name).weight.data = layer.dequantize(layer.weight)
    models = []
    for one in (base, plain):
        model = adapter.attach(one, r=2, alpha=5, dropout=0.0, targets=["q_proj"], seed=1, variant=variant)
        torch.manual_seed(2)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        assert forward.use_forest_attention(model)
        models.append(model)
    return models


def compared(models: list[Any]) -> float:
    batch = forests.build(tree())
    found, expected = (gradients(model, forward.forest_logprobs(model, batch).sum()) for model in models)
    with torch.no_grad(), models[0].disable_adapter(), models[1].disable_adapter():
        mine, theirs = (forward.forest_logprobs(model, batch) for model in models)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    return worst(found, expected)


@pytest.mark.parametrize("adapted", [False, True], ids=["frozen", "adapted"])
@pytest.mark.parametrize("kind", KINDS)
def test_four_bit(kind: str, adapted: bool, tmp_path: Path) -> None:
    """PEFT's own addition to opened weights first, then the fused form."""
    names = ("experts.gate_up_proj", "experts.down_proj") if adapted else ()
    if kind == "granitemoe" and adapted:
        names = ("experts.gate_up_proj",)
    models = both(saved(kind, tmp_path), 4, Variant(target_parameters=names))
    assert compared(models) < 2e-4
    lora_linear.fuse(models[0])
    assert compared(models) < 2e-4


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_way_of_multiplying(bits: int, implementation: str, tmp_path: Path) -> None:
    models = both(saved("qwen3_moe", tmp_path), bits, Variant())
    for model in models:
        model.get_base_model().config._experts_implementation = implementation
    assert compared(models) < 2e-4


def saved_by(call: Callable[[], object]) -> list[torch.Tensor]:
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        call()
    return kept


def test_what_is_kept_for_the_backward_pass(tmp_path: Path) -> None:
    folder = saved("qwen3_moe", tmp_path)
    base = load_streamed.load_streamed(str(folder), dtype=torch.float32, processes=ALONE, bits=4)
    module = base.model.layers[0].mlp.experts
    for implementation in ("eager", "grouped_mm"):
        base.config._experts_implementation = implementation
        x = torch.randn(6, 32, requires_grad=True)
        kept = saved_by(lambda x=x: module(x, torch.tensor([[0, 1]] * 6), torch.full((6, 2), 0.5)).sum().backward())
        assert x.grad is not None and any(tensor.dtype == torch.uint8 for tensor in kept)
        assert not [tensor.shape for tensor in kept if tensor.is_floating_point() and tensor.numel() >= 24 * 32]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sizes", [(3, 5, 7), (4, 8, 16)])
def test_groups_are_opened_apart(sizes: tuple[int, int, int], bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts of any size, of which every one begins a block."""
    torch.manual_seed(0)
    weight = torch.randn(sizes)
    held = QuantizedWeight(sizes, bits, torch.float32)
    codes = held.quantize(weight)
    assert codes.shape == held.empty_codes().shape
    whole = held.open(codes)
    assert whole.shape == weight.shape and float((whole - weight).norm() / weight.norm()) < 0.12
    for group in range(sizes[0]):
        assert torch.equal(held.open(codes, group, group + 1)[0], whole[group])
    with switches.using(switches.Switches(quantized=False)):
        torch.testing.assert_close(held.open(codes), whole, rtol=1e-6, atol=1e-7)
    monkeypatch.setattr("byeori.kernels.quantized_weight._MOST_AT_ONCE", 2 * held.group)
    again = QuantizedWeight(sizes, bits, torch.float32)
    assert torch.equal(again.quantize(weight), codes) and torch.equal(again.open(codes), whole)
