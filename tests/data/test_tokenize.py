"""Targets against a brute-force oracle of bytes, on every kind of tokenizer; shortening; conversations."""

from __future__ import annotations

import functools
import unicodedata
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given
from hypothesis import strategies as st

import kinds
from byeori.data.template import Template, parse, resolve
from byeori.data.tokenize import Encoding, Example, encode_prompt, encode_row, make_encoding
from byeori.errors import TemplateError, TooLongError
from drawn import drawn

_PIECES = [
    "봄",
    "소식",
    "제목",
    " ",
    "  ",
    "\n",
    "\t",
    "a",
    "word",
    "the answer",
    "1",
    "234",
    "🌸",
    "👩‍👩‍👧",
    "é",
    "한글",
    ".",
    "'s",
]
TEXTS = st.one_of(
    st.lists(st.sampled_from(_PIECES), max_size=12).map("".join),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cn"], exclude_characters="▁"), max_size=12),
).map(lambda text: unicodedata.normalize("NFC", text))
ANSWERS = TEXTS.filter(lambda text: bool(text.strip()))
TEMPLATES = [
    "### 본문:\n{p}\n\n### 제목:\n{a}",
    "Title: {p} {a}",
    "{p}{a}",
    "{p}\n\n### Response:\n\n{a}",
    "<{p}> Title: {a} (end)\n끝",
    "a\t  {p}\t  {a}",
]
every_kind = pytest.mark.parametrize("kind", kinds.KINDS)
slowly = drawn(40, suppress_health_check=list(HealthCheck))


@functools.cache
def encoding_of(kind: str, template: str, cutoff: int = 4096, eos: bool = True, inputs: bool = False) -> Encoding:
    return make_encoding(
        kinds.kind(kind), parse(template), cutoff_len=cutoff, add_eos_token=eos, train_on_inputs=inputs
    )


def trained(example: Example) -> list[int]:
    return [index for start, end in example.targets for index in range(start, end)]


def characters(example: Example, text: str, encoding: Encoding) -> list[set[int]]:
    """The characters that each token writes, from the bytes of the tokens alone; added tokens write none."""
    spelled = [kinds.token_bytes(encoding.tokenizer, number) for number in example.token_ids]
    for at, number in enumerate(encoding.prefix):
        assert example.token_ids[at] == number
        spelled[at] = b""
    if encoding.eos is not None:
        assert example.token_ids[-1] == encoding.eos
        spelled[-1] = b""
    whole, data = b"".join(spelled), text.encode()
    front = len(whole) - len(data)
    assert whole == b" " * front + data
    assert front <= 1
    owners: list[set[int]] = [{0}] * front  # the space that a tokenizer puts before the first character is its own
    owners += [{index} for index, character in enumerate(text) for _ in character.encode()]
    out, at = [], 0
    for part in spelled:
        out.append(set().union(*owners[at : at + len(part)]))
        at += len(part)
    return out


# ---- targets -----------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("template", TEMPLATES)
@slowly
@given(prompt=TEXTS, answer=ANSWERS, eos=st.booleans())
def test_the_prompt_is_what_a_server_sends_and_exactly_the_rest_is_trained(
    kind: str, template: str, prompt: str, answer: str, eos: bool
) -> None:
    encoding = encoding_of(kind, template, eos=eos)
    row = {"p": prompt, "a": answer}
    text = "".join(segment.text for segment in parse(template).segments(row))
    assume(unicodedata.is_normalized("NFC", text) and "<s>" not in text)  # which is a token, not text
    asked = template.partition("{a}")[0].replace("{p}", prompt).rstrip(" \t\u00a0\u3000")
    assume(asked or encoding.prefix or encoding.eos is not None)
    example = encode_row(row, encoding)
    alone, joint = (encoding.tokenizer(words)["input_ids"] for words in (asked, text))
    start = example.targets[0][0]
    assert example.token_ids[: len(alone)] == alone
    assert example.targets == ((max(1, len(alone)), len(example.token_ids)),)
    written = characters(example, text, encoding)
    assert all(char >= len(asked) for chars in written[max(start, len(alone)) :] for char in chars)
    assert not asked or all(char < len(asked) for chars in written[: len(alone)] for char in chars)
    # where one text has a token boundary there, its tokens are the example's
    one_text = joint if joint[: len(alone)] == alone and len(joint) > len(alone) else None
    ids = example.token_ids[: len(example.token_ids) - eos]
    assert ids == one_text or (one_text is None and example.joins)
    assert example.joins == (bool(asked) and ids != joint)


