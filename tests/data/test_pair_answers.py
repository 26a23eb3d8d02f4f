"""Preference rows as the documentation of the tools and data sets shows them: one prompt, two answers."""

from __future__ import annotations

import json
from typing import Any

import datasets
import pytest

import kinds
from byeori.data import preference
from byeori.data.row_kinds import PREFERENCE
from byeori.data.template import resolve
from byeori.data.tokenize import make_encoding
from byeori.errors import TemplateError
from chat_templates import CHATML

Q, A, B = "What is the capital of Korea?", "Seoul.", "Busan, I think."
ASK, GOOD, BAD = ({"role": role, "content": text} for role, text in (("user", Q), ("assistant", A), ("assistant", B)))
SYSTEM = {"role": "system", "content": "Be brief."}
HUMAN = {"from": "human", "value": Q}
HH = "\n\nHuman: Hi\n\nAssistant: Hello. How can I help?\n\nHuman: " + Q + "\n\nAssistant:"
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "find", "arguments": "{}"}}]}


def pair(row: dict[str, Any], template: str | None = None) -> list[tuple[str, str]]:
    """(prompt, trained text) of both examples, by the template that the table of this row gets."""
    table = datasets.Dataset.from_list([row])
    chosen = resolve(template or PREFERENCE.choose_template(table))
    PREFERENCE.check_columns(table.column_names, chosen)
    tokenizer = kinds.byte_level(chat=CHATML, gpt4=True)
    encoding = make_encoding(tokenizer, chosen, cutoff_len=999, add_eos_token=False, train_on_inputs=False)
    return [
        (tokenizer.decode(example.token_ids[:start]), tokenizer.decode(example.token_ids[start:end]))
        for example in PREFERENCE.encode(table[0], encoding)
        for start, end in example.targets
    ]


def chatml(*messages: dict[str, Any]) -> str:
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
    return "".join(turns) + "<|im_start|>assistant\n"


