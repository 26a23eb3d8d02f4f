"""Adapters of PEFT's other kinds, against PEFT's own merge_and_unload and its unmerged model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel

from byeori.errors import ModelError
from byeori.export.merge import MergeResult, merge
from tiny_models import tiny_llama

IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35]])


def llama(**changes: Any) -> Any:
    return tiny_llama(96, **changes)


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def gemma() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **heads, initializer_range=0.2))


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(IDS).logits.float()


def pair(tmp_path: Path, model: Any, *, rows: int | None = None, **lora: Any) -> tuple[Path, Path]:
    """The folders of a base and of an adapter whose weights are not zero."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model.save_pretrained(base)
    loaded = AutoModelForCausalLM.from_pretrained(base)
    if rows:
        loaded.resize_token_embeddings(rows)
    torch.manual_seed(1)
    tuned = get_peft_model(loaded, LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": "all-linear"} | lora))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    tuned.save_pretrained(adapter)
    return base, adapter


def peft(base: Path, adapter: Path, rows: int | None = None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return PeftModel.from_pretrained(model, adapter)


def check(tmp_path: Path, base: Path, adapter: Path, *, rows: int | None = None, unload: bool = True) -> MergeResult:
    result = merge(adapter=adapter, base=str(base), output_dir=tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(result.output_dir)
    tuned = peft(base, adapter, rows)
    expected = logits(tuned)
    plain = logits(AutoModelForCausalLM.from_pretrained(base))
    assert (expected[..., :96] - plain[..., :96]).abs().max() > 0.05
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    if unload:
        torch.testing.assert_close(logits(merged), logits(tuned.merge_and_unload()), rtol=1e-5, atol=1e-5)
    assert result.verdict == "equal", result.notes
    return result


@pytest.mark.parametrize(
    ("make", "lora"),
    [
        (llama, {"use_dora": True}),
        (llama, {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}}),
        (gpt2, {"use_dora": True, "target_modules": ["c_attn", "c_fc", "wpe"]}),
        (llama, {"use_dora": True, "target_modules": ["embed_tokens", "v_proj"]}),
        (gpt2, {"fan_in_fan_out": True, "target_modules": ["c_attn"], "bias": "all"}),
        (llama, {"trainable_token_indices": [3, 26, 5]}),
        (gemma, {"trainable_token_indices": [3, 26]}),
        (llama, {"trainable_token_indices": {"lm_head": [1, 7], "embed_tokens": [3]}}),
        (llama, {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or re.sub(r"\W+", "-", str(value)),
)
def test_kinds(tmp_path: Path, make: Any, lora: dict[str, Any]) -> None:
    check(tmp_path, *pair(tmp_path, make(), **lora))


def test_a_bias_in_lora_b(tmp_path: Path) -> None:
    biased = {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}
    check(tmp_path, *pair(tmp_path, llama(attention_bias=True), **biased))
    base, adapter = pair(tmp_path / "two", llama(), **biased)
    with pytest.raises(ModelError, match=r"has no bias in .* that it could be added to"):
        merge(adapter=adapter, base=str(base), output_dir=tmp_path / "other")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    ],
    ids=["saved", "modules_to_save", "adapted"],
)
def test_a_longer_vocabulary(tmp_path: Path, lora: dict[str, Any], tied: bool) -> None:
    base, adapter = pair(tmp_path, llama(tie_word_embeddings=tied), rows=100, **lora)
    result = check(tmp_path, base, adapter, rows=100, unload=not (tied and lora))
    assert json.loads((result.output_dir / "config.json").read_text())["vocab_size"] == 100
    assert logits(AutoModelForCausalLM.from_pretrained(result.output_dir)).shape[-1] == 100
    assert result.untied == bool(tied and lora) and bool(result.notes) == result.untied


def test_a_longer_vocabulary_of_the_embedding_alone(tmp_path: Path) -> None:
    base, adapter = pair(tmp_path, llama(), rows=100)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors.pop("base_model.model.lm_head.weight")
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="the vocabulary was extended for one of them only"):
        merge(adapter=adapter, base=str(base), output_dir=tmp_path / "merged")


def test_the_adapters_name_in_its_keys(tmp_path: Path) -> None:
    """As a state dict has them that was not saved by PEFT; PEFT itself would not load a single one of them."""
    base, adapter = pair(tmp_path, llama(), trainable_token_indices=[3], modules_to_save=["lm_head"])
    expected = logits(peft(base, adapter))
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    named = {}
    for key, tensor in tensors.items():
        key = re.sub(r"\.(lora_[AB])\.", r".\1.default.", key)
        key = re.sub(r"trainable_tokens_delta$", "trainable_tokens_delta.default", key)
        named[re.sub(r"lm_head\.weight$", "lm_head.modules_to_save.default.weight", key)] = tensor
    assert not set(named) & set(tensors)
    save_file(named, path)
    result = merge(adapter=adapter, base=str(base), output_dir=tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(result.output_dir)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    assert result.verdict == "equal"


def test_alpha_of_zero_and_defaults(tmp_path: Path) -> None:
    base, adapter = pair(tmp_path, llama(), lora_alpha=0)
    merge(adapter=adapter, base=str(base), output_dir=tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    shutil.rmtree(base), shutil.rmtree(adapter), shutil.rmtree(tmp_path / "merged")
    base, adapter = pair(tmp_path, llama(), r=8, lora_alpha=8)
    config = json.loads((adapter / "adapter_config.json").read_text())
    del config["r"], config["lora_alpha"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    check(tmp_path, base, adapter)
