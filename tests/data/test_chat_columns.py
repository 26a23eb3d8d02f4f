"""Conversations in other columns than `messages`, and columns beside a conversation that must not vanish."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

import kinds
from byeori.data import chat_columns
from byeori.data.conversation import conversation
from byeori.data.row_kinds import ANSWER
from byeori.data.template import resolve
from byeori.data.tokenize import encode_prompt, make_encoding
from byeori.errors import TemplateError
from chat_templates import CHATML
from chats import WEATHER, assistant, user

ALPACA = {"instruction": "What is the capital?", "input": "Korea", "output": "Seoul."}
ASKED = user("What is the capital?\nKorea")


def said(row: dict[str, Any]) -> list[dict[str, Any]]:
    keys = ("role", "content")
    return [{key: message[key] for key in keys} for message in conversation(row).messages]


def chosen(*rows: dict[str, Any]) -> str:
    return ANSWER.choose_template(datasets.Dataset.from_list(list(rows)))


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        (ALPACA, [ASKED, assistant("Seoul.")]),
        (
            ALPACA | {"system": "Be brief.", "history": [["Hi", "Hello."], ["Yes?", "No."]]},
            [
                {"role": "system", "content": "Be brief."},
                user("Hi"),
                assistant("Hello."),
                user("Yes?"),
                assistant("No."),
                ASKED,
                assistant("Seoul."),
            ],
        ),
        (
            ALPACA | {"input": "", "history": '[["Hi", "Hello."]]'},
            [user("Hi"), assistant("Hello."), user("What is the capital?"), assistant("Seoul.")],
        ),
        (
            {"prompt": "Q", "completion": "A", "history": [user("Hi"), assistant("Hello.")]},
            [user("Hi"), assistant("Hello."), user("Q"), assistant("A")],
        ),
        ({"question": "Q", "answer": "A"}, [user("Q"), assistant("A")]),
        ({"prompt": [user("Q")], "completion": "A"}, [user("Q"), assistant("A")]),
        ({"messages": "\n\nHuman: Q\n\nAssistant: A"}, [user("Q"), assistant("A")]),
    ],
)
def test_what_a_row_says(row: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    assert said(row) == messages
    read = conversation(row)
    assert all(read.messages[index]["role"] == "assistant" for index in read.trained)


def test_which_answers_are_trained() -> None:
    row = ALPACA | {"history": [["Hi", "Hello."]]}
    assert conversation(row).trained == (1, 3)
    assert conversation(row, train_turns="last").trained == (3,)
    assert conversation({"prompt": [user("Hi"), assistant("Hello."), user("Q")], "completion": "A"}).trained == (3,)


def test_reasoning_in_a_column_of_its_own() -> None:
    (_, answer) = conversation({"question": "Q", "reasoning": "R", "answer": "A"}).messages
    assert (answer["reasoning_content"], answer["content"]) == ("R", "A")


def test_a_row_without_its_answer_is_a_prompt() -> None:
    tokenizer = kinds.byte_level(chat=CHATML, gpt4=True)
    encoding = make_encoding(tokenizer, None, cutoff_len=99, add_eos_token=True, train_on_inputs=False)
    for row in (ALPACA, {**ALPACA, "output": None}):
        text = tokenizer.decode(encode_prompt(row, encoding))
        assert text == "<|im_start|>user\nWhat is the capital?\nKorea<|im_end|>\n<|im_start|>assistant\n"


def test_the_template_that_has_a_place_for_everything() -> None:
    assert chosen(ALPACA) == chosen(ALPACA | {"history": []}) == chosen(ALPACA | {"system": "Be brief."}) == "alpaca"
    assert chosen(ALPACA | {"history": [["Hi", "Hello."]]}) == "chat"
    assert chosen(ALPACA | {"tools": [WEATHER]}, ALPACA) == "chat"
    assert chosen({"prompt": "Q", "completion": "A"}) == "prompt-completion"
    assert chosen({"prompt": "Q", "completion": "A", "system": "Be brief."}) == "chat"
    assert chosen({"system": "Be brief.", "question": "Q", "answer": "A"}) == "question-answer"


def test_functions_are_tools_as_a_server_gets_them() -> None:
    row = {"messages": [user("Q"), assistant("A")]}
    assert conversation(row | {"functions": [WEATHER["function"]]}).tools == (WEATHER,)
    assert conversation(row | {"tools": [WEATHER["function"]]}).tools == (WEATHER,)
    assert conversation(row | {"tools": [WEATHER]}).tools == (WEATHER,)


TALK = {"messages": [user("Q1"), assistant("A1"), user("Q2"), assistant("A2")]}


@pytest.mark.parametrize(
    "beside",
    [
        {"history": [["Q0", "A0"]]},
        {"conversations": [{"from": "human", "value": "Q9"}]},
        {"prompt": "Q9"},
        {"reasoning": "because"},
        {"context": "Korea"},
        {"tool_calls": [{"name": "find"}]},
    ],
    ids=lambda beside: next(iter(beside)),
)
def test_a_column_beside_the_messages_that_is_not_in_them(beside: dict[str, Any]) -> None:
    name = next(iter(beside))
    with pytest.raises(
        TemplateError, match=f"^the column '{name}' looks like a part of the conversation, and the chat"
    ):
        conversation(TALK | beside)


@pytest.mark.parametrize("beside", [{"images": [{"path": "a.png"}]}, {"image": "a.png"}, {"audio": {"path": "a.wav"}}])
def test_a_column_of_images_beside_the_messages(beside: dict[str, Any]) -> None:
    name = next(iter(beside))
    with pytest.raises(TemplateError, match=f"^the column '{name}' is not text; byeori trains text alone, also on"):
        conversation(TALK | beside)
    assert conversation(TALK | {name: None}) == conversation(TALK)


def test_a_column_that_says_what_the_messages_say() -> None:
    copies = {"prompt": "Q1", "conversations": [{"from": "human", "value": "Q2 "}], "prompt_id": "7", "history": []}
    assert conversation(TALK | copies) == conversation(TALK)


def test_a_built_in_template_that_has_no_place_for_a_column() -> None:
    tokenizer, row = kinds.byte_level(gpt4=True), ALPACA | {"history": [["Hi", "Hello."]]}
    alpaca, own = (
        make_encoding(tokenizer, resolve(text), cutoff_len=99, add_eos_token=True, train_on_inputs=False)
        for text in ("alpaca", "{instruction}\n{output}")
    )
    with pytest.raises(
        TemplateError, match=r"^the column 'history' looks like a part .* and the template alpaca does not"
    ):
        ANSWER.encode(row, alpaca)
    assert ANSWER.encode(row, own)  # whoever writes a template chooses the columns


def test_a_history_that_is_no_list_of_pairs() -> None:
    with pytest.raises(TemplateError, match="the column `history` is not a list of pairs"):
        conversation(ALPACA | {"history": ["Hi", "Hello."]})
    assert not chat_columns.needs_chat({"messages": [], "history": [["Hi", "Hello."]]})


def test_a_system_prompt_that_is_no_text() -> None:
    with pytest.raises(TemplateError, match=r"the column `system` is not text \(a list\)"):
        conversation(TALK | {"system": [{"image": "x"}]})
