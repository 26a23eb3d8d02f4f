"""Rows of messages: every assistant turn trained, nothing else."""

from __future__ import annotations

from typing import Any

import pytest

import kinds
from byeori.data.tokenize import Encoding, Example, encode_prompt, encode_row, make_encoding
from byeori.errors import TemplateError, TooLongError
from chat_templates import CHATML, CUTTING, GEMMA, LLAMA_2, OPEN, THINKING

TALK = [
    {"role": "user", "content": "왜?"},
    {"role": "assistant", "content": "그냥 봄이라서."},
    {"role": "user", "content": "Really?"},
    {"role": "assistant", "content": "네, 정말요 🌸"},
]


def encoding_of(chat: str | None, kind: str = "chatml", cutoff: int = 999, *, ended: bool = True) -> Encoding:
    tokenizer = {
        "chatml": lambda: kinds.byte_level(chat=chat, gpt4=True),
        "chatml-bos": lambda: kinds.byte_level("<|begin_of_text|>", chat=chat, gpt4=True),
        "llama2": lambda: kinds.sentencepiece(chat=chat),
        "gemma": lambda: kinds.sentencepiece(
            "<bos>", "<eos>", space="none", extra=("<start_of_turn>", "<end_of_turn>"), chat=chat
        ),
    }[kind]()
    return make_encoding(tokenizer, None, cutoff_len=cutoff, add_eos_token=ended, train_on_inputs=False)


def turns(example: Example, encoding: Encoding) -> list[str]:
    """What each trained range writes."""
    return [
        b"".join(kinds.token_bytes(encoding.tokenizer, number) for number in example.token_ids[start:end]).decode()
        for start, end in example.targets
    ]


def refusal(row: dict[str, Any], encoding: Encoding) -> str:
    with pytest.raises(TemplateError) as caught:
        encode_row(row, encoding)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("chat", "kind", "trained"),
    [
        (CHATML, "chatml", ["그냥 봄이라서.<|im_end|>", "네, 정말요 🌸<|im_end|>"]),
        (CHATML, "chatml-bos", ["그냥 봄이라서.<|im_end|>", "네, 정말요 🌸<|im_end|>"]),
        (LLAMA_2, "llama2", [" 그냥 봄이라서. </s>", " 네, 정말요 🌸 </s>"]),
        (GEMMA, "gemma", ["그냥 봄이라서.<end_of_turn>", "네, 정말요 🌸<end_of_turn>"]),
    ],
)
def test_every_assistant_turn_is_trained_and_nothing_else(chat: str, kind: str, trained: list[str]) -> None:
    encoding = encoding_of(chat, kind)
    example = encode_row({"messages": TALK}, encoding)
    assert turns(example, encoding) == trained
    assert example.straddles == 0
    served = encoding.tokenizer.apply_chat_template(TALK, return_dict=False)
    front = [encoding.bos] if kind == "chatml-bos" else []
    assert example.token_ids == front + list(served)
    asked = encoding.tokenizer.apply_chat_template(TALK[:3], add_generation_prompt=True, return_dict=False)
    assert encode_prompt({"messages": TALK}, encoding) == front + list(asked)
    assert encode_prompt({"messages": TALK[:3]}, encoding) == front + list(asked)
    assert example.token_ids[: example.targets[-1][0]] == front + list(asked)


def test_bos_of_the_chat_template_is_not_doubled() -> None:
    encoding = encoding_of(GEMMA, "gemma")
    assert encode_row({"messages": TALK}, encoding).token_ids.count(encoding.bos) == 1
    encoding = encoding_of(LLAMA_2, "llama2")
    assert encode_row({"messages": TALK}, encoding).token_ids.count(encoding.bos) == 2  # this template has one a round


def test_sharegpt_conversations_are_the_same() -> None:
    encoding = encoding_of(CHATML)
    names = {"user": "human", "assistant": "gpt"}
    talk = [{"from": names[turn["role"]], "value": turn["content"]} for turn in TALK]
    mixed = [turn | {"role": None, "content": None} for turn in talk]  # as Arrow fills a struct
    expected = encode_row({"messages": TALK}, encoding)
    assert encode_row({"conversations": talk}, encoding) == expected
    assert encode_row({"messages": None, "conversations": mixed}, encoding) == expected


def test_a_row_that_ends_with_a_user_turn() -> None:
    encoding = encoding_of(CHATML)
    example = encode_row({"messages": TALK[:3]}, encoding)
    assert turns(example, encoding) == ["그냥 봄이라서.<|im_end|>"]
    assert encoding.tokenizer.decode(example.token_ids).endswith("Really?<|im_end|>\n")


def test_a_conversation_that_the_assistant_opens() -> None:
    encoding = encoding_of(CHATML)
    talk = [{"role": "assistant", "content": "안녕하세요"}, *TALK[:2]]
    assert turns(encode_row({"messages": talk}, encoding), encoding) == [
        "안녕하세요<|im_end|>",
        "그냥 봄이라서.<|im_end|>",
    ]


