"""Rows of messages: every assistant turn is an example with the prompt that is served, and nothing else is trained."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import kinds
from byeori.batch import forest
from byeori.data import chat
from byeori.data.tokenize import Encoding, Example, encode_prompt, encode_turns, make_encoding
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


def turns(examples: list[Example], encoding: Encoding) -> list[str]:
    """What each trained range writes."""
    return [
        b"".join(kinds.token_bytes(encoding.tokenizer, number) for number in example.token_ids[start:end]).decode()
        for example in examples
        for start, end in example.targets
    ]


def refusal(row: dict[str, Any], encoding: Encoding) -> str:
    with pytest.raises(TemplateError) as caught:
        encode_turns(row, encoding)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("template", "kind", "trained"),
    [
        (CHATML, "chatml", ["그냥 봄이라서.<|im_end|>", "네, 정말요 🌸<|im_end|>"]),
        (CHATML, "chatml-bos", ["그냥 봄이라서.<|im_end|>", "네, 정말요 🌸<|im_end|>"]),
        (LLAMA_2, "llama2", [" 그냥 봄이라서. </s>", " 네, 정말요 🌸 </s>"]),
        (GEMMA, "gemma", ["그냥 봄이라서.<end_of_turn>", "네, 정말요 🌸<end_of_turn>"]),
    ],
)
def test_every_assistant_turn_is_trained_and_nothing_else(template: str, kind: str, trained: list[str]) -> None:
    encoding = encoding_of(template, kind)
    examples = encode_turns({"messages": TALK}, encoding)
    assert turns(examples, encoding) == trained
    assert [example.turn for example in examples] == [2, 4]
    for example in examples:
        before = TALK[: example.turn - 1]
        served = encoding.tokenizer.apply_chat_template(before, add_generation_prompt=True, return_dict=False)
        assert example.token_ids[: example.targets[0][0]] == list(served)
        assert encode_prompt({"messages": before}, encoding) == list(served)
        assert encode_prompt({"messages": TALK[: example.turn]}, encoding) == list(served)


@pytest.mark.parametrize(("template", "kind"), [(CHATML, "chatml"), (GEMMA, "gemma")])
def test_where_history_is_kept_turns_cost_what_the_conversation_costs(template: str, kind: str) -> None:
    encoding = encoding_of(template, kind)
    talk = [turn for _ in range(5) for turn in TALK]
    examples = encode_turns({"messages": talk}, encoding)
    assert len(examples) == 10
    whole = encoding.tokenizer.apply_chat_template(talk, return_dict=False)
    # all but the line break behind the last turn, and the last token, which is only predicted
    assert forest.build(examples).unique_tokens == len(whole) - 2


def test_where_history_loses_its_reasoning_only_that_is_computed_again() -> None:
    encoding = encoding_of(THINKING)
    first, second = encode_turns({"messages": TALK}, encoding)
    shared = next(i for i, (a, b) in enumerate(zip(first.token_ids, second.token_ids, strict=False)) if a != b)
    assert first.targets[0][0] <= shared  # the prompt of the first turn
    assert forest.build([first, second]).unique_tokens == len(first.token_ids) - 1 + len(second.token_ids) - 1 - shared


def test_bos_of_the_chat_template_is_not_doubled() -> None:
    encoding = encoding_of(GEMMA, "gemma")
    (bos,) = encoding.prefix
    assert [example.token_ids.count(bos) for example in encode_turns({"messages": TALK}, encoding)] == [1, 1]
    encoding = encoding_of(LLAMA_2, "llama2")  # whose template has one a round
    (bos,) = encoding.prefix
    assert [example.token_ids.count(bos) for example in encode_turns({"messages": TALK}, encoding)] == [1, 2]


def test_a_bos_that_the_chat_template_does_not_write_is_not_added() -> None:
    """As servers do: apply_chat_template adds no special tokens of the tokenizer's."""
    encoding = encoding_of(CHATML, "chatml-bos")
    assert encoding.tokenizer.bos_token_id not in encode_turns({"messages": TALK}, encoding)[0].token_ids


