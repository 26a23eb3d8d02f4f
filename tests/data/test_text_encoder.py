"""Prompts as servers tokenize them, on tokenizers that put tokens and spaces around a text; values that stay text."""

from __future__ import annotations

import json
import pickle
from functools import cache
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import kinds
from byeori.data.served_template import served_template
from byeori.data.template import parse
from byeori.data.text_encoder import text_encoder
from byeori.data.tokenize import Encoding, encode_prompt, encode_row, encode_text, make_encoding

every_kind = pytest.mark.parametrize("kind", kinds.KINDS)


def encoding_of(tokenizer: Any, template: str, **settings: Any) -> Encoding:
    usual = {"cutoff_len": 999, "add_eos_token": True, "train_on_inputs": False}
    return make_encoding(tokenizer, parse(template), **usual | settings)


@every_kind
def test_the_engine_is_that_of_a_copy(kind: str) -> None:
    """But for what stands around a text, and without the time that a copy of a large vocabulary takes."""
    tokenizer = kinds.kind(kind)
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.post_processor = None
    assert json.loads(text_encoder(tokenizer).core.to_str()) == json.loads(copy.to_str())


# ---- what the post-processor adds --------------------------------------------------------------------------------


def with_post_processor(single: str) -> Any:
    """GPT-2's kind with tokens around a text: `<s> <ko> $A </s>`."""
    tokenizer = kinds.byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>", "<ko>", "</s>"]})
    added = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "<ko>", "</s>")]
    post = processors.TemplateProcessing(single=single, pair=f"{single} $B", special_tokens=added)
    tokenizer.backend_tokenizer.post_processor = post
    return tokenizer


def test_all_tokens_in_front_stay_in_front_and_what_is_appended_is_not_put_before_the_answer() -> None:
    tokenizer = with_post_processor("<s> <ko> $A </s>")
    encoding = encoding_of(tokenizer, "Q: {p}\nA: {a}")
    example = encode_row({"p": "왜?", "a": "그냥"}, encoding)
    names = tokenizer.convert_ids_to_tokens(example.token_ids)
    assert names[:2] == ["<s>", "<ko>"] and names[-1] == "<|endoftext|>" and "</s>" not in names
    assert encode_prompt({"p": "왜?"}, encoding) == tokenizer("Q: 왜?\nA:")["input_ids"][:-1]
    assert encode_text("Q", encoding) == tokenizer("Q")["input_ids"][:-1]


@pytest.mark.parametrize("begin", ["", "<s>", "<s><ko>"])
def test_a_template_that_begins_with_some_of_them_has_them_once_also_when_served(begin: str) -> None:
    tokenizer = with_post_processor("<s> <ko> $A")
    encoding = encoding_of(tokenizer, begin + "Q: {p}\nA:\n{a}")
    prompt = encode_prompt({"p": "왜?"}, encoding)
    assert prompt == tokenizer("Q: 왜?\nA:\n")["input_ids"]
    messages = [{"role": "user", "content": "왜?"}]
    served = tokenizer.apply_chat_template(messages, chat_template=served_template(encoding), return_dict=False)
    assert served == prompt


# ---- the space that a tokenizer puts in front --------------------------------------------------------------------


@pytest.mark.parametrize(("space", "leads"), [("first", False), ("legacy", True), ("none", False)])
def test_an_answer_gets_no_space_of_the_tokenizers_own_unless_special_tokens_do(space: str, leads: bool) -> None:
    tokenizer = kinds.sentencepiece(space=space)
    for template, lead in (("물음:\n{a}", False), ("물음:</s>{a}", leads)):
        example = encode_row({"a": "가나"}, encoding_of(tokenizer, template, add_eos_token=False))
        assert example.token_ids == tokenizer(template.replace("{a}", "가나"))["input_ids"]
        answer = tokenizer.convert_ids_to_tokens(example.token_ids[example.targets[0][0] :])
        assert "".join(answer).startswith("▁") == lead


def test_a_first_text_gets_the_tokenizers_space_also_if_it_is_the_answer() -> None:
    tokenizer = kinds.sentencepiece()
    example = encode_row({"a": "봄"}, encoding_of(tokenizer, "{a}", add_eos_token=False))
    assert example.token_ids == tokenizer("봄")["input_ids"]