def test_two_assistant_turns_in_a_row_and_an_empty_one() -> None:
    encoding = encoding_of(CHATML)
    talk = [*TALK[:2], {"role": "assistant", "content": ""}, {"role": "assistant", "content": "더"}]
    example = encode_row({"messages": talk}, encoding)
    assert turns(example, encoding) == ["그냥 봄이라서.<|im_end|>", "더<|im_end|>"]  # not how to end a turn at once
    assert example.token_ids == list(encoding.tokenizer.apply_chat_template(talk, return_dict=False))


def test_an_empty_turn_where_nothing_ends_a_turn_doubles_no_text() -> None:
    encoding = encoding_of(OPEN, ended=False)
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}, *TALK[:2]]
    example = encode_row({"messages": talk}, encoding)
    assert (
        encoding.tokenizer.decode(example.token_ids) == "user: q\nassistant: \nuser: 왜?\nassistant: 그냥 봄이라서.\n"
    )


def test_where_nothing_ends_a_turn_the_last_answer_gets_an_end() -> None:
    encoding = encoding_of(OPEN)
    example = encode_row({"messages": TALK}, encoding)
    assert encoding.tokenizer.decode(example.token_ids) == (
        "user: 왜?\nassistant: 그냥 봄이라서.\nuser: Really?\nassistant: 네, 정말요 🌸<|endoftext|>"
    )
    assert turns(example, encoding) == [" 그냥 봄이라서.", " 네, 정말요 🌸<|endoftext|>"]  # tokens begin with the space
    assert turns(encode_row({"messages": TALK[:3]}, encoding), encoding) == [" 그냥 봄이라서."]  # no text ends there
    assert encoding.tokenizer.decode(encode_prompt({"messages": TALK[:2]}, encoding)) == "user: 왜?\nassistant: "
    assert turns(encode_row({"messages": TALK[:2]}, encoding_of(OPEN, ended=False)), encoding) == [" 그냥 봄이라서."]


@pytest.mark.parametrize("chat", [CHATML, THINKING, CHATML.replace("<|im_end|>", "{{ eos_token }}")])
def test_where_the_chat_template_ends_a_turn_nothing_is_added(chat: str) -> None:
    whole, plain = (encode_row({"messages": TALK[:2]}, encoding_of(chat, ended=ended)) for ended in (True, False))
    assert whole == plain


def test_a_turn_of_weight_0_is_not_trained() -> None:
    encoding = encoding_of(CHATML)
    first, last = ([TALK[0], TALK[1] | {"weight": a}, TALK[2], TALK[3] | {"weight": b}] for a, b in ((0, 1), (None, 0)))
    assert turns(encode_row({"messages": first}, encoding), encoding) == ["네, 정말요 🌸<|im_end|>"]
    assert turns(encode_row({"messages": last}, encoding), encoding) == ["그냥 봄이라서.<|im_end|>"]
    whole = encode_row({"messages": TALK}, encoding).token_ids
    assert (
        encode_row({"messages": first}, encoding).token_ids
        == encode_row({"messages": last}, encoding).token_ids
        == whole
    )
    untrained = [turn | {"weight": 0} for turn in TALK]
    assert refusal({"messages": untrained}, encoding) == (
        "no assistant turn with another weight than 0 in `messages`, so there is nothing to train"
    )
    half = refusal({"messages": [TALK[0], TALK[1] | {"weight": 0.5}]}, encoding)
    assert half == "message 2 has the weight 0.5; it can be 0 (not trained) or 1"


def test_weight_0_where_earlier_turns_are_rewritten() -> None:
    encoding = encoding_of(THINKING)
    row = {"messages": [TALK[0], TALK[1] | {"weight": 0}, *TALK[2:]]}
    assert turns(encode_row(row, encoding), encoding) == ["<think>\n\n</think>\n\n네, 정말요 🌸<|im_end|>"]


@pytest.mark.parametrize("weight", [None, 1])
def test_a_last_answer_that_is_empty(weight: int | None) -> None:
    empty = {"role": "assistant", "content": " \n", "weight": weight}
    row = {"messages": [*TALK[:3], empty]}
    assert refusal(row, encoding_of(CHATML)) == "the answer, the last assistant turn in `messages`, is empty"
    row["messages"][-1]["weight"] = 0
    assert turns(encode_row(row, encoding_of(CHATML)), encoding_of(CHATML)) == ["그냥 봄이라서.<|im_end|>"]


def test_tools_are_refused() -> None:
    calls = [{"function": {"name": "search", "arguments": "{}"}}]
    for call in ({"tool_calls": calls}, {"function_call": calls[0]}):
        row = {"messages": [TALK[0], {"role": "assistant", "content": None, **call}]}
        assert refusal(row, encoding_of(CHATML)) == (
            "a turn in `messages` calls a tool (`tool_calls`), which would not be trained; leave such rows out, or "
            "write the call into the turn's content"
        )
    assert refusal({"messages": TALK, "tools": calls}, encoding_of(CHATML)).startswith(
        "the column `tools` offers tools"
    )
    none = {"messages": [turn | {"tool_calls": None} for turn in TALK], "tools": []}
    assert encode_row(none, encoding_of(CHATML)) == encode_row({"messages": TALK}, encoding_of(CHATML))


