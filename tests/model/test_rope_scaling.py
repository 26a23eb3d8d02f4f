"""Scaled positions are those that transformers computes with the same config, and go where the weights go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import byeori
from byeori.artifacts import saved_model
from byeori.errors import ConfigError
from byeori.model import load, rope_scaling
from byeori.model.rope_scaling import Rope
from runs import settings

MORE = {"yarn": {"original_max_position_embeddings": 256}, "linear": {}, "dynamic": {}}
MORE["llama3"] = {"original_max_position_embeddings": 256, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def angles(config: Any, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, length, 8), torch.arange(length)[None])
    return cos, sin


@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic", "llama3"])
@pytest.mark.parametrize("old", [False, True], ids=["rope_parameters", "rope_theta"])
def test_angles_are_those_of_transformers(kind: str, old: bool) -> None:
    sizes: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 256}
    values = json.loads(LlamaConfig(**sizes).to_json_string(use_diff=False))
    if old:  # as transformers 4 wrote it
        values["rope_theta"] = values.pop("rope_parameters")["rope_theta"]
    found = LlamaConfig(**rope_scaling.scaled(values, Rope(kind=kind, factor=None, length=1024), "m"))
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0} | MORE[kind]
    longer = {} if kind == "dynamic" else {"max_position_embeddings": 1024}
    expected = LlamaConfig(**sizes | longer, rope_parameters=rope)
    for length in (100, 1024):
        for mine, theirs in zip(angles(found, length), angles(expected, length), strict=True):
            assert torch.equal(mine, theirs)
    assert not torch.equal(angles(found, 1024)[0], angles(LlamaConfig(**sizes), 1024)[0])
    assert load.positions_limit(found) == 1024


def test_only_full_attention_is_scaled_where_layers_differ() -> None:
    values = json.loads(Gemma3TextConfig(max_position_embeddings=512).to_json_string(use_diff=False))
    found = rope_scaling.scaled(values, Rope(kind="yarn", factor=2.0, length=800), "m")["rope_parameters"]
    assert found["full_attention"]["rope_type"] == "yarn"
    assert found["sliding_attention"] == values["rope_parameters"]["sliding_attention"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"n_positions": 8}, "has no rotary positions to scale"),
        (
            {"max_position_embeddings": 8, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            r"is scaled already \(llama3\)",
        ),
        ({"max_position_embeddings": 4096, "rope_theta": 1e4}, "has 4096 positions and cutoff_len is 1024; leave it"),
    ],
)
def test_what_cannot_be_scaled(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        rope_scaling.scaled(values, Rope(kind="yarn", factor=None, length=1024), "m")


def test_a_run_beyond_the_models_length(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    """The adapter names its own base, and answers with scaled positions; the merged model has them in its config."""
    limit = json.loads((tiny_model / "config.json").read_text())["max_position_embeddings"]
    long = {"cutoff_len": 2 * limit, "max_steps": 2}
    with pytest.raises(ConfigError, match="or train longer rows with --rope_scaling yarn"):
        byeori.sft(**settings(tiny_model, title_rows, tmp_path / "short", **long))
    output = tmp_path / "out"
    byeori.sft(**settings(tiny_model, title_rows, output, **long, rope_scaling="yarn", revision="v1"))
    adapter = json.loads((output / "adapter_config.json").read_text())
    assert adapter["revision"] == "v1"
    record = json.loads((output / "byeori_base.json").read_text())
    assert adapter["base_model_name_or_path"] == record["base_model"] == str(tiny_model)
    byeori.merge(peft_model_path=str(output), output_dir=str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": limit}
    assert {name: merged.config.rope_parameters[name] for name in rope} == rope
    config = AutoConfig.from_pretrained(tiny_model)
    config.rope_parameters = {**config.rope_parameters, **rope}
    base = AutoModelForCausalLM.from_pretrained(tiny_model, config=config, dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, str(output)).eval()
    mine = saved_model.load_weights(saved_model.find(str(output)), "float32", torch.device("cpu"))
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in (expected, mine, merged.eval())]
        plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()(input_ids=ids).logits
    assert torch.allclose(logits[0], logits[1], atol=1e-5)
    assert torch.allclose(logits[0], logits[2], atol=1e-4)
    assert not torch.allclose(logits[0], plain, atol=1e-3)


def test_an_adapter_trained_further_keeps_its_positions(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    """Also with another cutoff_len."""
    limit = json.loads((tiny_model / "config.json").read_text())["max_position_embeddings"]
    first, second = tmp_path / "first", tmp_path / "second"
    long = {"cutoff_len": 2 * limit, "rope_scaling": "yarn"}
    byeori.sft(**settings(tiny_model, title_rows, first, max_steps=1, **long))
    further = settings(first, title_rows, second, max_steps=1, cutoff_len=limit)
    byeori.sft(**{name: value for name, value in further.items() if not name.startswith("lora_")})
    found = [saved_model.find(str(folder)) for folder in (first, second)]
    assert found[0].base == found[1].base
    assert found[1].max_length == 2 * limit
