"""Trained turns against what transformers sends for the same messages, with the chat templates of today's models."""

from __future__ import annotations

from typing import Any

import pytest

import chats
from byeori.data import chat
from byeori.data.conversation import conversation
from byeori.data.turns import Turn, prompt, turns
from byeori.errors import TemplateError
from chats import assistant, user
from tiny_models import byte_level_tokenizer

TEMPLATES = chats.shipped_templates()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """With the end tokens that templates write as tokens of its own."""
    made = byte_level_tokenizer(bos_token="<s>")
    made.add_special_tokens({"additional_special_tokens": ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]})
    return made


def turns_of(tokenizer: Any, template: str, *messages: dict[str, Any], **row: Any) -> list[Turn]:
    tokenizer.chat_template = TEMPLATES.get(template, template)
    return turns(conversation({"messages": list(messages), **row}), tokenizer)


def answers(tokenizer: Any, template: str, *messages: dict[str, Any], **row: Any) -> list[str]:
    return [turn.answer for turn in turns_of(tokenizer, template, *messages, **row)]


# ---- prompts are what is served ----------------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_prompt_is_what_transformers_sends(template: str, tokenizer: Any) -> None:
    """Random conversations with whatever the template shows: turn by turn, the text of apply_chat_template."""
    tokenizer.chat_template = TEMPLATES[template]
    shows = {name: _trainable(tokenizer, row) for name, row in chats.CONVERSATIONS.items()}
    assert shows["one turn"] and shows["several turns"]
    for seed in range(20):
        row = chats.random_conversation(
            seed, system=shows["system"], tools=shows["tools"], reasoning=shows["reasoning"]
        )
        read = conversation(row)
        found = turns(read, tokenizer)
        assert len(found) == len(read.trained)
        for turn in found:
            assert turn.prompt in _served(tokenizer, row, turn.number - 1)
            assert turn.answer


def _trainable(tokenizer: Any, row: dict[str, Any]) -> bool:
    try:
        return bool(turns(conversation(row), tokenizer))
    except TemplateError:
        return False


def _served(tokenizer: Any, row: dict[str, Any], count: int) -> list[str]:
    """What servers send: contents as text or as parts, arguments as objects or as text, whatever the template reads."""
    found = []
    for parts in (False, True):
        for empty in ("", None):
            for parsed in (True, False):
                messages = [_message(message, parts, empty, parsed) for message in row["messages"][:count]]
                try:
                    text = tokenizer.apply_chat_template(
                        messages, tools=row.get("tools"), tokenize=False, add_generation_prompt=True
                    )
                except Exception:  # this form is not the template's
                    continue
                found.append(text)
    return found


def _message(message: dict[str, Any], parts: bool, empty: str | None, parsed: bool) -> dict[str, Any]:
    import json

    out = dict(message)
    if out.get("reasoning_content"):
        out |= {"thinking": out["reasoning_content"], "reasoning": out["reasoning_content"]}
    out["content"] = [{"type": "text", "text": out["content"]}] if parts else out["content"] or empty
    if "tool_calls" in out and parsed:
        out["tool_calls"] = [
            call | {"function": call["function"] | {"arguments": json.loads(call["function"]["arguments"])}}
            for call in out["tool_calls"]
        ]
    return out


# ---- answers, by hand --------------------------------------------------------------------------------------------

