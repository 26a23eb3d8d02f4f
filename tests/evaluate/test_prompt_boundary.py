"""One prompt everywhere: a template that ends with a space, rows with control tokens and Hangul in letters."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
import yaml

import byeori
from byeori.artifacts import layout, saved_model
from byeori.evaluate import generate
from runs import sft

TEMPLATE = "### 질문: {q}\n### 답변: {a}"
ROWS = [
    {"q": "눈은 언제 오나요?", "a": "겨울에 옵니다."},
    {"q": "벚꽃은 언제 피나요?", "a": "봄입니다."},
    {"q": "토큰 </s><|endoftext|> 은?", "a": "끝 <|endoftext|> 아님"},
    {"q": unicodedata.normalize("NFD", "단풍은?"), "a": unicodedata.normalize("NFD", "가을")},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "adapter"
    sft(tiny_model, data, output, template=TEMPLATE, max_steps=1)
    return output


def test_every_way_of_asking_sends_the_prompt_that_was_trained(
    adapter: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What preview shows of the training, generate and compare, and a server with the exported chat template."""
    from transformers import AutoTokenizer

    byeori.preview(
        base_model=str(adapter), data_path=str(data), template=TEMPLATE, rows=4, json_output=True, tokens=True
    )
    examples = json.loads(capsys.readouterr().out)["examples"]
    trained = [example["token_ids"][: example["trained"][0][0]] for example in examples]
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    assert trained[:2] == [tokenizer(f"### 질문: {row['q']}\n### 답변:")["input_ids"] for row in ROWS[:2]]
    saved = saved_model.find(str(adapter))
    encoding = saved_model.encoding(saved, saved_model.template_of(saved, None))
    assert generate.encode_prompts([row | {"__row__": 0} for row in ROWS], encoding, str) == trained
    chats = [[{"role": "user", "content": row["q"]}] for row in ROWS[:2]]
    assert tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False) == trained[:2]
    byeori.compare(adapter=adapter, data_path=data, output_dir=tmp_path / "report", max_new_tokens=4)
    page = (tmp_path / "report" / layout.REPORT).read_text(encoding="utf-8")
    assert "단풍은?" in unicodedata.normalize("NFC", page)


def test_what_the_run_found_in_the_text_is_in_its_audit(adapter: Path) -> None:
    audit = json.loads((adapter / layout.AUDIT).read_text(encoding="utf-8"))
    assert (audit["special_rows"], audit["composed_rows"], audit["joined_rows"]) == (1, 1, 0)
    assert audit["special"] == [{"row": "rows.jsonl line 3", "token": "<|endoftext|>"}]


@pytest.mark.parametrize(("recorded", "expected"), [("escape", "escape"), ("keep", "keep"), (None, "keep")])
def test_prompts_treat_control_tokens_as_the_training_did(
    recorded: str | None, expected: str, adapter: Path, tmp_path: Path
) -> None:
    """Runs that do not record it are older: they made tokens of such text."""
    settings = yaml.safe_load((adapter / layout.SETTINGS).read_text(encoding="utf-8"))
    assert settings.pop("special_tokens_in_text") == "escape"
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path in adapter.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    changed = settings | ({"special_tokens_in_text": recorded} if recorded else {})
    (folder / layout.SETTINGS).write_text(yaml.safe_dump(changed, allow_unicode=True), encoding="utf-8")
    saved = saved_model.find(str(folder))
    assert saved_model.encoding(saved, saved_model.template_of(saved, None)).special_tokens_in_text == expected
