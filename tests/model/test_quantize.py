"""Packed layers compute what their opened weights compute, and streamed weights are those that transformers loads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from byeori.batch import forest as forests
from byeori.distributed import processes
from byeori.errors import ConfigError
from byeori.kernels import lora_linear, quantized_experts, switches
from byeori.kernels.quantized_linear import QuantizedLinear
from byeori.model import adapter, experts, forward, load, load_streamed, quantize
from zoo import KINDS, gradients, tree, worst

ALONE = processes.Processes(rank=0, world=1, device=torch.device("cpu"))
# QLoRA, appendix E (arXiv:2305.14314): the 16 values of NF4
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


def packed(
    rows: int, columns: int, bits: int, dtype: torch.dtype = torch.float32
) -> tuple[QuantizedLinear, torch.Tensor]:
    torch.manual_seed(0)
    linear = torch.nn.Linear(columns, rows, dtype=dtype)
    layer = QuantizedLinear(linear, bits)
    layer.weight = torch.nn.Parameter(layer.quantize(linear.weight.detach()), requires_grad=False)
    return layer, linear.weight.detach()


@pytest.mark.parametrize("shape", [(24, 128), (33, 7), (16, 40)])
def test_four_bit_is_nf4_in_blocks_of_64(shape: tuple[int, int]) -> None:
    layer, weight = packed(*shape, bits=4)
    assert layer.weight.shape == ((weight.numel() + 1) // 2, 1) and layer.weight.dtype == torch.uint8
    flat = weight.reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % 64)).view(-1, 64)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    nearest = NF4[(blocks / scale)[..., None].sub(NF4).abs().argmin(dim=-1)] * scale
    opened = layer.dequantize(layer.weight)
    # the scales are rounded to 8 bit themselves
    assert float((opened.reshape(-1) - nearest.view(-1)[: len(flat)]).abs().max()) < 0.02 * float(weight.abs().max())


def test_eight_bit_rounds_rows() -> None:
    layer, weight = packed(24, 40, bits=8)
    scale = weight.half().float().abs().amax(dim=1, keepdim=True) / 127
    assert torch.allclose(
        layer.dequantize(layer.weight), (weight / scale).round() * scale, atol=float(scale.max()) * 1.01
    )
    assert layer.weight.dtype == torch.int8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(24, 128), (33, 7), (300, 130)])
def test_written_out_as_bitsandbytes_does(shape: tuple[int, int], bits: int, dtype: torch.dtype) -> None:
    layer, _ = packed(*shape, bits, dtype)
    by_library = layer.dequantize(layer.weight)
    with switches.using(switches.Switches(quantized=False)):
        written = layer.dequantize(layer.weight)
    assert written.dtype == dtype
    torch.testing.assert_close(written, by_library, rtol=1e-6 if dtype == torch.float32 else 0.01, atol=1e-7)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_layer_keeps_its_small_weight_only(bits: int) -> None:
    layer, _ = packed(24, 64, bits)
    kept: list[torch.Tensor] = []
    x = torch.randn(5, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = layer(x)
    assert [tensor.dtype for tensor in kept] == [layer.weight.dtype]
    weight = layer.dequantize(layer.weight)
    assert torch.allclose(y, torch.nn.functional.linear(x, weight, layer.bias))
    y.square().sum().backward()
    assert torch.allclose(x.grad, 2 * y.detach() @ weight)


def saved(kind: str, folder: Path) -> Any:
    torch.manual_seed(0)
    model = KINDS[kind]().float().eval()
    model.save_pretrained(folder)
    return model


# gpt2 has no plain linear layers; mixtral's experts are stored one by one; cohere's embeddings are tied
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "hyperclovax"])
def test_streamed_weights_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    found = load_streamed.load_streamed(str(tmp_path), dtype=torch.float32, processes=ALONE)
    assert {name for name, _ in found.named_parameters()} == {name for name, _ in expected.named_parameters()}
    for (name, mine), (_, theirs) in zip(found.state_dict().items(), expected.state_dict().items(), strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs), name
    for (name, mine), (_, theirs) in zip(found.named_buffers(), expected.named_buffers(), strict=True):
        assert torch.equal(mine, theirs), name
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(found(input_ids=ids).logits, expected(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "phi", "mixtral"])
@pytest.mark.parametrize("bits", [4, 8])
def test_training_over_packed_layers(kind: str, bits: int, tmp_path: Path) -> None:
    """Loss and gradients equal those of the same model with its opened weights written out, by PEFT's own layers."""
    saved(kind, tmp_path)
    base = load_streamed.load_streamed(str(tmp_path), dtype=torch.float32, processes=ALONE, bits=bits)
    plain = load.load_model(str(tmp_path), dtype=torch.float32, device=ALONE.device)
    count = 0
    for name, layer in base.named_modules():
        if isinstance(layer, QuantizedLinear):
            plain.get_submodule(name).weight.data = layer.dequantize(layer.weight)
            count += 1
    for path, _, short, parameter in experts.stacks(plain):
        held = base.get_submodule(path)
        scales = quantized_experts.scales_of(held, short)
        assert scales is not None
        parameter.data = scales.open(held._parameters[short])
    assert count >= 8
    models = []
    for one in (base, plain):
        model = adapter.attach(one, r=3, alpha=5, dropout=0.0, targets=["q_proj", "v_proj"], seed=1)
        torch.manual_seed(2)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        models.append(model)
    assert lora_linear.fuse(models[0]) == 4
    for model in models:
        assert forward.use_forest_attention(model)
    batch = forests.build(tree())
    found, expected = (gradients(m, forward.forest_logprobs(m, batch).sum()) for m in models)
    assert worst(found, expected) < 2e-4
    with models[0].disable_adapter(), models[1].disable_adapter(), torch.no_grad():
        mine, theirs = (forward.forest_logprobs(model, batch) for model in models)
    assert torch.allclose(mine, theirs, rtol=1e-4)
    assert forward.self_check(models[0], tree()[:4]) < 1e-4


def test_equals_bitsandbytes_in_transformers(tmp_path: Path) -> None:
    """Blocks of rows of a multiple of 64 are those that `BitsAndBytesConfig` makes."""
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=how, dtype=torch.float32)
    mine = load_streamed.load_streamed(str(tmp_path), dtype=torch.float32, processes=ALONE, bits=4)
    for name, layer in mine.named_modules():
        if isinstance(layer, QuantizedLinear):
            assert torch.equal(theirs.get_submodule(name).weight.data, layer.weight), name
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.allclose(mine(input_ids=ids).logits, theirs.train()(input_ids=ids).logits, atol=1e-4)


def test_what_cannot_be_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved("gpt2", tmp_path / "gpt2")
    with pytest.raises(ConfigError, match="GPT2LMHeadModel has no plain linear layers to quantize"):
        quantize.quantize_layers(copy.deepcopy(model), 4)
    model = saved("llama", tmp_path / "llama")
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    model.config.save_pretrained(tmp_path / "llama")
    with pytest.raises(ConfigError, match="are quantized already; omit --load_in_4bit"):
        load_streamed.load_streamed(str(tmp_path / "llama"), dtype=torch.float32, processes=ALONE, bits=4)
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"--load_in_4bit needs bitsandbytes; pip install '.\[quant\]' in byeori's"):
        quantize.quantize_layers(model, 4)