TWO = (user("Q1"), assistant("A1"), user("Q2"), assistant("A2"))
REASONED = (user("Q1"), assistant("A1", reasoning_content="R1"))
INLINE = (user("Q1"), assistant("<think>\nR1\n</think>\n\nA1"))


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        ("llama3", TWO, ["A1<|eot_id|>", "A2<|eot_id|>"]),
        ("gemma3", TWO, ["A1<end_of_turn>", "A2<end_of_turn>"]),
        # a history without the reasoning that the last turn has
        ("qwen3", TWO, ["<think>\n\n</think>\n\nA1<|im_end|>", "<think>\n\n</think>\n\nA2<|im_end|>"]),
        ("qwen3", REASONED, ["<think>\nR1\n</think>\n\nA1<|im_end|>"]),
        ("qwen3", INLINE, ["<think>\nR1\n</think>\n\nA1<|im_end|>"]),
        # another end of the turn in history (<|end|>) than where generation stops
        ("gptoss", TWO, ["<|channel|>final<|message|>A1<|return|>", "<|channel|>final<|message|>A2<|return|>"]),
        (
            "gptoss",
            REASONED,
            [
                "<|channel|>analysis<|message|>R1<|end|><|start|>assistant<|channel|>final<|message|>A1<|return|>",
            ],
        ),
        # the prompt opens the reasoning, which the finished turn closes on another line
        ("nemotron_3_nano", TWO, ["</think>A1<|im_end|>", "</think>A2<|im_end|>"]),
        ("nemotron_3_nano", REASONED, ["R1\n</think>\nA1<|im_end|>"]),
        ("qwen3_5_think", TWO, ["\n</think>\n\nA1<|im_end|>", "\n</think>\n\nA2<|im_end|>"]),
        # the prompt opens the reasoning, which the template drops
        (
            "deepseek_r1_distill",
            TWO,
            ["\n</think>\n\nA1<｜end▁of▁sentence｜>", "\n</think>\n\nA2<｜end▁of▁sentence｜>"],
        ),
        ("deepseek_r1_distill", REASONED, ["R1\n</think>\n\nA1<｜end▁of▁sentence｜>"]),
        ("deepseek_r1_distill", INLINE, ["R1\n</think>\n\nA1<｜end▁of▁sentence｜>"]),
        # the prompt closes the reasoning
        ("qwen3_5_nothink", TWO, ["A1<|im_end|>", "A2<|im_end|>"]),
        # no end token at all
        ("glm4moe", TWO, ["\n<think></think>\nA1", "\n<think></think>\nA2"]),
        # the next turn is always opened
        (chats.ALWAYS_OPEN, TWO, ["A1<|eot_id|>", "A2<|eot_id|>"]),
        (chats.ALWAYS_OPEN, (user("Is it blue."), assistant("It is blue.")), ["It is blue.<|eot_id|>"]),
    ],
)
def test_answers(template: str, messages: tuple[dict[str, Any], ...], expected: list[str], tokenizer: Any) -> None:
    assert answers(tokenizer, template, *messages) == expected


def test_a_call_is_trained_and_its_result_is_not(tokenizer: Any) -> None:
    row = chats.CONVERSATIONS["tools"]
    found = turns_of(tokenizer, "qwen3_instruct_2507", *row["messages"], tools=row["tools"])
    assert [turn.number for turn in found] == [2, 4]
    assert found[0].answer == '<tool_call>\n{"name": "weather", "arguments": {"city": "서울"}}\n</tool_call><|im_end|>'
    assert found[1].answer == "A1<|im_end|>"
    assert "맑음" in found[1].prompt and "weather" in found[0].prompt


# ---- nothing vanishes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "case", "words"),
    [
        ("llama3", "reasoning", "leaves out the reasoning of message 2"),
        ("llama3", "tools", "does not show the tool 'weather'"),
        ("lfm2", "tools", "leaves out the call of 'weather' in message 2"),
        ("gemma", "system", "System role not supported"),
        ("qwen3_5_nothink", "reasoning", "message 2 has reasoning, and the chat template's prompt ends the reasoning"),
        ("qwen2_5_vl", "tools", "does not show the tool 'weather'"),
        ("{% for m in messages %}{{ m.role }}: {% endfor %}", "one turn", "leaves out the text of message 1"),
    ],
)
def test_what_a_template_leaves_out_is_named(template: str, case: str, words: str, tokenizer: Any) -> None:
    row = chats.CONVERSATIONS[case]
    with pytest.raises(TemplateError, match=words):
        turns_of(tokenizer, template, *row["messages"], **{k: v for k, v in row.items() if k != "messages"})


def test_a_template_that_reads_parts_gets_parts(tokenizer: Any) -> None:
    """Idefics 3 writes nothing for a content that is text."""
    (turn,) = turns_of(tokenizer, "idefics3", user("Q1"), assistant("A1"))
    assert "User:Q1" in turn.prompt.replace(" ", "") and turn.answer.strip().startswith("A1")


def test_the_prompt_alone(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATES["qwen3"]
    read = conversation({"messages": [user("Q1"), assistant("A1"), user("Q2")]})
    assert prompt(read, tokenizer) == tokenizer.apply_chat_template(
        list(read.messages), tokenize=False, add_generation_prompt=True
    )
    chat.set_template(tokenizer, None, {"enable_thinking": False})
    off = prompt(read, tokenizer)
    assert off.endswith("<think>\n\n</think>\n\n")
