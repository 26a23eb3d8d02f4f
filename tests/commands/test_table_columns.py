"""Columns from the command line to the tokens: renamed, inside others, unused, and some that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

import byeori
from byeori.cli import main
from tiny_models import byte_level_tokenizer, short_sft

Said = Callable[..., tuple[dict[str, Any], str]]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def preview(tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Said:
    """`byeori preview` of some rows: its JSON with tokens, and what it says."""

    def run(rows: list[dict[str, Any]], *flags: object) -> tuple[dict[str, Any], str]:
        given = ["--base_model", tiny_model, "--data_path", write(tmp_path / "rows.jsonl", rows), *flags]
        assert main(["preview", *map(str, given), "--json", "--tokens"]) == 0
        found = json.loads(capfd.readouterr().out)
        assert main(["preview", *map(str, given)]) == 0
        return found, capfd.readouterr().out

    return run


def texts(found: dict[str, Any]) -> list[str]:
    return [byte_level_tokenizer().decode(example["token_ids"]) for example in found["examples"]]


def trained(found: dict[str, Any]) -> list[str]:
    ids = [[i for a, b in item["trained"] for i in item["token_ids"][a:b]] for item in found["examples"]]
    return [byte_level_tokenizer().decode(each) for each in ids]


def test_columns_get_other_names(preview: Said) -> None:
    rows = [{"질문": "수도는?", "좋은\n답": "서울", "id": 2**70}]
    found, said = preview(rows, "--columns", "prompt=질문", "completion=좋은\n답")
    assert found["template"] == "prompt-completion"
    assert "수도는?" in texts(found)[0] and trained(found) == ["서울<|endoftext|>"]
    assert found["unread_columns"] == {"id": ""} and "\ncolumns that nothing reads: id\n" in said


def test_columns_inside_others(preview: Said) -> None:
    rows = [{"translation": {"ko": "하나", "en": "one"}}, {"translation": {"ko": "둘", "en": 2}}]
    found, _ = preview(rows, "--template", "{translation.ko}\n{translation.en}")
    assert texts(found) == ["하나\none<|endoftext|>", "둘\n2<|endoftext|>"]
    renamed, _ = preview(rows, "--columns", "prompt=translation.ko", "completion=translation.en")
    assert trained(renamed) == trained(found)


@pytest.mark.parametrize(("answer", "text"), [(3, "3"), (0.5, "0.5"), (True, "true"), (2**80, str(2**80)), ("x", "x")])
def test_numbers_as_answers(preview: Said, answer: Any, text: str) -> None:
    found, _ = preview([{"q": "Q", "a": answer}, {"q": "Q", "a": "text"}], "--template", "{q}\n{a}")
    assert trained(found)[0] == f"{text}<|endoftext|>"


def test_columns_that_nothing_reads_stop_nothing(preview: Said) -> None:
    rows = [
        {"document": "가", "title": "나", "meta": {"a": 1}, "n": 2**64, "mixed": "x"},
        {"document": "다", "title": "라", "meta": [1], "n": "?", "mixed": [[{"deep": ["\ud800"]}]]},
    ]
    plain, _ = preview([{name: row[name] for name in ("document", "title")} for row in rows])
    found, _ = preview(rows)
    assert found.pop("unread_columns") == {"meta": "", "n": "", "mixed": ""}
    assert found == plain


def test_labels_as_answers(tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["부정", "긍정"])}
    )
    rows = datasets.Dataset.from_dict({"text": ["좋아요", "싫어요"], "label": [1, 0]}, features)
    rows.to_parquet(tmp_path / "a.parquet")
    given = ["--base_model", tiny_model, "--data_path", tmp_path / "a.parquet", "--template", "{text}\n{label}"]
    assert main(["preview", *map(str, given), "--json", "--tokens"]) == 0
    assert trained(json.loads(capfd.readouterr().out)) == ["긍정<|endoftext|>", "부정<|endoftext|>"]


def test_generate_and_compare_know_the_names_of_the_run(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = write(tmp_path / "rows.jsonl", [{"번역": {"ko": f"글 {n}"}, "제목": f"{n}"} for n in range(8)])
    out = tmp_path / "out"
    names = {"document": "번역.ko", "title": "제목"}
    short_sft(tiny_model, rows, out, max_steps=1, columns=names)
    byeori.compare(adapter=out, data_path=rows, output_dir=tmp_path / "compared", max_new_tokens=4, max_rows=2)
    compared = [json.loads(line) for line in (tmp_path / "compared" / "rows.jsonl").read_text().splitlines()]
    assert [(row["document"], row["title"]) for row in compared] == [("글 0", "0"), ("글 1", "1")]
    printed = capfd.readouterr()
    assert "2 of the 2 rows were trained on" in printed.out + printed.err
    other = write(tmp_path / "other.jsonl", [{"document": "새 글"}])  # a table with the names of the template
    assert len(byeori.generate(model=out, data_path=other, max_new_tokens=2)) == 1