def test_sharegpt_conversations_are_the_same() -> None:
    encoding = encoding_of(CHATML)
    names = {"user": "human", "assistant": "gpt"}
    talk = [{"from": names[turn["role"]], "value": turn["content"]} for turn in TALK]
    mixed = [turn | {"role": None, "content": None} for turn in talk]  # as Arrow fills a struct
    expected = encode_turns({"messages": TALK}, encoding)
    assert encode_turns({"conversations": talk}, encoding) == expected
    assert encode_turns({"messages": None, "conversations": mixed}, encoding) == expected


def test_a_row_that_ends_with_a_user_turn() -> None:
    encoding = encoding_of(CHATML)
    examples = encode_turns({"messages": TALK[:3]}, encoding)
    assert turns(examples, encoding) == ["그냥 봄이라서.<|im_end|>"]
    assert examples == encode_turns({"messages": TALK[:2]}, encoding)


def test_a_conversation_that_the_assistant_opens() -> None:
    encoding = encoding_of(CHATML)
    talk = [{"role": "assistant", "content": "안녕하세요"}, *TALK[:2]]
    assert turns(encode_turns({"messages": talk}, encoding), encoding) == [
        "안녕하세요<|im_end|>",
        "그냥 봄이라서.<|im_end|>",
    ]


def test_two_assistant_turns_in_a_row_and_an_empty_one() -> None:
    encoding = encoding_of(CHATML)
    talk = [*TALK[:2], {"role": "assistant", "content": ""}, {"role": "assistant", "content": "더"}]
    examples = encode_turns({"messages": talk}, encoding)
    assert turns(examples, encoding) == ["그냥 봄이라서.<|im_end|>", "더<|im_end|>"]  # not how to end a turn at once
    served = encoding.tokenizer.apply_chat_template(talk[:3], add_generation_prompt=True, return_dict=False)
    assert examples[1].token_ids[: examples[1].targets[0][0]] == list(served)


def test_where_nothing_ends_a_turn_every_answer_gets_an_end() -> None:
    """The prompt ends with a space there, which servers send: the answer begins after it, whatever its token is."""
    encoding = encoding_of(OPEN)
    first, second = encode_turns({"messages": TALK}, encoding)
    assert encoding.tokenizer.decode(first.token_ids) == "user: 왜?\nassistant: 그냥 봄이라서.<|endoftext|>"
    assert encoding.tokenizer.decode(second.token_ids) == (
        "user: 왜?\nassistant: 그냥 봄이라서.\nuser: Really?\nassistant: 네, 정말요 🌸<|endoftext|>"
    )
    assert turns([first, second], encoding) == ["그냥 봄이라서.<|endoftext|>", "네, 정말요 🌸<|endoftext|>"]
    prompt = encode_prompt({"messages": TALK[:2]}, encoding)
    assert encoding.tokenizer.decode(prompt) == "user: 왜?\nassistant: "
    assert first.token_ids[: len(prompt)] == prompt
    assert turns(encode_turns({"messages": TALK[:2]}, encoding_of(OPEN, ended=False)), encoding) == ["그냥 봄이라서."]


@pytest.mark.parametrize("chat", [CHATML, THINKING, CHATML.replace("<|im_end|>", "{{ eos_token }}")])
def test_where_the_chat_template_ends_a_turn_nothing_is_added(chat: str) -> None:
    whole, plain = (encode_turns({"messages": TALK[:2]}, encoding_of(chat, ended=ended)) for ended in (True, False))
    assert whole == plain


def test_a_turn_of_weight_0_is_not_trained() -> None:
    encoding = encoding_of(CHATML)
    first, last = ([TALK[0], TALK[1] | {"weight": a}, TALK[2], TALK[3] | {"weight": b}] for a, b in ((0, 1), (None, 0)))
    assert turns(encode_turns({"messages": first}, encoding), encoding) == ["네, 정말요 🌸<|im_end|>"]
    assert turns(encode_turns({"messages": last}, encoding), encoding) == ["그냥 봄이라서.<|im_end|>"]
    both = encode_turns({"messages": TALK}, encoding)
    assert encode_turns({"messages": last}, encoding) + encode_turns({"messages": first}, encoding) == both
    untrained = [turn | {"weight": 0} for turn in TALK]
    assert refusal({"messages": untrained}, encoding) == (
        "no turn in `messages` is an assistant's that is trained (its roles: user, assistant)"
    )
    half = refusal({"messages": [TALK[0], TALK[1] | {"weight": 0.5}]}, encoding)
    assert half == "message 2 has weight 0.5; it can be 0 (not trained) or 1"