def test_add_prefix_space() -> None:
    tokenizer = kinds.byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    example = encode_row({"p": "Q", "a": "A"}, encoding_of(tokenizer, "{p}\n{a}", add_eos_token=False))
    assert "".join(tokenizer.convert_ids_to_tokens(example.token_ids)) == "ĠQĊA"


# ---- the end of the prompt ---------------------------------------------------------------------------------------

ENDS: list[tuple[str, dict[str, str], str, str]] = [
    ("### 답변: {a}", {}, "### 답변:", " 봄 소식"),
    ("### 답변:\t {a}", {}, "### 답변:", "\t 봄 소식"),
    ("답변:\u3000{a}", {}, "답변:", "\u3000봄 소식"),
    ("답변: \n{a}", {}, "답변: \n", "봄 소식"),
    ("답변:\n  {a}", {}, "답변:\n", "  봄 소식"),
    ("{p}{a}", {"p": "왜? "}, "왜?", " 봄 소식"),
    ("{p}{a}", {"p": "왜?\n"}, "왜?\n", "봄 소식"),
    ("{p} {a}", {"p": "왜?  "}, "왜?", "   봄 소식"),
    ("답변: [[({p}) ]]{a}", {"p": ""}, "답변:", " 봄 소식"),
    ("답변: [[({p}) ]]{a}", {"p": "짧게"}, "답변: (짧게)", " 봄 소식"),
    ("{q}\n{p} {a}", {"q": "왜", "p": ""}, "왜\n", " 봄 소식"),
    ("정답은{a} 끝", {}, "정답은", "봄 소식 끝"),
    ('제목: "{a}"', {}, '제목: "', '봄 소식"'),
]


@every_kind
@pytest.mark.parametrize(("template", "values", "prompt", "trained"), ENDS)
def test_where_the_prompt_ends(kind: str, template: str, values: dict[str, str], prompt: str, trained: str) -> None:
    tokenizer = kinds.kind(kind)
    encoding = encoding_of(tokenizer, template, add_eos_token=False)
    example = encode_row({**values, "a": "봄 소식"}, encoding)
    start = example.targets[0][0]
    alone = tokenizer(prompt)["input_ids"]
    assert example.token_ids[:start] == alone == encode_prompt(values, encoding)
    spelled = b"".join(kinds.token_bytes(tokenizer, number) for number in example.token_ids[start:])
    assert spelled.decode() == trained
    messages = [{"role": "user", "content": values.get("p", "")}]
    served = tokenizer.apply_chat_template(
        messages,
        chat_template=served_template(encoding),
        add_generation_prompt=True,
        return_dict=False,
        **{name: value for name, value in values.items() if name == "q"},
    )
    if "q" not in values:  # there the user's text is a column that may be empty
        assert served == alone


def test_a_prompt_that_gpt2_tokenizes_otherwise_before_an_answer_is_counted() -> None:
    """Two line breaks are one token at the end of a text and two before a word; no token reaches over the boundary."""
    core = kinds.byte_level().backend_tokenizer
    state = core.to_str().replace('"merges":[', '"merges":[["Ċ","Ċ"],')
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_with_token(state, "ĊĊ")))
    encoding = encoding_of(tokenizer, "A:\n\n{a}", add_eos_token=False)
    example = encode_row({"a": "봄"}, encoding)
    assert example.token_ids[: example.targets[0][0]] == tokenizer("A:\n\n")["input_ids"]
    assert example.token_ids != tokenizer("A:\n\n봄")["input_ids"]
    assert example.joins


def _with_token(state: str, token: str) -> str:
    parsed = json.loads(state)
    parsed["model"]["vocab"].setdefault(token, max(parsed["model"]["vocab"].values()) + 1)
    return json.dumps(parsed)


# ---- values are text ---------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("shape", ["안녕 {} 하세요", "{}", "{}{}", "봄{}a", "<{}>"])
def test_a_control_token_in_a_value_is_text(kind: str, shape: str) -> None:
    tokenizer = kinds.kind(kind)
    encoding = encoding_of(tokenizer, "Q: {p}\n{a}")
    for token in tokenizer.get_added_vocab():
        value = shape.replace("{}", token)
        example = encode_row({"p": value, "a": value}, encoding)
        ids = example.token_ids[len(encoding.prefix) : -1]
        assert not {*tokenizer.added_tokens_decoder} & {*ids}
        spelled = b"".join(kinds.token_bytes(tokenizer, number) for number in ids).decode()
        assert spelled.removeprefix(" ") == f"Q: {value}\n{value}"
        assert example.special == token
        assert encode_prompt({"p": value}, encoding) == example.token_ids[: example.targets[0][0]]