@every_kind
@slowly
@given(prompt=TEXTS, answer=ANSWERS)
def test_the_trained_tokens_decode_to_the_answer(kind: str, prompt: str, answer: str) -> None:
    assume(answer == answer.strip() and unicodedata.is_normalized("NFC", prompt + "\n" + answer))
    encoding = encoding_of(kind, "### 본문:\n{p}\n### 제목:\n{a}")
    example = encode_row({"p": prompt, "a": answer}, encoding)
    ids = [example.token_ids[index] for index in trained(example)]
    assert ids.count(encoding.eos) == 1
    assert ids[-1] == encoding.eos
    assert encoding.tokenizer.decode(ids[:-1]) == answer


@every_kind
@slowly
@given(prompt=TEXTS, answer=ANSWERS)
def test_the_prompt_alone_is_what_was_trained_on(kind: str, prompt: str, answer: str) -> None:
    encoding = encoding_of(kind, "### 본문:\n{p}\n\n### 제목:\n{a}")
    row = {"p": prompt, "a": answer}
    example = encode_row(row, encoding)
    alone = encode_prompt(row, encoding)
    assert alone == encode_prompt({"p": prompt}, encoding) == encode_prompt(row | {"a": None}, encoding)
    assert alone == example.token_ids[: example.targets[0][0]]


@every_kind
def test_bos_and_eos_once(kind: str) -> None:
    tokenizer = kinds.kind(kind)
    for template in ("Q: {p}\nA: {a}", "{p}{a}"):
        example = encode_row({"p": "왜?", "a": "그냥"}, encoding_of(kind, template))
        assert example.token_ids.count(tokenizer.eos_token_id) == 1
        assert example.targets[-1][1] == len(example.token_ids)
        asked = tokenizer(template.partition(" {a}")[0].partition("{a}")[0].format(p="왜?"))["input_ids"]
        assert example.token_ids[: example.targets[0][0]] == asked
        if tokenizer.bos_token_id is not None:
            assert example.token_ids.count(tokenizer.bos_token_id) == 1


@every_kind
def test_text_that_begins_with_bos_and_ends_with_eos_has_them_once(kind: str) -> None:
    tokenizer = kinds.kind(kind)
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token
    example = encode_row({"p": "왜?", "a": "그냥"}, encoding_of(kind, bos + "Q: {p}\nA: {a}" + eos))
    assert example.token_ids.count(tokenizer.eos_token_id) == 1
    assert example.targets[-1][1] == len(example.token_ids)
    if bos:
        assert example.token_ids[0] == tokenizer.bos_token_id
        assert example.token_ids.count(tokenizer.bos_token_id) == 1


def test_bos_and_eos_may_be_the_same_token() -> None:
    tokenizer = kinds.byte_level("<|endoftext|>")
    encoding = make_encoding(tokenizer, parse("Q {p}\n{a}"), cutoff_len=99, add_eos_token=True, train_on_inputs=False)
    example = encode_row({"p": "왜?", "a": "그냥"}, encoding)
    assert [index for index, number in enumerate(example.token_ids) if number == encoding.eos] == [
        0,
        len(example.token_ids) - 1,
    ]
    assert tokenizer.decode(example.token_ids[slice(*example.targets[0])]) == "그냥<|endoftext|>"


@every_kind
def test_without_eos_only_the_answer_is_trained(kind: str) -> None:
    encoding = encoding_of(kind, "Q: {p}\n{a}", eos=False)
    example = encode_row({"p": "왜?", "a": "그냥"}, encoding)
    assert encoding.tokenizer.decode([example.token_ids[index] for index in trained(example)]) == "그냥"
    assert encoding.tokenizer.eos_token_id not in example.token_ids


