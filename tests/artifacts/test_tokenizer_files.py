"""Tokenizer files leave byte for byte, and a folder without config.json is read as the base is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import byeori
from byeori.artifacts import tokenizer_files
from tiny_models import byte_level_tokenizer, short_sft, tiny_llama

TEXT = "마을 도서관 앞, don't 3.14\n\n  <|im_end|>x"
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base as others save it: other indents, a tokenizer.model, a chat template inside tokenizer_config.json."""
    folder, tokenizer = tmp_path / "base", byte_level_tokenizer()
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=7))
    (folder / "tokenizer.json").write_text(json.dumps(json.loads((folder / "tokenizer.json").read_text()), indent=1))
    (folder / "tokenizer.model").write_bytes(b"\x00sentencepiece")
    (folder / "special_tokens_map.json").write_text('{"eos_token":   "<|endoftext|>"}')
    (folder / "LICENSE").write_text("terms")
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()), indent=5))
    (folder / "generation_config.json").write_text('{"eos_token_id": 0,   "temperature": 0.6}')
    return folder


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=7))


def same(one: Path, other: Path, *names: str) -> None:
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_files_of_adapter_and_merged_model_are_the_bases(base: Path, title_rows: Path, tmp_path: Path) -> None:
    adapter = short_sft(base, title_rows, tmp_path / "adapter")
    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json")
    same(base, adapter, *files)
    same(base, adapter / "checkpoint-1", *files)
    byeori.merge(peft_model_path=adapter, output_dir=tmp_path / "merged")
    same(base, tmp_path / "merged", *files, "config.json", "generation_config.json", "LICENSE")
    same(adapter, tmp_path / "merged", "chat_template.jinja")
    assert "{%- for message in messages -%}" in AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template


def test_adapter_whose_tokenizer_was_saved_again(base: Path, title_rows: Path, tmp_path: Path) -> None:
    """As TRL and older versions write it; the merged model has the base's files and the adapter's chat template."""
    adapter = short_sft(base, title_rows, tmp_path / "adapter")
    template = (adapter / "chat_template.jinja").read_text(encoding="utf-8")
    AutoTokenizer.from_pretrained(adapter).save_pretrained(adapter)
    (adapter / "tokenizer.model").unlink()
    assert (adapter / "tokenizer.json").read_bytes() != (base / "tokenizer.json").read_bytes()
    byeori.merge(peft_model_path=adapter, output_dir=tmp_path / "merged", verify=False)
    same(base, tmp_path / "merged", "tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    assert (tmp_path / "merged" / "chat_template.jinja").read_text(encoding="utf-8") == template


def test_tokens_of_the_adapters_own_stay(base: Path, title_rows: Path, tmp_path: Path) -> None:
    adapter = short_sft(base, title_rows, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(adapter)
    byeori.merge(peft_model_path=adapter, output_dir=tmp_path / "merged", verify=False)
    same(adapter, tmp_path / "merged", "tokenizer.json")


def test_the_chat_template_replaces_every_other_one(base: Path, title_rows: Path, tmp_path: Path) -> None:
    """llama.cpp's converter prefers the one in tokenizer_config.json, transformers the file."""
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "rag.jinja").write_text("rag")
    rewrite(base / "tokenizer_config.json", chat_template=CHAT)
    adapter = short_sft(base, title_rows, tmp_path / "adapter")
    served = (adapter / "chat_template.jinja").read_text(encoding="utf-8")
    assert json.loads((adapter / "tokenizer_config.json").read_text())["chat_template"] == served != CHAT
    assert not (adapter / "additional_chat_templates").exists()
    assert AutoTokenizer.from_pretrained(adapter).chat_template == served


def test_chat_templates_of_the_base_stay_where_they_are(base: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "왜?"}, {"role": "assistant", "content": "그냥"}]
    rows.write_text(json.dumps({"messages": turns}, ensure_ascii=False) + "\n", encoding="utf-8")
    rewrite(base / "tokenizer_config.json", chat_template=[{"name": "default", "template": CHAT}])
    shutil.copytree(base, tmp_path / "one")
    rewrite(tmp_path / "one" / "tokenizer_config.json", chat_template=CHAT)
    adapter = short_sft(tmp_path / "one", rows, tmp_path / "adapter")
    same(tmp_path / "one", adapter, "tokenizer_config.json")
    assert not (adapter / "chat_template.jinja").exists()
    assert tokenizer_files.chat_template_of(base) == {"default": CHAT}


@pytest.mark.parametrize("declared", ["LlamaTokenizerFast", "GPT2Tokenizer", None])
def test_a_class_that_only_the_models_config_puts_right(
    base: Path, title_rows: Path, tmp_path: Path, declared: str | None
) -> None:
    """DeepSeek-V3 declares a Llama tokenizer and ships byte-level BPE; read alone, that gives other ids."""
    path = base / "tokenizer_config.json"
    config = {name: value for name, value in json.loads(path.read_text()).items() if name != "tokenizer_class"}
    path.write_text(json.dumps(config | ({"tokenizer_class": declared} if declared else {})))
    ids = AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"]
    adapter = short_sft(base, title_rows, tmp_path / "adapter")
    assert AutoTokenizer.from_pretrained(adapter)(TEXT)["input_ids"] == ids
    byeori.merge(peft_model_path=adapter, output_dir=tmp_path / "merged", verify=False)
    same(base, tmp_path / "merged", "tokenizer_config.json")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")(TEXT)["input_ids"] == ids
