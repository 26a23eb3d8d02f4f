"""Rows as people have them, read into one form; what cannot be read is named, never dropped."""

from __future__ import annotations

import json
from typing import Any

import pytest

from byeori.data.conversation import Conversation, conversation
from byeori.errors import TemplateError
from chats import CALL, WEATHER, assistant, user

PLAIN = ({"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"})
PARSED_CALL = {**CALL, "function": {"name": "weather", "arguments": {"city": "서울"}}}


def read(*messages: dict[str, Any], **row: Any) -> Conversation:
    return conversation({"messages": list(messages), **row})


# ---- shapes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("Q"), assistant("A")]},
        {"messages": json.dumps([user("Q"), assistant("A")])},
        {"messages": repr([user("Q"), assistant("A")])},  # as pandas writes it into a CSV file
        {"messages": [user("Q"), assistant("A", prefix=False, model="m", language="English", toxic=False)]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"conversation": [{"role": "User", "content": "Q"}, {"role": "Assistant", "content": "A"}]},
        {"dialog": [{"from": "user", "value": "Q"}, {"from": "bot", "value": "A"}]},
        {"messages": [user("Q"), {"role": "ai", "content": [{"type": "text", "text": "A"}]}]},
        {"messages": [{"role": "human", "content": ["Q"]}, {"role": "model", "content": "A"}]},
        {"messages": None, "conversations": [user("Q"), assistant("A")]},
        {"prompt": [user("Q")], "completion": [assistant("A")]},
        {"prompt": "Q", "completion": [assistant("A")]},
        {"prompt": [user("Q")], "completion": "A"},
        # Arrow gives every turn the keys of all
        {"messages": [user("Q") | {"tool_calls": None, "name": None}, assistant("A", weight=None, tool_calls=[])]},
    ],
)
def test_shapes(row: dict[str, Any]) -> None:
    assert conversation(row) == Conversation(messages=PLAIN, trained=(1,))


def test_a_prompt_of_messages_is_not_trained() -> None:
    row = {"prompt": [user("Q1"), assistant("A1"), user("Q2")], "completion": [assistant("A2")]}
    assert conversation(row).trained == (3,)


def test_numbers_and_booleans_are_text() -> None:
    assert [message["content"] for message in read(user("Q"), assistant(3), assistant(True)).messages[1:]] == [
        "3",
        "true",
    ]


# ---- which turns -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "trained"),
    [
        ({}, (1, 3)),
        ({"weight": 0}, (3,)),
        ({"weight": 1}, (1, 3)),
        ({"loss": False}, (3,)),
        ({"loss": True}, (1, 3)),
        ({"train": False}, (3,)),
        ({"masked": True}, (3,)),
        ({"masked": False}, (1, 3)),
        ({"content": " "}, (3,)),
    ],
)
def test_keys_of_a_turn(keys: dict[str, Any], trained: tuple[int, ...]) -> None:
    assert read(user("Q1"), {**assistant("A1"), **keys}, user("Q2"), assistant("A2")).trained == trained


def test_the_last_turn_alone() -> None:
    row = {
        "messages": [user("Q1"), assistant("A1"), user("Q2"), assistant("A2"), user("Q3"), assistant("A3", weight=0)]
    }
    assert conversation(row, train_turns="all").trained == (1, 3)
    assert conversation(row, train_turns="last").trained == (3,)


# ---- system, reasoning, tools ------------------------------------------------------------------------------------


def test_the_system_column_goes_in_front() -> None:
    found = conversation({"conversations": [user("Q"), assistant("A")], "system": "S"})
    assert found.messages[0] == {"role": "system", "content": "S"}
    assert found.trained == (2,)
    same = conversation({"messages": [{"role": "system", "content": "S"}, user("Q"), assistant("A")], "system": "S"})
    assert same == found


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_under_every_name(key: str) -> None:
    message = read(user("Q"), assistant("A", **{key: "R"})).messages[1]
    assert message["reasoning_content"] == message["reasoning"] == message["thinking"] == "R"


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "weather", "arguments": {"city": "서울"}}}]},
        # Arrow's union of two calls' arguments
        {
            "role": "assistant",
            "tool_calls": [{**CALL, "function": {"name": "weather", "arguments": {"city": "서울", "day": None}}}],
        },
    ],
)
def test_calls(turn: dict[str, Any]) -> None:
    found = read(user("Q"), turn, {"role": "tool", "content": "맑음", "tool_call_id": "call12345"}, assistant("A"))
    assert found.messages[1] == {"role": "assistant", "content": "", "tool_calls": [PARSED_CALL]}
    assert found.messages[2] == {"role": "tool", "content": "맑음", "tool_call_id": "call12345"}
    assert found.trained == (1, 3)


def test_sharegpt_calls_and_observations() -> None:
    found = conversation(
        {
            "conversations": [
                {"from": "human", "value": "Q"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "서울"}}'},
                {"from": "observation", "value": '{"sky": "clear"}'},
                {"from": "gpt", "value": "A"},
            ],
            "tools": json.dumps([WEATHER]),
        }
    )
    assert [message["role"] for message in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert found.messages[1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "서울"}}
    assert found.tools == (WEATHER,)
    assert found.trained == (1, 3)


# ---- what cannot be read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([user("Q"), assistant("A", citations=["x"])], "message 2 has the key 'citations'"),
        ([{"content": "Q"}, assistant("A")], "message 1 has no role"),
        ([{"role": "narrator", "content": "Q"}, assistant("A")], "message 1 has the role 'narrator'"),
        ([user("Q"), {"role": "assistant"}], "message 2 has no content"),
        ([user("Q"), assistant({"text": "A"})], "message 2 has a content that is not text"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}, assistant("A")], "a part of type 'image'"),
        ([user("Q"), assistant("A", weight=2)], "message 2 has weight 2"),
        ([user("Q"), assistant("A", tool_calls="weather()")], "message 2 calls a tool"),
        ([user("Q"), assistant("A", tool_calls=[{"function": {"arguments": "{}"}}])], "calls a tool without a name"),
        ([], "the column `messages` is empty"),
        ("text", "the column `messages` is not a list"),
    ],
)
def test_what_cannot_be_read_is_named(messages: Any, words: str) -> None:
    with pytest.raises(TemplateError, match=words):
        conversation({"messages": messages})


def test_two_system_prompts() -> None:
    with pytest.raises(TemplateError, match="two different system prompts"):
        conversation({"messages": [{"role": "system", "content": "S"}, user("Q"), assistant("A")], "system": "T"})
