"""Every format of Axolotl's documentation: trained as it says, or refused with the reason."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

import kinds
from byeori.data import template, tokenize, unpaired
from byeori.data.row_kinds import ANSWER, PREFERENCE, RowKind
from byeori.errors import TemplateError
from chat_templates import CHATML
from chats import assistant, user

TOKENIZER = kinds.byte_level(chat=CHATML, gpt4=True)


def examples(kind: RowKind, row: dict[str, Any]) -> list[tuple[str, str]]:
    """The prompt and the answer of each example, with the template that a run would choose."""
    rows = datasets.Dataset.from_list([row])
    chosen = template.resolve(kind.choose_template(rows))
    kind.check_columns(rows.column_names, chosen)
    if kind is ANSWER:
        unpaired.check_labels(rows, kind.columns_read(rows.column_names, chosen))
    encoding = tokenize.make_encoding(TOKENIZER, chosen, cutoff_len=999, add_eos_token=False, train_on_inputs=False)
    found = []
    for example in kind.encode(rows[0], encoding):
        start = example.targets[0][0]
        found.append(tuple(map(TOKENIZER.decode, (example.token_ids[:start], example.token_ids[start:]))))
    return found


def chat(*turns: tuple[str, str], answer: str) -> tuple[str, str]:
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return f"{text}<|im_start|>assistant\n", f"{answer}<|im_end|>"


QA = ("### User:\nQ\n\n### Assistant:\n", "A")
ALPACA = template.shipped()["alpaca"].split("[[")[0] + "### Instruction:\nQ\n\n### Input:\nI\n\n### Response:\n"
ASKED, SYSTEM = ("user", "Q"), ("system", "S")
PLAIN = chat(ASKED, answer="A")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "Q", "input": "I", "output": "A"}, (ALPACA, "A")),
        ({"question": "Q", "category": "C", "answer": "A"}, QA),  # jeopardy
        ({"instruction": "Q", "input": "I", "response": "A"}, chat(("user", "Q\nI"), answer="A")),  # gpteacher
        ({"system_prompt": "S", "question": "Q", "response": "A"}, chat(SYSTEM, ASKED, answer="A")),  # open_orca
        ({"prompt": "Q", "generation": "A"}, PLAIN),  # metharme
        ({"input": "Q", "output": "A"}, PLAIN),
        ({"question": "Q", "input": "I", "answer": "A"}, chat(("user", "Q\nI"), answer="A")),
        ({"scores": "S", "critiques": "C", "instruction": "Q", "answer": "A"}, PLAIN),  # creative_acr
        ({"conversations": [{"role": "prompter", "value": "Q"}, {"role": "bot", "value": "A"}]}, PLAIN),  # pygmalion
        ({"messages": [user("Q"), assistant("A")]}, PLAIN),
        ({"instruction": "Q", "completion": "A", "label": True}, PLAIN),  # kto, of good answers
    ],
)
def test_rows_of_one_answer(row: dict[str, Any], expected: tuple[str, str]) -> None:
    assert examples(ANSWER, row) == [expected]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"INSTRUCTION": "Q", "RESPONSE": "A"}, r"columns INSTRUCTION, RESPONSE; write one, .*{INSTRUCTION}"),  # oasst
        ({"article": "Q", "summary": "A"}, r"columns article, summary; write one, .*{article}"),
        ({"article": "Q", "highlights": "A", "id": "1"}, r"write one, .*{article}.*{highlights}'`"),
        ({"dialogue": "A: Q", "summary": "A"}, r"write one, .*{dialogue}.*{summary}'`"),  # SAMSum
        (
            {"context": "C", "question": "Q", "answers": {"text": ["A"]}, "id": "1"},
            r"{context}.*{question}.*{answers}'",
        ),
        ({"질문": "Q", "답변": "A", "출처": "B"}, r"write one, .*{질문}.*{답변}'`"),
        ({"Question": "Q", "Complex_CoT": "R", "Response": "A"}, "question=Question reasoning=Complex_CoT answer=Resp"),
        ({"input": "Q", "reasoning_content": "R", "content": "A"}, "question=input .* answer=content`"),
        ({"message_1": "Q", "message_2": "A"}, r"columns message_1, message_2; write one"),  # camel_ai
        ({"question": "Q", "choices": ["x"], "solution": "S", "explanation": "E"}, "write one"),  # explainchoice
        ({"question": "Q", "choices": ["x", "y"], "answer": "x"}, "the column 'choices' looks like a part"),
        ({"article": "X", "question": "Q", "answer": "A"}, "the column 'article' looks like a part"),  # context_qa
        ({"context": "X", "question": "Q", "answer": "A"}, "the column 'context' looks like a part"),
        ({"article": "X", "unanswerable_question": "Q"}, "no built-in template fits"),
        ({"instruction": "Q", "input": "", "output": "A", "reflection": "R", "corrected": "C"}, "'reflection' looks"),
        ({"instruction": "Q", "answer": "A", "revision": "R"}, "'revision' looks like a part"),  # creative_acr
        ({"prompt": "P", "question": "Q", "response": "A"}, "'question' looks like a part"),
        ({"instruction": "I", "question": "Q", "answer": "A"}, "'instruction' looks like a part"),
        ({"prompt": "Q", "completions": ["a", "b"], "labels": [True, False]}, "several answers or steps"),  # stepwise
        ({"segments": [{"label": False, "text": "Q"}]}, "pieces of a finished text"),  # input_output
        ({"input_ids": [1, 2], "attention_mask": [1, 1], "labels": [-100, 2]}, "token ids"),
        ({"text": "T"}, "--text_column text"),  # completion
        ({"state": "S", "questions": {"q": {"type": "noul"}}, "labels": {"q": 0}}, "no built-in template"),  # decision
        ({"messages": [user("Q"), assistant("A") | {"train_detail": [{"train": True}]}]}, "the key 'train_detail'"),
        ({"question": "Q", "completion": "A", "label": False}, "KTO"),
    ],
)
def test_rows_that_are_not_trained(row: dict[str, Any], words: str) -> None:
    with pytest.raises(TemplateError, match=words):
        examples(ANSWER, row)


@pytest.mark.parametrize(
    "row",
    [
        {"input": "Q", "chosen": "A", "rejected": "B"},  # icr
        {"prompt": [user("Q")], "chosen": "A", "rejected": "B"},
        {"chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")]},  # argilla_chat
        {"prompt": "Q", "chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")]},  # ultra
        {"messages": [user("Q")], "chosen": assistant("A"), "rejected": assistant("B")},  # chat_template.default
        {
            "input": {"messages": [user("Q")], "parallel_tool_calls": True},
            "preferred_output": [assistant("A")],
            "non_preferred_output": [assistant("B")],
        },  # OpenAI
    ],
)
@pytest.mark.parametrize("system", [None, "system", "system_prompt"])
def test_pairs(row: dict[str, Any], system: str | None) -> None:
    turns = [SYSTEM, ASKED] if system else [ASKED]
    given = row | ({system: "S"} if system else {})
    assert examples(PREFERENCE, given) == [chat(*turns, answer="A"), chat(*turns, answer="B")]


def test_pairs_of_texts() -> None:
    for row in (
        {"instruction": "Q", "input": "I", "chosen_response": "A", "rejected_response": "B"},  # argilla
        {"question": "Q", "chosen": "A", "rejected": "B"},  # intel
    ):
        (prompt, good), (same, bad) = examples(PREFERENCE, row)
        assert prompt == same == (ALPACA if "input" in row else QA[0]) and (good, bad) == ("A", "B")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "Q", "answers": [{"answer": "A", "rank": 1}, {"answer": "B", "rank": 2}]}, "make pairs"),  # nectar
        ({"prompt": "Q", "completion": "A", "label": True}, "KTO"),
        ({"context": "X", "question": "Q", "chosen": "A", "rejected": "B"}, "'context' looks like a part"),
    ],
)
def test_rows_that_are_no_pairs(row: dict[str, Any], words: str) -> None:
    with pytest.raises(TemplateError, match=words):
        examples(PREFERENCE, row)