def test_weight_0_where_earlier_turns_are_rewritten() -> None:
    encoding = encoding_of(THINKING)
    row = {"messages": [TALK[0], TALK[1] | {"weight": 0}, *TALK[2:]]}
    assert turns(encode_turns(row, encoding), encoding) == ["<think>\n\n</think>\n\n네, 정말요 🌸<|im_end|>"]


@pytest.mark.parametrize("weight", [None, 1])
def test_a_last_answer_that_is_empty(weight: int | None) -> None:
    empty = {"role": "assistant", "content": " \n", "weight": weight}
    row = {"messages": [*TALK[:3], empty]}
    assert refusal(row, encoding_of(CHATML)) == "the answer, the last assistant turn in `messages`, is empty"
    row["messages"][-1]["weight"] = 0
    assert turns(encode_turns(row, encoding_of(CHATML)), encoding_of(CHATML)) == ["그냥 봄이라서.<|im_end|>"]


def test_tools_that_the_chat_template_does_not_show_are_refused() -> None:
    calls = [{"function": {"name": "search", "arguments": "{}"}}]
    for call in ({"tool_calls": calls}, {"function_call": calls[0]["function"]}):
        row = {"messages": [TALK[0], {"role": "assistant", "content": None, **call}]}
        assert refusal(row, encoding_of(CHATML)).startswith(
            "the tokenizer's chat template leaves out the call of 'search' in message 2"
        )
    refused = refusal({"messages": TALK, "tools": calls}, encoding_of(CHATML))
    assert refused.startswith("the tokenizer's chat template does not show the tool 'search'")
    none = {"messages": [turn | {"tool_calls": None} for turn in TALK], "tools": []}
    assert encode_turns(none, encoding_of(CHATML)) == encode_turns({"messages": TALK}, encoding_of(CHATML))


def test_a_chat_template_that_leaves_out_a_part_of_an_answer() -> None:
    talk = [TALK[0], {"role": "assistant", "content": "<think>봄</think>그냥."}]
    assert refusal({"messages": talk}, encoding_of(CUTTING)).startswith(
        "the tokenizer's chat template leaves out the reasoning of message 2"
    )
    shouting = CHATML.replace("{{ message.content }}", "{{ message.content[:2] }}")
    assert "leaves out" in refusal({"messages": TALK[:2]}, encoding_of(shouting))
    assert turns(encode_turns({"messages": TALK[:2]}, encoding_of(CUTTING)), encoding_of(CUTTING)) == [
        "그냥 봄이라서.<|im_end|>"
    ]


def test_an_answer_that_the_prompt_begins_or_whose_white_space_changes() -> None:
    talk = [TALK[0], {"role": "assistant", "content": "<think>\n봄\n</think>\n그냥."}]
    begun = encoding_of(
        CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
    )
    assert turns(encode_turns({"messages": talk}, begun), begun) == ["봄\n</think>\n그냥.<|im_end|>"]
    spaced = encoding_of(
        CHATML.replace("{{ message.content }}", "{{ message.content.replace('</think>', '</think>\n') }}")
    )
    assert turns(encode_turns({"messages": talk}, spaced), spaced) == ["<think>\n봄\n</think>\n\n그냥.<|im_end|>"]


def test_names_that_sharegpt_has_for_the_assistant() -> None:
    encoding = encoding_of(CHATML)
    for name in ("chatgpt", "model", "bing", "bard"):
        talk = [{"from": "human", "value": "왜?"}, {"from": name, "value": "그냥 봄이라서."}]
        assert encode_turns({"conversations": talk}, encoding) == encode_turns({"messages": TALK[:2]}, encoding)
    talk[1]["from"] = "claude"
    assert refusal({"conversations": talk}, encoding).startswith("message 2 has the role 'claude'")