def test_a_chat_template_that_leaves_out_a_part_of_an_answer() -> None:
    talk = [TALK[0], {"role": "assistant", "content": "<think>봄</think>그냥."}]
    assert refusal({"messages": talk}, encoding_of(CUTTING)) == (
        "the tokenizer's chat template leaves out a part of the answer (message 2), as some do with what stands before "
        "</think>; take that part out of the row, or give a --template of your own"
    )
    assert turns(encode_row({"messages": TALK[:2]}, encoding_of(CUTTING)), encoding_of(CUTTING)) == [
        "그냥 봄이라서.<|im_end|>"
    ]


def test_an_answer_that_the_prompt_begins_or_whose_white_space_changes() -> None:
    talk = [TALK[0], {"role": "assistant", "content": "<think>\n봄\n</think>\n그냥."}]
    begun = encoding_of(
        CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
    )
    assert turns(encode_row({"messages": talk}, begun), begun) == ["봄\n</think>\n그냥.<|im_end|>"]
    spaced = encoding_of(
        CHATML.replace("{{ message.content }}", "{{ message.content.replace('</think>', '</think>\n') }}")
    )
    assert turns(encode_row({"messages": talk}, spaced), spaced) == ["<think>\n봄\n</think>\n\n그냥.<|im_end|>"]


def test_names_that_sharegpt_has_for_the_assistant() -> None:
    encoding = encoding_of(CHATML)
    for name in ("chatgpt", "model", "bing", "bard"):
        talk = [{"from": "human", "value": "왜?"}, {"from": name, "value": "그냥 봄이라서."}]
        assert encode_row({"conversations": talk}, encoding) == encode_row({"messages": TALK[:2]}, encoding)
    talk[1]["from"] = "claude"
    assert refusal({"conversations": talk}, encoding).endswith("so there is nothing to train (its roles: claude, user)")


def test_a_chat_template_that_rewrites_earlier_turns() -> None:
    encoding = encoding_of(THINKING)
    assert refusal({"messages": TALK}, encoding) == (
        "the tokenizer's chat template rewrites earlier turns (message 2), so this conversation cannot be trained as "
        "one row; make each assistant turn the last of a row of its own"
    )
    assert turns(encode_row({"messages": TALK[:2]}, encoding), encoding) == [
        "<think>\n\n</think>\n\n그냥 봄이라서.<|im_end|>"
    ]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": TALK[:1]}, "no assistant turn in `messages`, so there is nothing to train"),
        ({"messages": [TALK[0], {"role": "assistant", "content": " \n"}]}, "no assistant turn"),
        ({"messages": []}, "the column `messages` is empty or no list of turns"),
        ({"messages": None}, "the column `messages` is empty or no list of turns"),
        ({"messages": "왜?"}, "the column `messages` is empty or no list of turns"),
        ({"messages": ["왜?"]}, "a turn in `messages` has no role or no text content"),
        ({"messages": [{"role": "user", "content": None}]}, "a turn in `messages` has no role or no text content"),
        ({"messages": [{"content": "왜?"}]}, "a turn in `messages` has no role or no text content"),
        ({"messages": [{"role": "user", "content": ["왜?"]}]}, "a turn in `messages` has no role or no text content"),
    ],
)
def test_messages_that_cannot_be_trained(row: dict[str, Any], words: str) -> None:
    assert refusal(row, encoding_of(CHATML)).startswith(words)


def test_what_the_chat_template_refuses_is_one_sentence() -> None:
    talk = [{"role": "system", "content": "너는"}, *TALK[:2]]
    assert refusal({"messages": talk}, encoding_of(LLAMA_2, "llama2")) == (
        "the tokenizer's chat template refuses these messages: Only user and assistant roles are supported!"
    )
    assert "roles must alternate" in refusal({"messages": TALK[1:]}, encoding_of(GEMMA, "gemma"))
    assert "refuses these messages" in refusal({"messages": TALK}, encoding_of("{{ messages[0].content + 1 }}"))
    assert "refuses these messages" in refusal({"messages": TALK}, encoding_of("{% for %}"))


def test_a_tokenizer_without_a_chat_template() -> None:
    with pytest.raises(TemplateError) as caught:
        encoding_of(None)
    assert str(caught.value) == (
        "the template is `chat`, but this tokenizer has no chat template; choose another template"
    )


def test_a_conversation_is_never_cut() -> None:
    whole = len(encode_row({"messages": TALK}, encoding_of(CHATML)).token_ids)
    assert encode_row({"messages": TALK}, encoding_of(CHATML, cutoff=whole)).shortened == 0
    with pytest.raises(TooLongError) as caught:
        encode_row({"messages": TALK}, encoding_of(CHATML, cutoff=whole - 1))
    assert str(caught.value) == (
        f"{whole} tokens are more than cutoff_len {whole - 1}, and there is no prompt column to shorten"
    )
