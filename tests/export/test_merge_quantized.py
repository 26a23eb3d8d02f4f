"""Merging after training in 4 or 8 bit, and onto bases that are stored quantized."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes import functional as bnb
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from byeori.artifacts import sidecar
from byeori.errors import ModelError
from byeori.export import merge_check
from byeori.export.merge import merge
from byeori.kernels.quantized_linear import QuantizedLinear
from byeori.model import opened, packed
from byeori.model.fingerprint import stored_tensors
from tiny_models import byte_level_tokenizer, short_sft, tiny_llama

EXPERTS = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
}
CODES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "merge_report.json").read_text(encoding="utf-8"))
    return report


def opened_by_hand(base: Path, bits: int) -> dict[str, torch.Tensor]:
    """The base's tensors with every linear layer but the head quantized and opened again."""
    tensors = load_file(base / "model.safetensors")
    for name, tensor in tensors.items():
        if not any(f".{code}.weight" in name for code in CODES):
            continue
        if bits == 8:
            codes, scales, _ = bnb.int8_vectorwise_quant(tensor.half())
            tensors[name] = codes.float() * scales.view(-1, 1) / 127
        else:
            flat = bnb.quantize_4bit(tensor.reshape(-1), blocksize=64, compress_statistics=True, quant_type="nf4")
            tensors[name] = bnb.dequantize_4bit(*flat).view(tensor.shape)
    return tensors


def logprobs(model: Any, rows: list[list[int]]) -> torch.Tensor:
    with torch.inference_mode():
        found = [
            model(torch.tensor([row])).logits[0, :-1].log_softmax(-1).gather(-1, torch.tensor(row[1:])[:, None])[:, 0]
            for row in rows
        ]
    return torch.cat(found)