def test_a_chat_template_that_rewrites_earlier_turns() -> None:
    encoding = encoding_of(THINKING)
    assert turns(encode_turns({"messages": TALK}, encoding), encoding) == [
        "<think>\n\n</think>\n\n그냥 봄이라서.<|im_end|>",
        "<think>\n\n</think>\n\n네, 정말요 🌸<|im_end|>",
    ]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": TALK[:1]}, "no turn in `messages` is an assistant's that is trained (its roles: user)"),
        ({"messages": [TALK[0], {"role": "assistant", "content": " \n"}]}, "the answer, the last assistant turn"),
        ({"messages": []}, "the column `messages` is empty or not a list of turns"),
        ({"messages": None}, "the column `messages` is empty or not a list of turns"),
        ({"messages": "왜?"}, "the column `messages` is not a list of turns"),
        ({"messages": ["왜?"]}, "the column `messages` is not a list of turns"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1 has no content"),
        ({"messages": [{"content": "왜?"}]}, "message 1 has no role"),
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
        "the template is `chat`, but this tokenizer has no chat template; choose another template, or give one with "
        "--chat_template: a Jinja file, or chatml, gemma, llama3"
    )


def test_a_turn_is_never_cut() -> None:
    first, second = encode_turns({"messages": TALK}, encoding_of(CHATML))
    whole = len(second.token_ids)
    assert encode_turns({"messages": TALK}, encoding_of(CHATML, cutoff=whole)) == [first, second]
    (left,) = encode_turns({"messages": TALK}, encoding_of(CHATML, cutoff=whole - 1))
    assert (left.token_ids, left.turns_left_out) == (first.token_ids, 1)
    with pytest.raises(TooLongError) as caught:
        encode_turns({"messages": TALK}, encoding_of(CHATML, cutoff=len(first.token_ids) - 1))
    assert str(caught.value).startswith(f"{len(first.token_ids)} tokens are more than cutoff_len")


def test_prompts_are_trained_once() -> None:
    encoding = replace(encoding_of(CHATML), train_on_inputs=True)
    first, second = encode_turns({"messages": TALK}, encoding)
    assert first.targets == ((1, len(first.token_ids)),)
    assert second.targets == ((len(first.token_ids), len(second.token_ids)),)


def test_the_last_turn_alone() -> None:
    encoding = encoding_of(CHATML)
    assert (
        encode_turns({"messages": TALK}, replace(encoding, train_turns="last"))
        == encode_turns({"messages": TALK}, encoding)[1:]
    )


# ---- text is text ------------------------------------------------------------------------------------------------

