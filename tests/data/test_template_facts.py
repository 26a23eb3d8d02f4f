"""What chat templates do with a conversation, against what is known of the models."""

from __future__ import annotations

from typing import Any

import pytest

import chats
from byeori.data.template_facts import TemplateFacts, template_facts
from tiny_models import byte_level_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_level_tokenizer(bos_token="<s>")


def facts(tokenizer: Any, template: str) -> TemplateFacts:
    tokenizer.chat_template = chats.shipped_templates().get(template, template)
    return template_facts(tokenizer)


@pytest.mark.parametrize(
    ("template", "trained", "later"),
    [
        ("qwen3", "<think>\nR1\n</think>\n\nA1<|im_end|>", "A1<|im_end|>"),
        ("qwen3_5_nothink", "<think>\n\n</think>\n\nA1<|im_end|>", "A1<|im_end|>"),
        (
            "gptoss",
            "<|channel|>analysis<|message|>R1<|end|><|start|>assistant<|channel|>final<|message|>A1<|return|>",
            "<|channel|>final<|message|>A1<|end|>",
        ),
        ("nemotron_3_nano", "\nR1\n</think>\nA1<|im_end|>", "</think>\nA1<|im_end|>"),
        ("deepseek_r1_distill", "<think>\nR1\n</think>\n\nA1<｜end▁of▁sentence｜>", "A1<｜end▁of▁sentence｜>"),
    ],
)
def test_history_that_is_rewritten(template: str, trained: str, later: str, tokenizer: Any) -> None:
    found = facts(tokenizer, template)
    assert (found.trained, found.later, found.rewrites) == (trained, later, True)
    assert found.sentences()[0].startswith(
        f"The chat template rewrites earlier answers ({trained!r} is {later!r} in later prompts)"
    )


def test_history_that_is_kept(tokenizer: Any) -> None:
    found = facts(tokenizer, "gemma3")
    assert not found.rewrites
    assert found.shown == {
        "one turn": True,
        "several turns": True,
        "system": True,
        "reasoning": False,
        "tools": False,
    }
    assert found.sentences() == [
        "The chat template keeps earlier answers as they were trained: turns share their history. It shows system "
        "prompts. It refuses or leaves out tools and calls, reasoning"
    ]
    assert "It shows system prompts, tools and calls, reasoning" in facts(tokenizer, "qwen3").sentences()[0]


def test_a_template_for_other_rows(tokenizer: Any) -> None:
    found = facts(tokenizer, "{% for message in messages %}{{ message.title }}{% endfor %}")
    assert not any(found.shown.values()) and not found.rewrites
