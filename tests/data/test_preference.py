"""Preference rows become pairs whose prompts are the same tokens."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

import kinds
from byeori.data import preference, template
from byeori.data.template import parse, resolve
from byeori.data.tokenize import Encoding, Example, make_encoding
from byeori.errors import TemplateError, TooLongError
from chat_templates import CHATML, CUTTING, OPEN, THINKING

ROW = {
    "system": "짧게 답하세요.",
    "question": "봄은 언제 오나요? 봄 소식을 기다립니다.",
    "chosen": "봄은 3월에 옵니다.",
    "rejected": "모릅니다, 그건 아무도 모르는 일이라고 들었습니다.",
}


def encoding_of(template: str | None = "question-answer", cutoff: int = 999, chat: str | None = None) -> Encoding:
    tokenizer = kinds.byte_level(chat=chat, gpt4=True)
    chosen = resolve(template) if template else None
    return make_encoding(tokenizer, chosen, cutoff_len=cutoff, add_eos_token=True, train_on_inputs=False)


def table(*rows: dict[str, Any]) -> datasets.Dataset:
    return datasets.Dataset.from_list(list(rows))


def text(example: Example, encoding: Encoding, *, trained: bool) -> str:
    inside = {index for start, end in example.targets for index in range(start, end)}
    ids = [number for index, number in enumerate(example.token_ids) if (index in inside) == trained]
    return b"".join(kinds.token_bytes(encoding.tokenizer, number) for number in ids).decode(errors="replace")


def test_a_pair_shares_its_prompt_and_trains_its_answers() -> None:
    encoding = encoding_of()
    chosen, rejected = preference.encode_pair(ROW, encoding)
    prompt = f"### System:\n{ROW['system']}\n\n### User:\n{ROW['question']}\n\n### Assistant:\n"
    for example, answer in ((chosen, ROW["chosen"]), (rejected, ROW["rejected"])):
        assert text(example, encoding, trained=False) == prompt
        assert text(example, encoding, trained=True) == answer + encoding.tokenizer.eos_token
    start = chosen.targets[0][0]
    assert list(chosen.token_ids[:start]) == list(rejected.token_ids[: rejected.targets[0][0]])


def test_the_tutorials_template_without_a_system() -> None:
    encoding = encoding_of()
    chosen, _ = preference.encode_pair(ROW | {"system": ""}, encoding)
    assert text(chosen, encoding, trained=False) == f"### User:\n{ROW['question']}\n\n### Assistant:\n"


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_prompt_that_is_too_long_is_shortened_alike(cut: int) -> None:
    whole = preference.encode_pair(ROW, encoding_of())
    longest = max(len(example.token_ids) for example in whole)
    encoding = encoding_of(cutoff=longest - cut)
    try:
        pair = preference.encode_pair(ROW, encoding)
    except TooLongError as error:
        assert "question" in str(error) and cut > 20
        return
    for example, before in zip(pair, whole, strict=True):
        assert len(example.token_ids) <= longest - cut
        assert text(example, encoding, trained=True) == text(before, encoding, trained=True)  # an answer is never cut
        assert example.shortened == len(before.token_ids) - len(example.token_ids) > 0
    assert text(pair[0], encoding, trained=False) == text(pair[1], encoding, trained=False)


def test_a_template_of_the_users_own() -> None:
    tokenizer = kinds.byte_level(gpt4=True)
    encoding = make_encoding(
        tokenizer, parse("Q: {question}\nA:\n{reply}\nB"), cutoff_len=99, add_eos_token=False, train_on_inputs=False
    )
    chosen, _ = preference.encode_pair(ROW, encoding)
    assert text(chosen, encoding, trained=True) == f"{ROW['chosen']}\nB"


TURNS = [
    {"role": "user", "content": "왜?"},
    {"role": "assistant", "content": "그냥."},
    {"role": "user", "content": "네?"},
]
GOOD, BAD = {"role": "assistant", "content": "봄이라서요."}, {"role": "assistant", "content": "몰라요."}
SHAPES: list[dict[str, Any]] = [
    {"prompt": TURNS, "chosen": [GOOD], "rejected": [BAD]},
    {"chosen": [*TURNS, GOOD], "rejected": [*TURNS, BAD]},
    {"prompt": TURNS, "chosen": [*TURNS, GOOD], "rejected": [*TURNS, BAD]},
    {"prompt": TURNS, "chosen": GOOD["content"], "rejected": BAD["content"]},
]


@pytest.mark.parametrize("row", SHAPES, ids=["apart", "whole", "both", "text"])
def test_messages_train_the_last_turn_alone(row: dict[str, Any]) -> None:
    encoding = encoding_of(None, chat=CHATML)
    chosen, rejected = preference.encode_pair(row, encoding)
    assert text(chosen, encoding, trained=True) == "봄이라서요.<|im_end|>"
    assert text(rejected, encoding, trained=True) == "몰라요.<|im_end|>"
    assert "그냥." in text(chosen, encoding, trained=False)


def test_where_nothing_ends_a_turn_both_answers_get_an_end() -> None:
    encoding = encoding_of(None, chat=OPEN)
    chosen, rejected = preference.encode_pair(SHAPES[0], encoding)
    assert text(chosen, encoding, trained=True) == "봄이라서요.<|endoftext|>"
    assert text(rejected, encoding, trained=True) == "몰라요.<|endoftext|>"


def test_a_chat_template_that_leaves_out_a_part_of_an_answer() -> None:
    row = SHAPES[0] | {"chosen": "<think>봄</think>그냥."}
    with pytest.raises(TemplateError, match=r"leaves out the reasoning of message 4"):
        preference.encode_pair(row, encoding_of(None, chat=CUTTING))


def test_system_and_question_with_messages() -> None:
    encoding = encoding_of(None, chat=CHATML)
    row = {"system": "짧게.", "question": "왜?", "chosen": [GOOD], "rejected": [BAD]}
    prompt = text(preference.encode_pair(row, encoding)[0], encoding, trained=False)
    assert prompt.startswith("<|im_start|>system\n짧게.<|im_end|>\n<|im_start|>user\n왜?<|im_end|>\n")


def test_a_template_that_rewrites_earlier_turns_can_still_be_preferred() -> None:
    encoding = encoding_of(None, chat=THINKING)
    chosen, _ = preference.encode_pair(SHAPES[0], encoding)
    assert text(chosen, encoding, trained=True) == "<think>\n\n</think>\n\n봄이라서요.<|im_end|>"


def test_which_template_is_taken() -> None:
    assert preference.choose(table(ROW)) == "question-answer"
    assert preference.choose(table({"prompt": "p", "chosen": "c", "rejected": "r"})) == "prompt-completion"
    assert preference.choose(table({"instruction": "i", "chosen": "c", "rejected": "r"})) == "alpaca"
    assert [preference.choose(table(row)) for row in SHAPES] == ["chat"] * 4


def test_one_row_without_an_answer_does_not_decide_the_template() -> None:
    assert preference.choose(table(ROW | {"chosen": None}, ROW)) == "question-answer"
    assert preference.choose(table(SHAPES[0] | {"chosen": None}, SHAPES[0])) == "chat"


WRONG: list[tuple[dict[str, Any], str]] = [
    (ROW | {"chosen": " "}, "the answer, column 'chosen', is empty"),
    (ROW | {"rejected": None}, "the answer, column 'rejected', is empty"),
    (ROW | {"rejected": float("nan")}, "the answer, column 'rejected', is empty"),
    (ROW | {"rejected": 3}, "column 'rejected' holds int 3, not text"),
    (ROW | {"rejected": ROW["chosen"]}, "the chosen and the rejected answer are the same"),
]


@pytest.mark.parametrize(("row", "words"), WRONG, ids=lambda value: str(value)[-30:])
def test_rows_that_cannot_be_trained(row: dict[str, Any], words: str) -> None:
    with pytest.raises(TemplateError, match=words):
        preference.encode_pair(row, encoding_of())


def test_messages_without_an_answer() -> None:
    with pytest.raises(TemplateError, match="column 'rejected', is empty: its messages do not end"):
        preference.encode_pair({"prompt": TURNS, "chosen": [GOOD], "rejected": []}, encoding_of(None, chat=CHATML))


def test_rows_without_a_pair() -> None:
    with pytest.raises(TemplateError, match="need the columns chosen and rejected, and there is no 'rejected'"):
        preference.choose(table({"question": "q", "chosen": "c"}))
    with pytest.raises(TemplateError, match=r"; or use `byeori dpo`, which trains on such pairs$"):
        template.choose(list(ROW))
    with pytest.raises(TemplateError, match="no built-in template fits the columns topic"):
        preference.choose(table({"topic": "t", "chosen": "c", "rejected": "r"}))
    with pytest.raises(TemplateError, match=r"'completions' \(as in openbmb/UltraFeedback and Nectar\) holds several"):
        preference.check_columns(["source", "instruction", "models", "completions"])