_SHOWS_ALL = (
    "{{ tools | tojson }}\n{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments | tojson }})"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def conversation_with(word: str) -> dict[str, Any]:
    """Every place that a value may stand in holds the word."""
    call = {"function": {"name": "weather", "arguments": {"city": f"서울{word}", word: "x"}}}
    return {
        "system": f"규칙 {word}",
        "tools": [{"type": "function", "function": {"name": f"weather{word}", "parameters": {}}}],
        "messages": [
            {"role": "user", "content": f"{word}왜? {word}{word}"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": f"맑음{word}"},
            {"role": "assistant", "content": f"네{word}"},
        ],
    }


@pytest.mark.parametrize("word", ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|im_end|>\n<|im_start|>user\n"])
@pytest.mark.parametrize("template", [_SHOWS_ALL, _SHOWS_ALL.replace("tojson", "tojson(ensure_ascii=true)")])
def test_control_tokens_in_any_value_are_text(word: str, template: str) -> None:
    encoding = encoding_of(template)
    tokenizer = encoding.tokenizer
    special = {*tokenizer.added_tokens_decoder}
    found = encode_turns(conversation_with(word), encoding)
    plain = encode_turns(conversation_with("QQ"), encoding)
    for example, other in zip(found, plain, strict=True):
        controls = [[number for number in ids if number in special] for ids in (example.token_ids, other.token_ids)]
        assert controls[0] == controls[1] and len(controls[0]) > 2
        texts = [tokenizer.decode(ids) for ids in (example.token_ids, other.token_ids)]
        assert texts[0].replace(json.dumps(word)[1:-1], word) == texts[1].replace("QQ", word)
        assert example.special == word.partition("\n")[0] and not other.special
        assert example.targets[0][1] == len(example.token_ids)
    before = conversation_with(word) | {"messages": conversation_with(word)["messages"][:3]}
    assert encode_prompt(before, encoding) == found[1].token_ids[: found[1].targets[0][0]]


def test_kept_control_tokens_are_what_a_server_makes_of_them() -> None:
    encoding = replace(encoding_of(CHATML), special_tokens_in_text="keep")
    talk = [{"role": "user", "content": "a<|im_end|>b"}, {"role": "assistant", "content": "c"}]
    (example,) = encode_turns({"messages": talk}, encoding)
    served = encoding.tokenizer.apply_chat_template(talk[:1], add_generation_prompt=True, return_dict=False)
    assert example.token_ids[: example.targets[0][0]] == served and example.special == "<|im_end|>"
    assert encode_prompt({"messages": talk}, encoding) == served


def test_reasoning_in_the_content_is_read_though_its_tags_are_tokens() -> None:
    tokenizer = kinds.byte_level(chat=CUTTING, gpt4=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    encoding = make_encoding(tokenizer, None, cutoff_len=999, add_eos_token=True, train_on_inputs=False)
    talk = [{"role": "user", "content": "왜?"}, {"role": "assistant", "content": "<think>음</think>네"}]
    assert "leaves out the reasoning of message 2" in refusal({"messages": talk}, encoding)
    tokenizer.chat_template = CHATML
    (example,) = encode_turns({"messages": talk}, encoding)
    assert tokenizer.convert_tokens_to_ids("</think>") in example.token_ids and not example.special


def test_hangul_letters_of_a_conversation_become_syllables() -> None:
    encoding = encoding_of(_SHOWS_ALL)
    row = conversation_with("한글")
    letters = json.loads(unicodedata.normalize("NFD", json.dumps(row, ensure_ascii=False)))
    assert encode_turns(letters, encoding) == encode_turns(row, encoding)
    assert encode_turns(letters | {"messages": json.dumps(letters["messages"])}, encoding) == encode_turns(
        row, encoding
    )


# ---- another chat template ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", chat.shipped())
def test_a_shipped_chat_template_trains_every_turn(name: str) -> None:
    tokenizer = kinds.byte_level("<s>", chat=None, gpt4=True)
    chat.set_template(tokenizer, name, None)
    encoding = make_encoding(tokenizer, None, cutoff_len=999, add_eos_token=True, train_on_inputs=False)
    system = [{"role": "system", "content": "짧게 답하세요."}]
    examples = encode_turns({"messages": [*system, *TALK]}, encoding)
    assert [example.turn for example in examples] == [3, 5]
    for example in examples:
        before = [*system, *TALK][: example.turn - 1]
        served = tokenizer.apply_chat_template(before, add_generation_prompt=True, return_dict=False)
        assert example.token_ids[: example.targets[0][0]] == list(served)
        assert "짧게 답하세요." in tokenizer.decode(served)


def test_a_file_replaces_the_chat_template_and_its_variables_have_values(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(CHATML + "{{ '' if thinking else '<none>' }}{{ mood }}", encoding="utf-8")
    tokenizer = kinds.byte_level(chat=None, gpt4=True)
    chat.set_template(tokenizer, str(path), {"thinking": False, "mood": '밝게 "또박또박"', "top": None})
    served = tokenizer.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True)
    assert served.endswith('<|im_start|>assistant\n<none>밝게 "또박또박"')
    asked = tokenizer.apply_chat_template(TALK[:1], tokenize=False, thinking=True, mood="")
    assert asked.endswith("<|im_end|>\n")  # a request may set them


def test_a_chat_template_that_is_not_there() -> None:
    tokenizer = kinds.byte_level(chat=None, gpt4=True)
    with pytest.raises(TemplateError) as caught:
        chat.set_template(tokenizer, "chatlm", None)
    assert str(caught.value) == (
        "there is no chat template 'chatlm' (did you mean chatml?): it is not a file, and the shipped ones are chatml, "
        "gemma, llama3"
    )
    with pytest.raises(TemplateError, match="needs a chat template"):
        chat.set_template(tokenizer, None, {"enable_thinking": False})
    note = chat.set_template(tokenizer, "llama3", None)
    assert note and note.startswith("The tokenizer has no token <|start_header_id|>")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [*TALK, {"role": "user", "content": "더?"}], "id": 1},
        {"conversations": [{"from": turn["role"], "value": turn["content"]} for turn in TALK], "id": 1},
        {"prompt": TALK[:3], "completion": TALK[3:], "id": 1},
        {"messages": [*TALK[:3], TALK[3] | {"weight": 0}], "id": 1},
    ],
)
def test_a_row_up_to_its_last_answer(row: dict[str, Any]) -> None:
    assert chat.until_last_answer(row) == {"id": 1, "messages": TALK}
