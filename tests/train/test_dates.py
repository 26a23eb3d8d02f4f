"""A chat template that writes today's date: a run that is resumed another day trains the rows that it began with."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import transformers.utils.chat_template_utils as jinja

import byeori
from byeori.artifacts import layout
from byeori.data.conversation import conversation
from byeori.data.turns import prompt, turns
from byeori.train import run_dir
from chat_templates import CHATML
from tiny_models import byte_level_tokenizer, tiny_llama

DATED = "<|im_start|>system\n{{ strftime_now('%d %b %Y') }}<|im_end|>\n" + CHATML
TALK = {"messages": [{"role": "user", "content": "왜?"}, {"role": "assistant", "content": "그냥."}]}


class Clock(datetime):
    """What `datetime.now()` says to transformers, and `date.today()` to byeori."""

    said = datetime(2026, 11, 30)

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return cls.said

    @classmethod
    def today(cls) -> datetime:  # type: ignore[override]
        return cls.said


def test_the_date_that_is_given_is_written() -> None:
    tokenizer = byte_level_tokenizer(chat_template=DATED)
    (turn,) = turns(conversation(TALK), tokenizer, datetime(2024, 2, 29))
    assert turn.prompt.startswith("<|im_start|>system\n29 Feb 2024<|im_end|>\n")
    served = tokenizer.apply_chat_template(TALK["messages"][:1], tokenize=False, add_generation_prompt=True)
    assert prompt(conversation({"messages": TALK["messages"][:1]}), tokenizer) == served  # today


def test_a_run_goes_on_the_next_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows, output = tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "out"
    tokenizer = byte_level_tokenizer(chat_template=DATED)
    tiny_llama(len(tokenizer)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    rows.write_text((json.dumps(TALK, ensure_ascii=False) + "\n") * 4, encoding="utf-8")
    monkeypatch.setattr(jinja, "datetime", Clock)
    monkeypatch.setattr(run_dir, "date", Clock)
    given = {"base_model": model, "data_path": rows, "output_dir": output, "dtype": "float32", "batch_size": 2}
    byeori.sft(**given, max_steps=1, save_steps=1)
    record = json.loads((output / "checkpoint-1" / layout.BASE).read_text(encoding="utf-8"))
    assert record["day"] == "2026-11-30"
    monkeypatch.setattr(Clock, "said", datetime(2026, 12, 1))
    assert byeori.sft(**given, max_steps=2, resume_from_checkpoint="latest").steps == 2
    again = json.loads((output / "checkpoint-2" / layout.BASE).read_text(encoding="utf-8"))
    assert again == record
