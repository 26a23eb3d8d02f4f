"""The card's lines for servers; benchmarks/served_exports.py runs vLLM itself on the same cases."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from byeori.artifacts import serving

PLAIN = {
    "peft_type": "LORA",
    "r": 16,
    "target_modules": ["q_proj", "down_proj"],
    "init_lora_weights": True,
    "bias": "none",
}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"use_rslora": True, "rank_pattern": {"q_proj": 64}, "init_lora_weights": "gaussian"}, ""),
        ({"target_modules": r".*\.(q|v)_proj"}, ""),
        ({"use_dora": True}, "DoRA"),
        ({"trainable_token_indices": [5]}, "tokens of the vocabulary"),
        ({"modules_to_save": ["embed_tokens"]}, r"whole layers \(embed_tokens\)"),
        ({"bias": "lora_only"}, "biases"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": r"(.*\.q_proj|.*\.embed_tokens)"}, "embed_tokens"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
        ({"r": 8, "rank_pattern": {"q_proj": 1024}}, "rank 1024 is above 512"),
        ({"layer_replication": [[0, 1]]}, "replicates"),
    ],
)
def test_what_vllm_refuses(changes: dict[str, Any], reason: str) -> None:
    found = serving.vllm_refuses(PLAIN | changes)
    assert (reason == "") == (found == "")
    assert found == "" or re.search(reason, found)


@pytest.mark.parametrize(("rank", "fitting"), [(1, 1), (2, 8), (16, 16), (17, 32), (300, 320), (512, 512)])
def test_the_rank_that_vllm_accepts(rank: int, fitting: int, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(PLAIN | {"rank_pattern": {"q_proj": rank}, "r": 1}))
    assert serving.vllm_rank(tmp_path) == fitting


def test_lines_name_the_columns_of_the_template(tmp_path: Path) -> None:
    (tmp_path / "template.txt").write_text("{context}\n[[{system}\n]]{question}\n{answer}")
    (tmp_path / "tokenizer.json").write_text("{}")
    text = serving.usage(tmp_path, "me/x", "me/base", PLAIN, {})
    assert '"messages": [{"role": "user", "content": "..."}], "chat_template_kwargs": {"context": "..."}' in text
    assert 'messages, context="...", add_generation_prompt=True' in text
    assert "curl localhost:8000/v1/chat/completions" in text
    assert "vllm serve me/base --tokenizer me/x --enable-lora --max-lora-rank 16 --lora-modules tuned=me/x\n" in text
    (tmp_path / "generation_config.json").write_text("{}")
    assert "--generation-config me/x " in serving.usage(tmp_path, "me/x", "me/base", PLAIN, {})


def test_lines_of_an_export(tmp_path: Path) -> None:
    exported = {"format": "ollama", "files": {"b-BF16.gguf": 1, "a-lora.gguf": 1, "Modelfile": 1}}
    text = serving.usage(tmp_path, "me/My-Titles", "b", PLAIN, exported)
    assert "llama-server -m b-BF16.gguf --lora a-lora.gguf --jinja" in text
    assert "ollama create my-titles -f Modelfile" in text and "vllm" not in text
    assert "/v1/completions" in text  # neither a template nor a chat template is known


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, "AutoModelForCausalLM"),
        (
            {"model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"]},
            "AutoModelForImageTextToText",
        ),
        ({"model_type": "llava"}, "AutoModelForImageTextToText"),
        ({"model_type": "of_next_year", "architectures": ["NewForText"]}, "AutoModelForCausalLM"),
        ({}, "AutoModelForCausalLM"),
    ],
)
def test_the_class_that_loads_it(config: dict[str, Any], kind: str, tmp_path: Path) -> None:
    text = serving.usage(tmp_path, "me/x", "me/base", PLAIN, {}, config)
    assert f"from transformers import {kind}, AutoTokenizer" in text
    assert f'model = {kind}.from_pretrained("me/base", dtype="auto")' in text
