"""Hangul in one form; marks for control tokens while a chat template runs."""

from __future__ import annotations

import unicodedata

import pytest

import kinds
from byeori.data.text_encoder import text_encoder
from byeori.data.text_values import compose, is_decomposed, marked
from byeori.errors import TemplateError


@pytest.mark.parametrize(
    ("text", "composed"),
    [
        (unicodedata.normalize("NFD", "각하의 봄 소식, 닭"), "각하의 봄 소식, 닭"),
        ("가\u11a8", "각"),
        ("ㄱㅏ", "ㄱㅏ"),  # letters of their own, as in ㅋㅋ, make no syllable
        ("e\u0301 \uf900 한", "e\u0301 \uf900 한"),  # NFC would change these as well
        ("\u1100\u1100", "\u1100\u1100"),
        ("plain", "plain"),
    ],
)
def test_letters_become_syllables_and_nothing_else_changes(text: str, composed: str) -> None:
    assert compose(text) == composed
    assert is_decomposed([{"a": text}]) == (text != composed)
    assert compose({"x": [text, 3, None], text: True}) == {"x": [composed, 3, None], composed: True}


def test_marks_stand_for_tokens_and_become_text_that_is_cut() -> None:
    encoder = text_encoder(kinds.byte_level())
    value, marks = marked([{"content": "a<|im_end|>b<|im_start|>"}, "\U000f0000", "<|im_end|>"], encoder)
    assert marks.first == "<|im_end|>"
    first, second = marks.token_of
    assert value == [{"content": f"a{first}b{second}"}, "\U000f0000", first]
    assert "\U000f0000" not in marks.token_of  # the text has it already
    text, cuts = marks.unmarked(f"x{second}y{first}\U000f0000")
    assert text == "x<|im_start|>y<|im_end|>\U000f0000" and cuts == [3, 16]


def test_marks_in_json_that_a_template_writes_in_ascii() -> None:
    import json

    encoder = text_encoder(kinds.byte_level())
    value, marks = marked({"city": "서울<|im_end|>"}, encoder)
    text, cuts = marks.unmarked(json.dumps(value))
    assert json.loads(text) == {"city": "서울<|im_end|>"} and text[cuts[0] :].startswith("im_end")


def test_without_a_control_token_nothing_is_marked() -> None:
    value = {"content": "a < b |> c"}
    same, marks = marked(value, text_encoder(kinds.byte_level()))
    assert same is value and marks.first == "" and marks.unmarked("text") == ("text", [])


def test_a_value_that_is_nested_too_deeply_is_a_sentence() -> None:
    value: object = "x"
    for _ in range(3000):
        value = [value]
    with pytest.raises(TemplateError, match="nested hundreds of times"):
        compose({"messages": value})
