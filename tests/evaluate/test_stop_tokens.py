"""Answers end where the trained turns ended, even if that is not the tokenizer's end-of-text token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import byeori
from byeori.commands import _rows as rows
from byeori.data.chat import turn_end
from byeori.errors import ModelError
from byeori.evaluate import stop_tokens
from tiny_models import byte_level_tokenizer, tiny_llama

TURNS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def turning(chat: str | None = TURNS) -> Any:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = chat
    return tokenizer


@pytest.mark.parametrize(
    ("chat", "expected"),
    [
        (TURNS, "<|im_end|>"),
        (TURNS.replace("<|im_end|>", "{{ eos_token }}"), "eos"),
        (TURNS.replace("<|im_end|>", " (over)"), None),
        ("{% for message in messages %}{{ message.title }}{% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
        (None, None),
    ],
)
def test_the_token_behind_a_turn(chat: str | None, expected: str | None) -> None:
    tokenizer = turning(chat)
    wanted = tokenizer.eos_token if expected == "eos" else expected
    assert turn_end(tokenizer) == (None if wanted is None else tokenizer.convert_tokens_to_ids(wanted))


def test_all_configured_tokens_count() -> None:
    tokenizer = turning()
    own = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert set(stop_tokens.stop_ids(tokenizer, [1, 7])) == own | {1, 7}
    assert set(stop_tokens.stop_ids(tokenizer, 7)) == own | {7}
    assert set(stop_tokens.stop_ids(tokenizer, None)) == own


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base whose end-of-text token ends no turn, and an adapter trained on turns."""
    folder = tmp_path_factory.mktemp("talking")
    tokenizer = turning()
    model = tiny_llama(len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    turns = [{"role": "user", "content": "안녕?"}, {"role": "assistant", "content": "네, 봄이에요."}]
    (folder / "rows.jsonl").write_text(f"{json.dumps({'messages': turns}, ensure_ascii=False)}\n" * 4, encoding="utf-8")
    byeori.sft(
        base_model=folder / "base",
        data_path=folder / "rows.jsonl",
        output_dir=folder / "adapter",
        cutoff_len=128,
        max_steps=40,
        num_epochs=40,
        batch_size=4,
        learning_rate=3e-2,
        dtype="float32",
        lora_target_modules="all-linear",
    )
    byeori.merge(peft_model_path=folder / "adapter", output_dir=folder / "merged")
    return folder


def test_a_trained_turn_ends_the_answer(talking: Path) -> None:
    for name in ("adapter", "merged"):
        asked: dict[str, Any] = {"model": talking / name, "columns": {"prompt": "안녕?"}, "dtype": "float32"}
        assert byeori.generate(**asked, max_new_tokens=60) == ["네, 봄이에요."]


def test_others_find_the_token_in_the_merged_model(talking: Path) -> None:
    """transformers alone, with the chat template in the folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(talking / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(talking / "merged")
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "안녕?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        out = model.generate(**asked, max_new_tokens=60, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert tokenizer.decode(out) == "네, 봄이에요.<|im_end|>"
    before, after = (json.loads((talking / name / "generation_config.json").read_text()) for name in ("base", "merged"))
    assert after == {**before, "eos_token_id": stop_tokens.stop_ids(tokenizer, None)}


def test_notes_on_the_end_of_a_turn() -> None:
    """A tokenizer that names no end-of-text token has a note of its own."""
    tokenizer = turning()
    assert "an answer ends with <|im_end|>, not with <|endoftext|>" in rows._turn_end_notes(tokenizer, True)[0]
    open_ended = turning(TURNS.replace("<|im_end|>", " (over)"))
    assert rows._turn_end_notes(open_ended, True) == [
        "it ends a turn with no token, so <|endoftext|> is added after the last answer"
    ]
    assert rows._turn_end_notes(open_ended, False) == []
    assert rows._turn_end_notes(turning(TURNS.replace("<|im_end|>", "{{ eos_token }}")), True) == []
    for nameless in (tokenizer, open_ended):
        nameless.eos_token = None
        assert rows._turn_end_notes(nameless, True) == []


def test_preview_prints_the_note(talking: Path, capfd: pytest.CaptureFixture[str]) -> None:
    byeori.preview(base_model=talking / "base", data_path=talking / "rows.jsonl", cutoff_len=128)
    printed = " ".join(capfd.readouterr())
    assert "an answer ends with <|im_end|>, not with" in " ".join(printed.split())


def test_a_conversation_is_compared_up_to_its_last_answer(talking: Path, tmp_path: Path) -> None:
    turns = json.loads((talking / "rows.jsonl").read_text(encoding="utf-8").splitlines()[0])["messages"]
    rows = tmp_path / "rows.jsonl"
    longer = {"messages": [*turns, {"role": "user", "content": "고마워요"}]}
    rows.write_text(json.dumps(longer, ensure_ascii=False) + "\n", encoding="utf-8")
    asked: dict[str, Any] = {"dtype": "float32", "max_new_tokens": 40}
    result = byeori.compare(adapter=talking / "adapter", data_path=rows, output_dir=tmp_path / "report", **asked)
    assert result.metrics["tuned"]["exact"] == 100
    assert result.metrics["tuned"]["stopped"] == 100


@pytest.mark.parametrize("value", ["</s>", {"a": 1}, [[2]], 1.5, 10**12, True])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_an_end_that_is_no_token_is_a_sentence(name: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps({"eos_token_id": value}), encoding="utf-8")
    with pytest.raises(ModelError, match="eos_token_id"):
        stop_tokens.configured(tmp_path)