@pytest.fixture(scope="module", params=[4, 8])
def trained(
    request: pytest.FixtureRequest, tiny_model: Path, title_rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp("quantized") / "adapter"
    how: dict[str, Any] = {f"load_in_{request.param}bit": True, "max_steps": 6, "learning_rate": 1e-2}
    return short_sft(tiny_model, title_rows, folder, **how), request.param


def test_the_distance_is_that_from_the_model_that_was_trained(
    trained: tuple[Path, int], tiny_model: Path, tmp_path: Path
) -> None:
    adapter, bits = trained
    result = merge(adapter=adapter, base=None, output_dir=tmp_path / "merged")
    assert (result.verdict, result.onto) == ("equal", "base")
    rows, _ = merge_check.prompts(tmp_path / "merged", AutoModelForCausalLM.from_pretrained(tiny_model).config)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    plain = logprobs(base, rows)
    base.load_state_dict(opened_by_hand(tiny_model, bits))
    truth = logprobs(PeftModel.from_pretrained(base, adapter).eval(), rows)
    merged = logprobs(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(), rows)
    assert result.distance == pytest.approx((merged - truth).abs().mean().item(), rel=1e-3)
    assert result.plain_base_distance == pytest.approx((plain - truth).abs().mean().item(), rel=1e-3)
    report = report_of(tmp_path / "merged")
    assert report["distance_limit"] == pytest.approx(0.25 * report["plain_base_distance"])
    warned = "--onto opened" in result.notes[-1]
    assert f"in {bits} bit" in result.notes[-1] and warned == (report["distance"] > report["distance_limit"])


def test_onto_opened(trained: tuple[Path, int], tiny_model: Path, tmp_path: Path) -> None:
    """The merged model is the one that was trained."""
    adapter, bits = trained
    result = merge(adapter=adapter, base=None, output_dir=tmp_path / "merged", onto="opened")
    assert (result.verdict, result.onto, result.distance, result.notes) == ("equal", "opened", None, [])
    weights, merged = opened_by_hand(tiny_model, bits), load_file(tmp_path / "merged" / "model.safetensors")
    factors, config = (
        load_file(adapter / "adapter_model.safetensors"),
        json.loads((adapter / "adapter_config.json").read_text()),
    )
    for name, tensor in weights.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{stem}A.weight" in factors:
            tensor = (
                tensor + config["lora_alpha"] / config["r"] * factors[f"{stem}B.weight"] @ factors[f"{stem}A.weight"]
            )
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_as_training_held_them(kind: str, tmp_path: Path, title_rows: Path) -> None:
    """Stored one by one or in one tensor, merged onto what 4 bit made of them: the model that was trained."""
    torch.manual_seed(0)
    tokenizer = byte_level_tokenizer()
    known = transformers.CONFIG_MAPPING[kind]().to_dict()
    sizes = {name: size for name, size in EXPERTS.items() if name in known}
    config = transformers.CONFIG_MAPPING[kind](vocab_size=len(tokenizer), **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for folder in [model, tokenizer]:
        folder.save_pretrained(tmp_path / "base")
    how: dict[str, Any] = {"load_in_4bit": True, "max_steps": 4, "learning_rate": 1e-2}
    how["lora_target_parameters"] = ["experts.gate_up_proj", "experts.down_proj"]
    adapter = short_sft(tmp_path / "base", title_rows, tmp_path / "adapter", **how)
    result = merge(adapter=adapter, base=None, output_dir=tmp_path / "onto_base")
    assert result.verdict == "equal" and 0 < (result.distance or 0) < (result.plain_base_distance or 0)
    result = merge(adapter=adapter, base=None, output_dir=tmp_path / "merged", onto="opened")
    assert (result.verdict, result.onto) == ("equal", "opened")
    held = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    for name, parameter in held.named_parameters():
        if ("experts." in name and parameter.dim() == 3) or any(f".{code}.weight" in name for code in CODES):
            flat = bnb.quantize_4bit(
                parameter.data.reshape(-1), blocksize=64, compress_statistics=True, quant_type="nf4"
            )
            parameter.data = bnb.dequantize_4bit(*flat).view(parameter.shape)
    right = PeftModel.from_pretrained(held, adapter).merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, value in right.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_onto_opened_needs_quantized_weights(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    adapter = short_sft(tiny_model, title_rows, tmp_path / "adapter")
    with pytest.raises(ModelError, match="was not trained in 4 or 8 bit"):
        merge(adapter=adapter, base=None, output_dir=tmp_path / "merged", onto="opened")


# ---- stored quantized --------------------------------------------------------------------------------------------


def bnb4(weight: torch.Tensor, quant_type: str = "nf4") -> dict[str, torch.Tensor]:
    codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type=quant_type)
    return {"": codes} | {f".{name}": tensor for name, tensor in state.as_dict(packed=True).items()}


def bnb8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
    return {"": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def fp8(weight: torch.Tensor, block: int | None, name: str) -> dict[str, torch.Tensor]:
    """With a scale for every block of rows and columns, for every row (0), or one."""
    rows, columns = weight.shape
    tall, wide = (rows, columns) if block is None else (1, columns) if block == 0 else (block, block)
    scales = torch.zeros(-(-rows // tall), -(-columns // wide))
    codes = torch.empty_like(weight)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * tall, (i + 1) * tall), slice(j * wide, (j + 1) * wide))
            scales[i, j] = weight[part].abs().max() / 448
            codes[part] = weight[part] / scales[i, j]
    scales = scales.view(()) if block is None else scales
    return {"": codes.to(torch.float8_e4m3fn), name: scales, "input_scale": torch.ones(())}


KINDS: dict[str, Any] = {
    "nf4": (lambda w: bnb4(w), {"quant_method": "bitsandbytes", "load_in_4bit": True}, 0.11),
    "fp4": (lambda w: bnb4(w, "fp4"), {"quant_method": "bitsandbytes", "load_in_4bit": True}, 0.14),
    "int8": (bnb8, {"quant_method": "bitsandbytes", "load_in_8bit": True}, 0.015),
    "fp8 blocks": (
        lambda w: fp8(w, 24, "weight_scale_inv"),
        {"quant_method": "fp8", "weight_block_size": [24, 24]},
        0.04,
    ),
    "fp8 rows": (lambda w: fp8(w, 0, "weight_scale"), {"quant_method": "compressed-tensors"}, 0.04),
    "fp8 tensor": (lambda w: fp8(w, None, "weight_scale"), {"quant_method": "fp8"}, 0.04),
}


def stored(base: Path, folder: Path, kind: str) -> Path:
    """The base with its linear layers stored quantized, as transformers writes and reads them."""
    quantize, config, _ = KINDS[kind]
    shutil.copytree(base, folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if any(f".{code}.weight" in name for code in CODES):
            for part, value in quantize(tensor).items():
                own = name + part if part[:1] in ("", ".") else name.removesuffix("weight") + part
                tensors[own] = value.contiguous()
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    facts = json.loads((folder / "config.json").read_text()) | {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(facts))
    return folder


def moved(adapter: Path, folder: Path, base: Path) -> Path:
    """The adapter as if it had been trained on another base."""
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    sidecar.write_start(folder, str(base), None, "", None)
    return folder


@pytest.fixture(scope="module")
def plainly_trained(tiny_model: Path, title_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "adapter"
    return short_sft(tiny_model, title_rows, folder, max_steps=6, learning_rate=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_that_is_stored_quantized(kind: str, plainly_trained: Path, tiny_model: Path, tmp_path: Path) -> None:
    """It is merged onto the opened weights, or onto the full-precision model that it was made from."""
    base = stored(tiny_model, tmp_path / "base", kind)
    adapter = moved(plainly_trained, tmp_path / "adapter", base)
    result = merge(adapter=adapter, base=None, output_dir=tmp_path / "merged")
    assert (result.verdict, result.onto) == ("equal", "opened"), result.notes
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    weights = packed.open_stored(base, stored_tensors(base))[0]
    full, factors = load_file(tiny_model / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    merged = {name: tensor.float() for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items()}
    scale = json.loads((adapter / "adapter_config.json").read_text())
    assert len(weights) == 14 and set(merged) == set(full)
    for name, weight in weights.items():
        off = (weight.load() - full[name]).norm() / full[name].norm()
        assert 0 < off < KINDS[kind][2], (name, off)
        stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        delta = scale["lora_alpha"] / scale["r"] * factors[f"{stem}B.weight"] @ factors[f"{stem}A.weight"]
        torch.testing.assert_close(merged[name], weight.load() + delta, rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match=r"is stored quantized .* there are no other weights to merge onto"):
        merge(adapter=adapter, base=None, output_dir=tmp_path / "other", onto="base")
    result = merge(adapter=adapter, base=str(tiny_model), output_dir=tmp_path / "full")
    assert result.verdict == "equal" and result.distance is not None and result.distance > 0
    assert "which rounding explains" in result.notes[0] and str(base) in result.notes[0]
    assert report_of(tmp_path / "full")["base_distance"] == pytest.approx(KINDS[kind][2], rel=0.9)


def test_bitsandbytes_itself_opens_the_same_weights(tmp_path: Path) -> None:
    """As transformers loads the folder, with layers of bitsandbytes."""
    tiny_llama(96, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "full")
    base = stored(tmp_path / "full", tmp_path / "base", "nf4")
    model = AutoModelForCausalLM.from_pretrained(base)
    weights = packed.open_stored(base, stored_tensors(base))[0]
    layers = dict(model.named_modules())
    for name, weight in weights.items():
        layer = layers[name.removesuffix(".weight")]
        by_library = bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        torch.testing.assert_close(weight.load(), by_library.float(), rtol=1e-2, atol=1e-3)


def test_another_full_precision_model(plainly_trained: Path, tiny_model: Path, tmp_path: Path) -> None:
    base = stored(tiny_model, tmp_path / "base", "nf4")
    adapter = moved(plainly_trained, tmp_path / "adapter", base)
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor.flip(0) for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="away, more than rounding explains"):
        merge(adapter=adapter, base=str(other), output_dir=tmp_path / "merged")


def test_codes_that_the_adapter_leaves_alone_stay(
    plainly_trained: Path, tiny_model: Path, title_rows: Path, tmp_path: Path
) -> None:
    """An adapter on the head of a base whose layers are stored in 4 bit: the merged model is stored so too."""
    base = stored(tiny_model, tmp_path / "base", "nf4")
    trained = short_sft(tiny_model, title_rows, tmp_path / "trained", lora_target_modules=["lm_head"])
    adapter = moved(trained, tmp_path / "adapter", base)
    result = merge(adapter=adapter, base=None, output_dir=tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    assert set(before) == set(after) and result.verdict == "equal"
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"lm_head.weight"}
    assert "quantization_config" in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_a_way_of_storing_that_is_not_opened(plainly_trained: Path, tiny_model: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    packed = {name.replace(".weight", ".qweight") if "_proj" in name else name: t for name, t in tensors.items()}
    save_file(packed, base / "model.safetensors", {"format": "pt"})
    facts = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (base / "config.json").write_text(json.dumps(facts))
    adapter = moved(plainly_trained, tmp_path / "adapter", base)
    with pytest.raises(ModelError, match=r"stored quantized \(gptq\) in a way that byeori does not open"):
        merge(adapter=adapter, base=None, output_dir=tmp_path / "merged")


def test_weights_of_training_are_those_of_its_layers(tiny_model: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    weight = load_file(tiny_model / "model.safetensors")[name]
    for bits in (4, 8):
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer = QuantizedLinear(linear, bits)
        expected = layer.dequantize(layer.quantize(weight))
        source = opened.as_trained(stored_tensors(tiny_model)[name], name, bits, torch.float32)
        assert torch.equal(source.load(), expected)