@every_kind
def test_train_on_inputs_trains_all_but_the_first_token(kind: str) -> None:
    example = encode_row({"p": "왜?", "a": "그냥"}, encoding_of(kind, "Q: {p}\n{a}", inputs=True))
    assert example.targets == ((1, len(example.token_ids)),)
    assert example.token_ids == encode_row({"p": "왜?", "a": "그냥"}, encoding_of(kind, "Q: {p}\n{a}")).token_ids


def test_a_space_at_the_prompts_end_belongs_to_the_answer() -> None:
    encoding = encoding_of("gpt2", "Title: {a}", eos=False)
    example = encode_row({"a": "봄"}, encoding)
    assert encoding.tokenizer.convert_ids_to_tokens(example.token_ids) == ["Title", ":", "Ġë", "´Ħ"]
    assert example.targets == ((2, 4),)
    assert not example.joins
    assert encode_prompt({}, encoding) == example.token_ids[:2]


def test_a_final_letter_of_the_answer_joins_no_syllable_of_the_prompt() -> None:
    encoding = encoding_of("qwen", "{p}{a}", eos=False)
    example = encode_row({"p": "a하", "a": "\u11ab글"}, encoding)  # 하 and a final ㄴ make 한
    assert example.token_ids[: example.targets[0][0]] == encoding.tokenizer("a하")["input_ids"]
    assert encoding.tokenizer.decode([example.token_ids[index] for index in trained(example)]) == "\u11ab글"
    assert example.joins


def test_an_empty_answer_is_refused() -> None:
    for answer in ("", " \n"):
        with pytest.raises(TemplateError, match=r"^the answer, column 'a', is empty$"):
            encode_row({"p": "왜", "a": answer}, encoding_of("gpt2", "{p}\n{a}"))


def test_a_row_of_one_token_has_nothing_to_train() -> None:
    with pytest.raises(TemplateError, match=r"^no token is left to train, because nothing comes before the answer$"):
        encode_row({"p": "", "a": "a"}, encoding_of("gpt2", "{p}{a}", eos=False))
    assert encode_row({"p": "", "a": "a"}, encoding_of("gpt2-bos", "{p}{a}", eos=False)).targets == ((1, 2),)


def test_a_prompt_whose_answer_is_no_text_is_a_prompt() -> None:
    encoding = encoding_of("gpt2", "Q: {p}\n{a}")
    expected = encode_prompt({"p": "왜"}, encoding)
    assert all(encode_prompt({"p": "왜", "a": answer}, encoding) == expected for answer in (None, "", " ", 3))


def test_a_tokenizer_without_offsets_is_refused() -> None:
    with pytest.raises(TemplateError, match="object gives no character offsets"):
        make_encoding(object(), parse("{a}"), cutoff_len=9, add_eos_token=True, train_on_inputs=False)


def test_truncation_and_padding_left_in_the_tokenizers_file_do_not_matter() -> None:
    tokenizer = kinds.byte_level()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    encoding = make_encoding(tokenizer, parse("Q: {p}\n{a}"), cutoff_len=99, add_eos_token=True, train_on_inputs=False)
    row = {"p": "긴 질문입니다", "a": "답"}
    assert encode_row(row, encoding).token_ids == encode_row(row, encoding_of("gpt2", "Q: {p}\n{a}")).token_ids


