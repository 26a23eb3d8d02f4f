"""Conversations: the prompt of every turn, what an answer is kept as, and pairs that DPO accepts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import byeori
from byeori.artifacts import saved_model
from byeori.data import template
from byeori.data.tokenize import make_encoding
from byeori.errors import TemplateError
from byeori.evaluate.chat import Chat
from tiny_models import byte_level_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat(spec: str | None = None, **given: str) -> Chat:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = CHATML
    chosen = template.parse(spec) if spec else None
    encoding = make_encoding(tokenizer, chosen, cutoff_len=1000, add_eos_token=True, train_on_inputs=False)
    return Chat(encoding=encoding, **given)  # type: ignore[arg-type]


def test_the_prompt_of_every_turn_is_the_servers() -> None:
    talk = chat(system="짧게 답해라.")
    tokenizer = talk.encoding.tokenizer
    said = [{"role": "system", "content": "짧게 답해라."}]
    for question, answer in (("봄은 언제?", "3월."), ("가을은?", "9월.")):
        said.append({"role": "user", "content": question})
        expected = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
        assert talk.ask({"message": question}) == expected
        talk.add("tuned", answer)
        assert talk.prompt_again() == expected
        said.append({"role": "assistant", "content": answer})


def test_a_template_makes_every_question_a_row_of_its_own() -> None:
    talk = chat("[[{context}\n]]Q: {question}\nA: {answer}")
    assert talk.columns == ["context", "question"]
    first = talk.ask({"context": "", "question": "봄?"})
    talk.add("tuned", "3월")
    assert talk.ask({"context": "", "question": "봄?"}) == first
    assert talk.encoding.tokenizer.decode(first) == talk.template.prompt({"question": "봄?"})  # type: ignore[union-attr]


def test_the_conversation_goes_on_with_the_chosen_answer() -> None:
    talk = chat()
    talk.ask({"message": "a"})
    talk.add("base", "b1")
    talk.add("tuned", "b2")
    assert talk.messages[-1]["content"] == "b2"
    pair = talk.pair("b1", "b2")
    assert pair == {
        "prompt": [{"role": "user", "content": "a"}],
        "chosen": [{"role": "assistant", "content": "b1"}],
        "rejected": [{"role": "assistant", "content": "b2"}],
    }
    assert talk.messages == [*pair["prompt"], *pair["chosen"]]


@pytest.mark.parametrize("pair", [("b", "b "), ("", "b"), ("b", " ")])
def test_answers_that_are_no_pair(pair: tuple[str, str]) -> None:
    talk = chat()
    talk.ask({"message": "a"})
    talk.add("tuned", "b")
    with pytest.raises(TemplateError, match=r"empty|the same"):
        talk.pair(*pair)


def test_a_question_without_an_answer_is_taken_back() -> None:
    talk = chat()
    talk.ask({"message": "a"})
    talk.forget_question()
    assert talk.messages == []
    with pytest.raises(TemplateError, match="nothing has been asked"):
        talk.prompt_again()


@pytest.mark.parametrize("spec", [None, "title-ko"])
def test_dpo_trains_on_the_pairs(tiny_model: Path, trained: Path, tmp_path: Path, spec: str | None) -> None:
    saved = saved_model.find(str(trained))
    saved.tokenizer.chat_template = CHATML
    talk = Chat(encoding=saved_model.encoding(saved, template.resolve(spec) if spec else None))
    with (tmp_path / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for question in ("봄이 왔다.", "가을이 왔다."):
            talk.ask({"document": question, "message": question})
            talk.add("base", "아니다")
            talk.add("tuned", "그렇다")
            file.write(json.dumps(talk.pair("그렇다", "아니다"), ensure_ascii=False) + "\n")
    given = {} if spec else {"template": "chat", "chat_template": "chatml"}
    base = trained if spec else tiny_model
    result = byeori.dpo(
        base_model=base,
        data_path=tmp_path / "pairs.jsonl",
        output_dir=tmp_path / "preferred",
        max_steps=2,
        batch_size=2,
        dtype="float32",
        cutoff_len=256,
        **given,  # type: ignore[arg-type]
    )
    assert (tmp_path / "preferred" / "adapter_model.safetensors").is_file() and result is not None
