"""Prompts with finished rows in front: as text by hand, with the token ids of the whole text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from byeori.data import few_shots, template
from byeori.data.few_shots import encode_with_shots
from byeori.data.tokenize import Encoding, encode_prompt, encode_row, make_encoding

TEMPLATE = template.parse("문: {q}\n답: {a}")
SHOTS = [{"q": "하나", "a": "1"}, {"q": "둘", "a": "2"}]


def with_shots(row: dict[str, Any], shots: list[dict[str, Any]], encoding: Encoding) -> list[int]:
    (ids,) = encode_with_shots([row], [encode_prompt(row, encoding)], shots, encoding)
    return ids


def test_shots_of_a_template_stand_before_the_prompt(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    encoding = make_encoding(tokenizer, TEMPLATE, cutoff_len=512, add_eos_token=True, train_on_inputs=False)
    ids = with_shots({"q": "셋", "a": "3"}, SHOTS, encoding)
    assert tokenizer.decode(ids) == "문: 하나\n답: 1\n\n문: 둘\n답: 2\n\n문: 셋\n답:"
    assert encoding.eos not in ids
    own = encode_prompt({"q": "셋", "a": "3"}, encoding)
    assert ids[-len(own) :] == own


def test_a_prefix_of_the_tokenizer_stands_once(tiny_model: Path) -> None:
    from tokenizers import processors

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    encoding = make_encoding(tokenizer, TEMPLATE, cutoff_len=512, add_eos_token=True, train_on_inputs=False)
    assert encoding.prefix == (start,)
    ids = with_shots({"q": "셋", "a": "3"}, SHOTS, encoding)
    assert ids[0] == start and ids.count(start) == 1


def test_shots_of_a_chat_are_turns_behind_the_system_message(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    encoding = make_encoding(tokenizer, None, cutoff_len=512, add_eos_token=True, train_on_inputs=False)
    turns = [{"role": "system", "content": "짧게"}, {"role": "user", "content": "셋"}]
    other = [{"role": "user", "content": "둘"}, {"role": "assistant", "content": "2"}]
    shot = [{"role": "system", "content": "다르게"}, *other]
    row = {"messages": [*turns, {"role": "assistant", "content": "3"}]}
    text = tokenizer.decode(with_shots(row, [{"messages": shot}], encoding))
    said = [("system", "짧게"), ("user", "둘"), ("assistant", "2"), ("user", "셋")]
    wanted = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in said)
    assert text == wanted + "<|im_start|>assistant\n"


def test_a_shot_is_encoded_once_for_all_rows(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    encoding = make_encoding(tokenizer, TEMPLATE, cutoff_len=512, add_eos_token=True, train_on_inputs=False)
    rows = [{"q": f"물음 {number}", "a": "답"} for number in range(4)]
    prompts = [encode_prompt(row, encoding) for row in rows]
    alone = [with_shots(row, SHOTS, encoding) for row in rows]
    encoded = []
    monkeypatch.setattr(few_shots, "encode_row", lambda *args: (encoded.append(args), encode_row(*args))[1])
    assert encode_with_shots(rows, prompts, SHOTS, encoding) == alone
    assert len(encoded) == len(SHOTS)
