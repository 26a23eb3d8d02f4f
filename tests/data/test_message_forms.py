"""Messages as other interfaces and programs write them say the same as OpenAI's."""

from __future__ import annotations

from typing import Any

import pytest

from byeori.data.conversation import conversation
from byeori.errors import TemplateError

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Weather", "parameters": SCHEMA}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "서울"}}}
CANONICAL = {
    "tools": [TOOL],
    "messages": [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "Let me see.", "reasoning_content": "R", "tool_calls": [CALL]},
        {"role": "tool", "content": "맑음"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "A"},
    ],
}
BARE = {"name": "weather", "description": "Weather"}
FORMS = {
    "Anthropic": {
        "system": [{"type": "text", "text": "S", "cache_control": {"type": "ephemeral"}}],
        "tools": [BARE | {"input_schema": SCHEMA}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Q"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "R", "signature": "x"},
                    {"type": "text", "text": "Let me see."},
                    {"type": "tool_use", "id": "1", "name": "weather", "input": {"city": "서울"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "맑음"}]},
                    {"type": "text", "text": "And?"},
                ],
            },
            {"role": "assistant", "content": "A", "stop_reason": "end_turn"},
        ],
    },
    "Bedrock": {
        "system": [{"text": "S"}],
        "tools": [TOOL],
        "messages": [
            {"role": "user", "content": [{"text": "Q"}]},
            {
                "role": "assistant",
                "reasoning_content": "R",
                "content": [
                    {"text": "Let me see."},
                    {"toolUse": {"toolUseId": "1", "name": "weather", "input": {"city": "서울"}}},
                ],
            },
            {
                "role": "user",
                "content": [{"toolResult": {"toolUseId": "1", "content": [{"text": "맑음"}]}}, {"text": "And?"}],
            },
            {"role": "assistant", "content": [{"text": "A"}]},
        ],
    },
    "Gemini": {
        "systemInstruction": {"role": "system", "parts": [{"text": "S"}]},
        "tools": [{"functionDeclarations": [BARE | {"parameters": SCHEMA}]}],
        "contents": [
            {"role": "user", "parts": [{"text": "Q"}]},
            {
                "role": "model",
                "parts": [
                    {"text": "R", "thought": True},
                    {"text": "Let me see."},
                    {"functionCall": {"name": "weather", "args": {"city": "서울"}}},
                ],
            },
            {
                "role": "user",
                "parts": [{"functionResponse": {"name": "weather", "response": "맑음"}}, {"text": "And?"}],
            },
            {"role": "model", "parts": [{"text": "A"}]},
        ],
    },
    "Responses": {
        "system": "S",
        "tools": [{"type": "function", **BARE, "parameters": SCHEMA}],
        "messages": [
            {"role": "user", "content": [{"type": "input_text", "text": "Q"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "R"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me see."}]},
            {"type": "function_call", "call_id": "1", "name": "weather", "arguments": '{"city": "서울"}'},
            {"type": "function_call_output", "call_id": "1", "output": "맑음"},
            {"role": "user", "content": "And?"},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "A"}]},
        ],
    },
}


def bare(value: Any) -> Any:
    """A value without the numbers and names that link a result to its call."""
    if isinstance(value, dict):
        return {key: bare(item) for key, item in value.items() if key not in ("id", "tool_call_id")}
    return [bare(item) for item in value] if isinstance(value, (list, tuple)) else value


def without_names(messages: Any) -> Any:
    return [{key: value for key, value in bare(message).items() if key != "name"} for message in messages]


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str) -> None:
    found, expected = conversation(FORMS[form]), conversation(CANONICAL)
    assert without_names(found.messages) == without_names(expected.messages)
    assert found.trained == expected.trained == (2, 5)
    assert list(found.tools) == list(expected.tools)


def test_calls_keep_their_numbers() -> None:
    messages = conversation(FORMS["Anthropic"]).messages
    assert messages[2]["tool_calls"][0]["id"] == messages[3]["tool_call_id"] == "1"


def test_reasoning_before_a_call() -> None:
    items = [
        {"role": "user", "content": "Q"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "R"}]},
        {"type": "function_call", "name": "weather", "arguments": '{"city": "서울"}'},
    ]
    message = conversation({"messages": items}).messages[1]
    assert (message["reasoning_content"], message["tool_calls"]) == ("R", [CALL])


@pytest.mark.parametrize("summary", ["R", ["R"], [{"type": "summary_text", "text": "R"}]])
def test_no_reasoning_is_lost(summary: Any) -> None:
    said = {"role": "assistant", "reasoning_content": "earlier", "content": "A"}
    items = [{"role": "user", "content": "Q"}, {"type": "reasoning", "summary": summary}, said]
    assert conversation({"messages": items}).messages[1]["reasoning_content"] == "earlier\n\nR"
    with pytest.raises(TemplateError, match="message 2 has two different texts of reasoning"):
        conversation({"messages": [items[0], said | {"thinking": "later"}]})


@pytest.mark.parametrize(
    "item",
    [
        {"type": "reasoning", "summary": [3, None, {"text": 4}]},
        {"type": "reasoning", "content": {"text": 4}},
        {"type": "function_call", "name": 3},
        {"type": "function_call", "arguments": "("},
        {"role": "assistant", "content": [{"type": "tool_use"}]},
        {"role": "assistant", "content": [{"functionCall": {}}]},
        {"role": "assistant", "parts": "x"},
    ],
)
def test_what_cannot_be_read_is_an_error(item: dict[str, Any]) -> None:
    with pytest.raises(TemplateError):
        conversation({"messages": [{"role": "user", "content": "Q"}, item, {"role": "assistant", "content": "A"}]})


def test_answers_that_are_calls_as_in_xlam() -> None:
    row = {"query": "Q", "answers": '[{"name": "weather", "arguments": {"city": "서울"}}]', "tools": [TOOL]}
    assert conversation(row).messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_questions_and_answers_in_pairs() -> None:
    found = conversation({"conversation": [{"input": "Q1", "output": "A1"}, {"input": "Q2", "output": "A2"}]})
    assert [message["content"] for message in found.messages] == ["Q1", "A1", "Q2", "A2"]
    assert found.trained == (1, 3)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image", "source": {}}, "type 'image'"),
        ({"type": "redacted_thinking", "data": "x"}, "type 'redacted_thinking'"),
        ({"inlineData": {"data": "x"}}, "a part of type None"),
    ],
)
def test_what_is_no_text_is_named(part: dict[str, Any], words: str) -> None:
    with pytest.raises(TemplateError, match=words):
        conversation({"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "A"}]})