CHATS: dict[str, tuple[dict[str, Any], str]] = {
    # HuggingFaceH4/ultrafeedback_binarized: `messages` are the chosen conversation again
    "ultrafeedback": (
        {
            "prompt": Q,
            "prompt_id": "f0e3",
            "chosen": [ASK, GOOD],
            "rejected": [ASK, BAD],
            "messages": [ASK, GOOD],
            "score_chosen": 8.5,
            "score_rejected": 3.0,
        },
        chatml(ASK),
    ),
    "trl, implicit": ({"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, chatml(ASK)),
    "trl, explicit": ({"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}, chatml(ASK)),
    "axolotl chat_template": ({"messages": [SYSTEM, ASK], "chosen": GOOD, "rejected": BAD}, chatml(SYSTEM, ASK)),
    "axolotl ultra": (
        {"system": "Be brief.", "prompt": Q, "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        chatml(SYSTEM, ASK),
    ),
    "axolotl argilla_chat": ({"chosen": [SYSTEM, ASK, GOOD], "rejected": [SYSTEM, ASK, BAD]}, chatml(SYSTEM, ASK)),
    "axolotl prompt_pairs": (
        {"system": "Be brief.", "prompt": Q, "chosen": A, "rejected": B},
        chatml(SYSTEM, ASK),
    ),
    "llama-factory sharegpt": (
        {
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}, HUMAN],
            "system": "Be brief.",
            "chosen": {"from": "gpt", "value": A},
            "rejected": {"from": "gpt", "value": B},
        },
        chatml(SYSTEM, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}, ASK),
    ),
    "llama-factory alpaca with history": (
        {
            "instruction": "What is the capital?",
            "input": "Korea",
            "history": [["Hi", "Hello."]],
            "system": "Be brief.",
            "chosen": A,
            "rejected": B,
        },
        chatml(
            SYSTEM,
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "What is the capital?\nKorea"},
        ),
    ),
    "openai": (
        {
            "input": {"messages": [ASK], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [GOOD],
            "non_preferred_output": [BAD],
        },
        chatml(ASK),
    ),
    "hh-rlhf": (
        {"chosen": f"{HH} {A}", "rejected": f"{HH} {B}"},
        chatml(
            {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello. How can I help?"}, ASK
        ),
    ),
    "json text": (
        {name: json.dumps([turn]) for name, turn in (("prompt", ASK), ("chosen", GOOD), ("rejected", BAD))},
        chatml(ASK),
    ),
    "the prompt inside both": (
        {"prompt": [SYSTEM, ASK], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        chatml(SYSTEM, ASK),
    ),
    "the question inside both texts": (
        {"prompt": [ASK], "chosen": f"{Q}\n\n{A}", "rejected": f"{Q}\n\n{B}"},
        chatml(ASK),
    ),
    "messages beside texts": ({"messages": [SYSTEM, ASK], "chosen": A, "rejected": B}, chatml(SYSTEM, ASK)),
}  # fmt: skip


@pytest.mark.parametrize(("row", "prompt"), CHATS.values(), ids=CHATS)
def test_chats(row: dict[str, Any], prompt: str) -> None:
    assert pair(row) == [(prompt, f"{A}<|im_end|>"), (prompt, f"{B}<|im_end|>")]


TEXTS: dict[str, tuple[dict[str, Any], str, tuple[str, str]]] = {
    "trl": ({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}, "The sky is", (" blue.", " green.")),
    "trl, implicit": (
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        "The sky is",
        (" blue.", " black."),
    ),
    "intel": (
        {"system": "Be brief.", "question": Q, "chosen": A, "rejected": B},
        f"### System:\nBe brief.\n\n### User:\n{Q}\n\n### Assistant:\n",
        (A, B),
    ),
    "argilla": (
        {"system": "", "instruction": Q, "chosen_response": A, "rejected_response": B},
        f"PREAMBLE\n\n### Instruction:\n{Q}\n\n### Response:\n",
        (A, B),
    ),
    "alpaca with a system": (
        {"system": "Be brief.", "instruction": Q, "input": "", "chosen": A, "rejected": B},
        f"PREAMBLE\n\n### System:\nBe brief.\n\n### Instruction:\n{Q}\n\n### Response:\n",
        (A, B),
    ),
    "the prompt inside both": (
        {"prompt": Q, "chosen": f"{Q} {A}", "rejected": f"{Q} {B}"},
        Q,
        (f" {A}", f" {B}"),
    ),
    "the question inside both": (
        {"question": Q, "chosen": f"{Q}\n{A}", "rejected": f"{Q}\n{B}"},
        f"### User:\n{Q}\n\n### Assistant:\n",
        (A, B),
    ),
    "answers that begin as a short prompt does": (
        {"question": "안녕", "chosen": "안녕하세요!", "rejected": "안녕 못해."},
        "### User:\n안녕\n\n### Assistant:\n",
        ("안녕하세요!", "안녕 못해."),
    ),
    "one answer repeats the question": (
        {"question": Q, "chosen": f"{Q} {A}", "rejected": B},
        f"### User:\n{Q}\n\n### Assistant:\n",
        (f"{Q} {A}", B),
    ),
}


@pytest.mark.parametrize(("row", "prompt", "answers"), TEXTS.values(), ids=TEXTS)
def test_texts(row: dict[str, Any], prompt: str, answers: tuple[str, str]) -> None:
    prompt = prompt.replace("PREAMBLE", resolve_preamble())
    assert pair(row) == [(prompt, answer) for answer in answers]


def resolve_preamble() -> str:
    template = resolve("alpaca")
    assert template is not None
    return template.text.split("\n")[0]


def test_hh_rlhf_as_plain_text() -> None:
    row = {"chosen": f"{HH} The capital is {A}", "rejected": f"{HH} The capital is {B}"}
    found = pair(row, "prompt-completion")
    assert found == [(HH, f" The capital is {A}"), (HH, f" The capital is {B}")]


def test_answers_that_are_calls() -> None:
    row = {"prompt": [ASK], "chosen": [CALL], "rejected": [BAD]}
    sides = [preference.side_row(row, side, None)["messages"] for side in ("chosen", "rejected")]
    assert sides[0][-1]["tool_calls"][0]["function"]["name"] == "find"
    assert sides[0][:-1] == sides[1][:-1] == [ASK]


def test_answers_of_parts_and_numbers() -> None:
    parts = [{"type": "text", "text": "Seo"}, {"type": "text", "text": "ul."}]
    row = {"prompt": [ASK], "chosen": parts, "rejected": 3}
    sides = [preference.side_row(row, side, None) for side in ("chosen", "rejected")]
    assert [side["messages"][-1]["content"] for side in sides] == ["Seoul.", "3"]


OTHER = {"role": "user", "content": "And of Japan, then?"}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "two prompts": (
        {"chosen": [ASK, GOOD], "rejected": [OTHER, BAD]},
        "chosen and rejected do not answer the same prompt: their message 1 differs ('What is the capital of Korea?' "
        "and 'And of Japan, then?'), so leave the row out",
    ),
    "two lengths": (
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD, OTHER, GOOD]},
        "chosen and rejected do not answer the same prompt: 1 and 3 messages come before their answers",
    ),
    "another prompt beside them": (
        {"prompt": [OTHER], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        "'chosen' does not answer the prompt of its row: it begins with 'What is the capital of Korea?', and the "
        "prompt ends with 'And of Japan, then?'",
    ),
    "another text as the prompt": (
        {"prompt": "Something else", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        "'chosen' does not answer the prompt of its row",
    ),
    "two system prompts": (
        {"prompt": [SYSTEM, ASK], "chosen": [SYSTEM | {"content": "Be long."}, ASK, GOOD], "rejected": [ASK, BAD]},
        "the prompt and 'chosen' have two different system prompts; keep one",
    ),
    "no prompt": (
        {"chosen": [GOOD], "rejected": [BAD]},
        "there is no prompt: no message comes before the answers; add the prompt as `prompt`",
    ),
    "several answers": (
        {"prompt": [ASK], "chosen": [A, B], "rejected": [B, A]},
        "column 'chosen' holds a list of 2, neither one answer nor messages with a role and a text",
    ),
    "no answer": (
        {"chosen": [ASK], "rejected": [ASK, BAD]},
        "the answer, column 'chosen', is empty: its messages do not end with an assistant turn",
    ),
    "no text in common": (
        {"chosen": "Seoul.", "rejected": "Busan."},
        "there is no prompt: no column besides chosen and rejected, and nothing that both texts begin with",
    ),
    "hh-rlhf with two histories": (
        {"chosen": f"{HH} A", "rejected": f"{HH.replace('help', 'serve')} B"},
        "chosen and rejected do not answer the same prompt: their message 2 differs",
    ),
    "nothing but the prompt": (
        {"prompt": Q, "chosen": Q, "rejected": f"{Q} {B}"},
        "the answer, column 'chosen', is empty but for the prompt",
    ),
    "a conversation that is not used": (
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD], "history": [["Hi", "Hello."]], "dialog": [OTHER]},
        "the column 'prompt' looks like a part of the conversation, and the chat template does not use it",
    ),
    "an image": (
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD], "images": ["a.png"]},
        "the column 'images' is not text; byeori trains text alone, also on models that see images",
    ),
    "reasoning beside texts": (
        {"question": Q, "chosen": A, "rejected": B, "thinking": "Capitals are large."},
        "the column 'thinking' looks like a part of the conversation",
    ),
}


@pytest.mark.parametrize(("row", "words"), WRONG.values(), ids=WRONG)
def test_rows_that_are_no_pair(row: dict[str, Any], words: str) -> None:
    with pytest.raises(TemplateError) as caught:
        pair(row)
    assert str(caught.value).startswith(words), str(caught.value)