# ---- cutoff_len --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "llama2", "gemma"])
@drawn(80, suppress_health_check=list(HealthCheck))
@given(x=TEXTS, y=TEXTS, answer=ANSWERS, cutoff=st.integers(8, 60))
def test_only_the_longest_column_is_shortened(kind: str, x: str, y: str, answer: str, cutoff: int) -> None:
    template = "A\n{x}\n\nB\n{y}\n\nC\n{a}"
    row = {"x": x, "y": y, "a": answer}
    whole = encode_row(row, encoding_of(kind, template))
    try:
        example = encode_row(row, encoding_of(kind, template, cutoff))
    except TooLongError as error:
        assert len(whole.token_ids) > cutoff
        assert "\n" not in str(error)
        return
    assert len(example.token_ids) <= cutoff
    assert example.shortened == len(whole.token_ids) - len(example.token_ids)
    if len(whole.token_ids) <= cutoff:
        assert example == whole
        return
    ids = example.token_ids[: len(example.token_ids) - 1]
    written = b"".join(kinds.token_bytes(kinds.kind(kind), n) for n in ids[len(encoding_of(kind, template).prefix) :])
    text = written.decode().removeprefix(" ") if kind == "llama2" else written.decode()
    cuts = [f"A\n{x[:n]}\n\nB\n{y}\n\nC\n{answer}" for n in range(len(x))]
    cuts += [f"A\n{x}\n\nB\n{y[:n]}\n\nC\n{answer}" for n in range(len(y))]
    assert text in cuts


ROW = {"x": "one two three four five six", "y": "일 이", "a": "the answer"}
SHAPE = "A\n{x}\nB\n{y}\nC\n{a}"


def length(**changes: str) -> int:
    return len(encode_row(ROW | changes, encoding_of("gpt2", SHAPE)).token_ids)


def test_a_row_of_exactly_cutoff_len_is_untouched() -> None:
    whole = encode_row(ROW, encoding_of("gpt2", SHAPE))
    assert encode_row(ROW, encoding_of("gpt2", SHAPE, len(whole.token_ids))) == whole
    shorter = encode_row(ROW, encoding_of("gpt2", SHAPE, len(whole.token_ids) - 1))
    assert shorter.shortened == 1
    text = kinds.kind("gpt2").decode(shorter.token_ids)
    assert text.startswith("A\none two three four five")
    assert text.endswith("\nB\n일 이\nC\nthe answer<|endoftext|>")


def test_the_longest_column_may_go_altogether_and_no_other_is_touched() -> None:
    least = length(x="")
    assert kinds.kind("gpt2").decode(encode_row(ROW, encoding_of("gpt2", SHAPE, least)).token_ids) == (
        "A\n\nB\n일 이\nC\nthe answer<|endoftext|>"
    )
    with pytest.raises(TooLongError) as caught:
        encode_row(ROW, encoding_of("gpt2", SHAPE, least - 1))
    assert str(caught.value) == (
        f"{length()} tokens are more than cutoff_len {least - 1}, and without its longest prompt column, "
        f"'x', they are still {least}"
    )


def test_a_row_without_a_prompt_column_is_not_shortened() -> None:
    with pytest.raises(TooLongError, match=r"tokens are more than cutoff_len 3, and there is no prompt column to sh"):
        encode_row({"a": "the answer is long"}, encoding_of("gpt2", "Say: {a}", 3))


def test_a_shortened_rows_prompt_is_the_shortened_one() -> None:
    encoding = encoding_of("gpt2", SHAPE, length() - 5)
    example = encode_row(ROW, encoding)
    assert example.shortened >= 5
    assert encode_prompt(ROW, encoding) == example.token_ids[: example.targets[0][0]]


def test_shipped_templates_keep_their_heading_when_shortened() -> None:
    template: Template | None = resolve("title-ko")
    encoding = make_encoding(kinds.kind("llama3"), template, cutoff_len=120, add_eos_token=True, train_on_inputs=False)
    example = encode_row({"document": "본문입니다. " * 200, "title": "봄 소식"}, encoding)
    text = encoding.tokenizer.decode(example.token_ids)
    assert 118 <= len(example.token_ids) <= 120  # a whole character goes, also where it is three tokens
    assert "제목을 만드세요.\n\n### 본문:\n본문입니다." in text
    assert text.endswith("\n\n### 제목:\n봄 소식<|endoftext|>")


def test_the_row_keeps_its_position() -> None:
    row: dict[str, Any] = {"p": "왜", "a": "그냥", "__row__": 7}
    assert encode_row(row, encoding_of("gpt2", "{p}\n{a}")).row == 7