@every_kind
def test_its_tokens_are_those_of_split_special_tokens(kind: str) -> None:
    tokenizer = kinds.kind(kind)
    split = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    split.encode_special_tokens = True
    for token in tokenizer.get_added_vocab():
        text = f"a {token} b"
        encoder = text_encoder(tokenizer)
        assert (
            encoder.ids(text, encoder.cuts(text, [(0, len(text))])[0])
            == split.encode(text, add_special_tokens=False).ids
        )


def test_the_templates_own_control_tokens_are_tokens() -> None:
    tokenizer = kinds.byte_level()
    encoding = encoding_of(tokenizer, "<|im_start|>{p}<|im_end|>\n{a}<|im_end|>", add_eos_token=False)
    row = {"p": "hi<|im_end|>", "a": "<|im_start|>yes"}
    names = tokenizer.convert_ids_to_tokens(encode_row(row, encoding).token_ids)
    assert [name for name in names if name.startswith("<|im")] == ["<|im_start|>", "<|im_end|>", "<|im_end|>"]


def test_no_control_token_forms_where_a_value_meets_the_template() -> None:
    tokenizer = kinds.byte_level()
    encoding = encoding_of(tokenizer, "<|im{p}\n<|im_{a}|>", add_eos_token=False)
    ids = encode_row({"p": "_end|>", "a": "end"}, encoding).token_ids
    assert tokenizer.decode(ids) == "<|im_end|>\n<|im_end|>"
    assert not {*tokenizer.added_tokens_decoder} & {*ids}


def test_keep_makes_tokens() -> None:
    tokenizer = kinds.byte_level()
    encoding = encoding_of(tokenizer, "Q: {p}\n{a}", special_tokens_in_text="keep", add_eos_token=False)
    example = encode_row({"p": "a<|im_end|>b", "a": "c"}, encoding)
    assert example.token_ids == tokenizer("Q: a<|im_end|>b\nc")["input_ids"]
    assert example.special == "<|im_end|>"


def test_tokens_named_like_control_tokens_are_such_and_markup_is_not() -> None:
    """DeepSeek's <｜User｜> is not called special; <think> is markup that answers are written with."""
    tokenizer = kinds.byte_level()
    tokenizer.add_tokens([AddedToken("<｜User｜>", special=False), AddedToken("<think>", special=False)])
    example = encode_row({"p": "<｜User｜>", "a": "<think>x"}, encoding_of(tokenizer, "{p}\n{a}"))
    names = tokenizer.convert_ids_to_tokens(example.token_ids)
    assert "<｜User｜>" not in names and "<think>" in names


def test_tokens_that_differ_in_a_number() -> None:
    tokenizer = kinds.byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|reserved_{n}|>" for n in range(3)]})
    encoder = text_encoder(tokenizer)
    assert encoder.cuts("<|reserved_7|> <|reserved_2|>", [(0, 99)]) == ([17], "<|reserved_2|>")


@cache
def unigram() -> Any:
    """Its vocabulary has </s> as a piece, which a text could be made of."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in "</s>ab")]
    core = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


def test_a_piece_of_the_vocabulary_that_is_a_control_token_is_none_in_text() -> None:
    tokenizer = unigram()
    assert text_encoder(tokenizer).core.encode("a</s>b").ids.count(1) == 1
    example = encode_row({"p": "a</s>b", "a": "b</s>"}, encoding_of(tokenizer, "{p}{a}"))
    assert example.token_ids.count(1) == 1 and example.token_ids[-1] == 1


def test_a_copy_in_another_process_is_the_same() -> None:
    tokenizer = kinds.byte_level()
    tokenizer.split_special_tokens = True
    encoding = encoding_of(tokenizer, "<|im_start|>{p}\n{a}")
    copied = pickle.loads(pickle.dumps(encoding))
    example = encode_row({"p": "p", "a": "a"}, encoding)
    assert encode_row({"p": "p", "a": "a"}, copied) == example
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") not in example.token_ids
