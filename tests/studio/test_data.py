"""The screen of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from studio_page import copied, meant, studio

ROWS = [{"질문": f"{number}번 질문", "답": f"{number}번 답"} for number in range(12)]


def written(folder: Path, name: str) -> str:
    path = folder / name
    if name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    elif name.endswith(".csv"):
        path.write_bytes("\r\n".join(["질문,답", *(f"{row['질문']},{row['답']}" for row in ROWS)]).encode("cp949"))
    elif name.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        from openpyxl import Workbook

        book = Workbook()
        book.active.append(list(ROWS[0]))
        for row in ROWS:
            book.active.append(list(row.values()))
        book.save(path)
    return name


@pytest.mark.parametrize(
    ("name", "encoding"), [("a.jsonl", "utf-8"), ("b.csv", "cp949"), ("c.xlsx", ""), ("d.parquet", "")]
)
def test_it_shows_the_rows_of_every_kind_of_file(name: str, encoding: str, tmp_path: Path) -> None:
    with studio(tmp_path) as client:
        html = client.post("/data-choose", data={"path": written(tmp_path, name)}).text
        assert "11번 답" in html and "질문" in html and "12 rows" in html
        assert (encoding or "binary") in html
        assert client.get("/data").text.count("번 질문") == 12  # a refresh shows the same


def test_columns_get_other_names(tmp_path: Path) -> None:
    with studio(tmp_path) as client:
        client.post("/data-choose", data={"path": written(tmp_path, "a.jsonl")})
        client.post("/data-columns", data={"as:질문": "question", "as:답": "answer", "val_set_size": "0.25"})
        draft = client.app.state.workspace.draft("train")
        assert draft == {
            "data_path": ["a.jsonl"],
            "columns": {"question": "질문", "answer": "답"},
            "val_set_size": 0.25,
        }
        html = client.get("/data").text
        assert "--columns 'question=질문' 'answer=답'" in copied(html, "as-command")
        client.post("/data-columns", data={"as:question": "질문", "as:answer": "answer", "val_set_size": "0.25"})
        assert client.app.state.workspace.draft("train")["columns"] == {"answer": "답"}


def test_what_is_wrong_is_said_on_the_screen(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"a": \n', encoding="utf-8")
    with studio(tmp_path) as client:
        assert "bad.jsonl line 2" in client.post("/data-choose", data={"path": "bad.jsonl"}).text
        assert "no rows are chosen" in client.post("/data-choose", data={}).text
        assert "there is no file none.jsonl" in client.post("/data-choose", data={"other": "none.jsonl"}).text


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "안녕"}, {"role": "assistant", "content": "반가워요"}]},
        {"text": "### Human: 안녕### Assistant: 반가워요"},
    ],
)
def test_conversations_are_bubbles(row: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    with studio(tmp_path) as client:
        html = client.post("/data-choose", data={"path": "chat.jsonl"}).text
        assert '<li class="user"><b>user</b><p>안녕</p></li>' in html and '<li class="assistant">' in html


def test_a_file_is_sent(tmp_path: Path) -> None:
    with studio(tmp_path) as client:
        html = client.post("/data-choose", files={"file": ("내 자료.csv", "질문,답\n가,나\n".encode())}).text
        assert (tmp_path / "data" / "내 자료.csv").read_bytes() == "질문,답\n가,나\n".encode()
        assert "data/내 자료.csv" in html and "나" in html


def test_both_languages(tmp_path: Path) -> None:
    with studio(tmp_path) as client:
        assert 'lang="en"' in client.get("/data").text
        client.get("/language", params={"code": "ko", "back": "data"})
        assert 'lang="ko"' in client.get("/data").text and "어떤 데이터로" in client.get("/data").text
        answer = client.get("/language", params={"code": "en", "back": "//evil.example"}, follow_redirects=False)
        assert answer.headers["location"] == "."


def test_the_command_and_the_yaml_mean_the_same(tmp_path: Path) -> None:
    with studio(tmp_path) as client:
        client.post("/data-choose", data={"path": written(tmp_path, "a.jsonl")})
        client.post("/data-columns", data={"as:질문": "my question", "as:답": "it's", "val_set_size": "3"})
        client.app.state.workspace.change_draft("train", base_model="m", template="{질문}\n---\n{it's} $HOME\n")
        command, settings = meant(client.get("/data").text)
    assert command == "preview"
    assert settings.val_set_size == 3 and settings.columns == {"my question": "질문", "it's": "답"}
