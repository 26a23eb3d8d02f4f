"""Conversations that some template has made text of already."""

from __future__ import annotations

import datasets
import pytest

from byeori.data import chat_columns
from byeori.data.conversation import conversation
from byeori.data.rendered_text import rendered_turns
from byeori.data.row_kinds import ANSWER
from byeori.errors import TemplateError

TALK = [("system", "S"), ("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2")]
TEXTS = {
    "ChatML": "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in TALK),
    "Llama 3": "<|begin_of_text|>"
    + "".join(f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>" for role, text in TALK),
    "Llama 2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST] A2 </s>",
    "Phi 3": "".join(f"<|{role}|>\n{text}<|end|>\n" for role, text in TALK),
    "Zephyr": "".join(f"<|{role}|>\n{text}</s>\n" for role, text in TALK),
}
WITHOUT_SYSTEM = {
    "Guanaco": "### Human: Q1### Assistant: A1### Human: Q2### Assistant: A2",
    "HH-RLHF": "\n\nHuman: Q1\n\nAssistant: A1\n\nHuman: Q2\n\nAssistant: A2",
    "Mistral": "[INST] Q1 [/INST] A1</s>[INST] Q2 [/INST] A2</s>",
    "Gemma": "<bos>"
    + "".join(
        f"<start_of_turn>{'model' if role == 'assistant' else role}\n{text}<end_of_turn>\n" for role, text in TALK[1:]
    ),
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [(text, TALK) for text in TEXTS.values()] + [(text, TALK[1:]) for text in WITHOUT_SYSTEM.values()],
    ids=[*TEXTS, *WITHOUT_SYSTEM],
)
def test_turns(text: str, expected: list[tuple[str, str]]) -> None:
    assert [(turn["role"], turn["content"]) for turn in rendered_turns(text)] == expected
    read = conversation({"text": text})
    assert [message["content"] for message in read.messages] == [said for _, said in expected]
    assert [read.messages[at]["content"] for at in read.trained] == ["A1", "A2"]


@pytest.mark.parametrize(
    "text",
    [
        "Once upon a time",
        "",
        "Before. <|im_start|>user\nQ<|im_end|>",
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA",  # its end is missing
        "<|im_start|>user\nQ<|im_end|>\nbetween\n<|im_start|>assistant\nA<|im_end|>",
        "[INST] Q",
        "<s>" * 1000,
    ],
)
def test_other_text_is_left_alone(text: str) -> None:
    assert rendered_turns(text) == []


def test_a_table_is_read_as_chats_if_all_of_its_texts_are() -> None:
    texts = [*TEXTS.values(), *WITHOUT_SYSTEM.values()]
    assert ANSWER.choose_template(datasets.Dataset.from_dict({"text": texts})) == "chat"
    with pytest.raises(TemplateError, match="--text_column text"):
        ANSWER.choose_template(datasets.Dataset.from_dict({"text": [*texts, "Once upon a time"]}))


def test_a_text_beside_a_question_is_not_read() -> None:
    """Alpaca's `text` is the whole row once more; the audit names it as a column that nothing reads."""
    assert "text" in chat_columns.columns_read(["text"])
    assert "text" not in chat_columns.columns_read(["question", "reasoning", "answer", "text"])
    assert "answers" in chat_columns.columns_read(["query", "answers", "tools"])
    assert "answers" not in chat_columns.columns_read(["query", "answers", "response"])


@pytest.mark.parametrize("start", ["### Human:", "\n\nHuman:", "[INST]", "<s>", "<|user|>", "<start_of_turn>user\n"])
@pytest.mark.parametrize("rest", ["\n", " ", "###", "[INST]", "<<SYS>>", "<</SYS>>", "<s>", "\n\nHuman"])
def test_the_work_is_linear_in_the_text(start: str, rest: str) -> None:
    rendered_turns(start + rest * 200_000)
