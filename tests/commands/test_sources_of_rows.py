"""From the command line: sources in shares, rows for evaluation of their own, documents in pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import byeori
from byeori.cli import main
from tiny_models import short_sft


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def titles(path: Path, count: int, words: int = 1) -> Path:
    return write(path, [{"document": f"{path.stem} {n}", "title": "제목 " * words + str(n)} for n in range(count)])


def test_weights_are_said_and_kept(tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    paths = [f"{titles(tmp_path / 'a.jsonl', 50)}:0.7", f"{titles(tmp_path / 'b.jsonl', 12, 9)}:0.3"]
    given = ["--base_model", tiny_model, "--data_path", *paths, "--cutoff_len", 512]
    assert main(["preview", *map(str, given), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert [(each["rows"], each["of"]) for each in found["mix"]] == [(28, 50), (12, 12)] and found["train_rows"] == 40
    assert main(["preview", *map(str, given), "--rows", "0"]) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert f"mixed by rows: {tmp_path}/a.jsonl 28 of 50 rows (70.0%)" in said.replace("- ", "-")
    assert main(["preview", *map(str, given), "--json", "--mix_by", "tokens"]) == 0
    tokens = [each["target_tokens"] for each in json.loads(capfd.readouterr().out)["mix"]]
    assert abs(tokens[0] / sum(tokens) - 0.7) < 0.05
    out = short_sft(tiny_model, paths, tmp_path / "out", num_epochs=1, max_steps=None)
    assert len(json.loads((out / "order.json").read_text())) == 40
    again = short_sft(tiny_model, paths, tmp_path / "again", num_epochs=1, max_steps=None)
    assert (again / "order.json").read_text() == (out / "order.json").read_text()


def test_rows_for_evaluation(tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows, others = titles(tmp_path / "train.jsonl", 10), titles(tmp_path / "valid.jsonl", 3)
    bad = write(tmp_path / "bad.jsonl", [{"document": "a", "title": ""}])
    given = ["--base_model", tiny_model, "--data_path", rows, "--json"]
    assert main(["preview", *map(str, [*given, "--validation_path", others])]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["train_rows"], found["validation_rows"]) == (10, 3)
    assert main(["preview", *map(str, [*given, "--validation_path", bad])]) == 0
    assert json.loads(capfd.readouterr().out)["dropped"][0]["row"] == "bad.jsonl line 1"
    assert main(["preview", *map(str, [*given, "--validation_path", others, "--val_set_size", 2])]) == 2
    assert "exclude each other" in capfd.readouterr().err
    assert main(["preview", *map(str, [*given, "--validation_path", tmp_path / "none.jsonl"])]) == 2
    assert "there is no file" in capfd.readouterr().err
    nothing = write(tmp_path / "other.jsonl", [{"x": "a"}])
    assert main(["preview", *map(str, [*given, "--validation_path", nothing])]) == 2
    assert "validation_path" in capfd.readouterr().err
    out = short_sft(tiny_model, rows, tmp_path / "out", validation_path=others, eval_steps=1)
    log = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    assert any("eval_loss" in line for line in log)


def test_documents_are_trained_in_pieces(tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = write(
        tmp_path / "texts.jsonl",
        [{"글": " ".join(f"{n}번째 문장이다." for n in range(60)), "id": 1}, {"글": "짧은 글", "id": 2}],
    )
    given = ["--base_model", tiny_model, "--data_path", rows, "--text_column", "글", "--cutoff_len", 64]
    assert main(["preview", *map(str, given), "--json", "--tokens", "--rows", "100"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["train_rows"] == len(found["examples"]) > 5 and found["duplicate_rows"] == 0
    assert found["target_tokens"] == sum(b - a for item in found["examples"] for a, b in item["trained"])
    assert [item["name"] for item in found["examples"]][:2] == [
        "texts.jsonl line 1, piece 1",
        "texts.jsonl line 1, piece 2",
    ]
    for extra, words in (
        (["--template", "alpaca"], "does not apply to text_column"),
        (["--text_column", "없다"], "'없다'"),
    ):
        assert main(["preview", *map(str, [*given, *extra])]) == 2
        assert words in capfd.readouterr().err
    out = short_sft(tiny_model, rows, tmp_path / "out", text_column="글", cutoff_len=64, max_steps=2, batch_size=3)
    assert (out / "template.txt").read_text() == "{글}" and "row_kind: document" in (out / "byeori.yaml").read_text()
    assert isinstance(byeori.generate(model=out, raw="긴 글", max_new_tokens=3)[0], str)
    byeori.merge(peft_model_path=out, output_dir=tmp_path / "merged")
