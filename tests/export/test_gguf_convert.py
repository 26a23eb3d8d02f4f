"""Scaled positions in GGUF: llama.cpp's log-probs are those of transformers, or the export is refused."""

from __future__ import annotations

import math
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from byeori.errors import ModelError
from byeori.export import gguf_convert
from byeori.export.llama_cpp import LlamaCpp
from byeori.model import rope_scaling
from byeori.model.rope_scaling import Rope
from tiny_models import byte_level_tokenizer, tiny_llama


def last_logprobs(folder: Path, ids: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_equal_to_transformers(kind: str, tmp_path: Path) -> None:
    tokenizer, plain_folder = byte_level_tokenizer(), tmp_path / "base"
    tiny_llama(len(tokenizer)).save_pretrained(plain_folder)
    tokenizer.save_pretrained(plain_folder)
    folder = rope_scaling.view(plain_folder, Rope(kind=kind, factor=4.0, length=0), "tiny")
    gguf_convert.write_model(folder, tmp_path / "model.gguf", "f32")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    if kind != "llama3":  # whose factors are a tensor
        assert fields["llama.rope.scaling.type"].contents() == kind
        assert fields["llama.rope.scaling.factor"].contents() == 4.0
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 200, (200,), generator=generator).tolist()
    # a token that is part of a character has no log-probs of its own
    while "\ufffd" in tokenizer.decode([int(last_logprobs(folder, ids).argmax())]):
        ids.pop()
    expected, plain = last_logprobs(folder, ids), last_logprobs(plain_folder, ids)
    server = LlamaCpp(tmp_path / "model.gguf", context=512, threads=1, wide_cache=True)
    body = {"prompt": ids, "n_predict": 1, "n_probs": 20, "ignore_eos": True, "temperature": 0.0}
    found = server.post("/completion", body)["completion_probabilities"][0]["top_logprobs"]
    assert len(found) == 20
    for each in found:
        assert each["logprob"] == pytest.approx(float(expected[each["id"]]), abs=5e-3)
    assert max(abs(each["logprob"] - float(plain[each["id"]])) for each in found) > 2e-2
    assert all(math.isfinite(each["logprob"]) for each in found)


@pytest.mark.parametrize("kind", ["llama3", "dynamic"])
def test_refused_where_the_converter_leaves_them_out(kind: str, tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=8, **sizes)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    folder = rope_scaling.view(tmp_path / "base", Rope(kind=kind, factor=2.0, length=0), "tiny")
    with pytest.raises(ModelError, match=rf"has scaled positions \({kind}\), which llama.cpp's converter leaves out"):
        gguf_convert.write_model(folder, tmp_path / "model.gguf", "f32")
