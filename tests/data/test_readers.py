"""Every usual file is read, with the values that independent tools wrote; columns that nothing can read stop no run."""

from __future__ import annotations

import bz2
import datetime
import decimal
import gzip
import json
import lzma
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import openpyxl
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xlwt
import zstandard

from byeori.data import places, sources, template
from byeori.data.readers import text
from byeori.errors import ByeoriError, DataError, TemplateError

ROWS = [{"질문": "수도는?", "답": "서울"}, {"질문": "산은?", "답": "한라산, 백두산"}]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def load(*paths: Path, **settings: Any) -> sources.Table:
    return sources.load_rows([str(path) for path in paths], **settings)


def values(table: sources.Table) -> list[dict[str, Any]]:
    return list(table.rows.remove_columns(sources.ROW))


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def fails(*parts: str, call: Callable[[], object], error: type[ByeoriError] = DataError) -> None:
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message


# --- columns that nothing reads -------------------------------------------------------------------------------------


MIXED: list[list[Any]] = [
    ["text", 3],
    [1, "1"],
    [True, "yes", 0.5],
    [2**80, 1],
    [2**62, 0.5],
    [0.1234567890123456, "x"],  # datasets' own Json feature reads another fraction
    [{"a": 1}, [1]],
    [[], "x", None],
    [{"a": None}, {"b": {"c": []}}],
    [[1, "a"], [None, {"k": [1.5]}]],
    ["\ud83d", "whole"],
    [float("inf"), "x"],
]


@pytest.mark.parametrize("column", MIXED, ids=[str(number) for number in range(len(MIXED))])
def test_mixed_types_keep_every_value(tmp_path: Path, column: list[Any]) -> None:
    rows = [{"text": f"본문 {number}", "extra": value} for number, value in enumerate(column)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert values(load(path)) == rows
    (tmp_path / "b.json").write_text(json.dumps(rows))
    read = values(load(tmp_path / "b.json"))
    assert read == rows and [type(row["extra"]) for row in read] == [type(value) for value in column]


def test_objects_get_no_keys_of_other_rows(tmp_path: Path) -> None:
    tools = [
        [{"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}],
        [{"name": "time", "parameters": {"properties": {"zone": {"type": "string", "default": None}}}}],
    ]
    path = tmp_path / "a.jsonl"
    path.write_text(lines([{"tools": value} for value in tools]))
    assert [row["tools"] for row in values(load(path))] == tools


def test_types_that_datasets_does_not_know_are_left_out(tmp_path: Path) -> None:
    kind = pa.map_(pa.string(), pa.int64())
    table = pa.table(
        {
            "text": ["a"],
            "tags": pa.array([[("k", 1)]], kind),
            "took": pa.array([datetime.timedelta(1)]),
            "unit": pa.array(["m"]).dictionary_encode(),
        }
    )
    pq.write_table(table.drop_columns(["took"]), tmp_path / "a.parquet")
    with pa.ipc.new_file(tmp_path / "b.arrow", table.schema) as file:
        file.write_table(table)
    for path in (tmp_path / "a.parquet", tmp_path / "b.arrow"):
        read = load(path)
        assert {"text": "a", "unit": "m"}.items() <= values(read)[0].items()
        assert read.left_out["tags"].startswith("its type map<string, int64")
        read.with_columns(["text", "unit"])
        fails("'tags' cannot be read: its type map", call=lambda read=read: read.with_columns(["tags"]))


def test_pictures_are_left_out(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"text": ["a"], "image": [{"bytes": b"no image", "path": None}]}, features)
    rows.save_to_disk(tmp_path / "saved")
    rows.to_parquet(tmp_path / "a.parquet")
    for path in (tmp_path / "saved", tmp_path / "a.parquet"):
        read = load(path)
        assert values(read) == [{"text": "a"}] and read.left_out == {
            "image": "it holds images, video or sound, and byeori trains text alone"
        }


def test_labels_are_the_names_of_their_classes(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["부정", "긍정"])}
    )
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features)
    rows.save_to_disk(tmp_path / "saved")
    rows.to_parquet(tmp_path / "a.parquet")
    for path in (tmp_path / "saved", tmp_path / "a.parquet"):
        read = load(path)
        assert [row["label"] for row in values(read)] == ["긍정", "부정", None]
        assert read.rows.column_names == ["text", "label", sources.ROW]


def test_other_types_of_parquet(tmp_path: Path) -> None:
    row = {"d": decimal.Decimal("1.5"), "when": datetime.datetime(2024, 1, 2), "b": b"\xff", "text": "a", "u": 2**63}
    pq.write_table(
        pa.Table.from_pylist(
            [row],
            pa.schema(
                [
                    ("d", pa.decimal128(5, 2)),
                    ("when", pa.timestamp("ms")),
                    ("b", pa.binary()),
                    ("text", pa.large_string()),
                    ("u", pa.uint64()),
                ]
            ),
        ),
        tmp_path / "a.parquet",
    )
    assert values(load(tmp_path / "a.parquet")) == [row]


# --- compression and encodings --------------------------------------------------------------------------------------


def packed_by_tools(path: Path) -> dict[str, Path]:
    """The file packed by the tools that people use, with its endings."""
    for command in (["gzip", "-k"], ["bzip2", "-k"], ["xz", "-k"]):
        subprocess.run([*command, str(path)], check=True)
    content = path.read_bytes()
    (path.parent / f"{path.name}.zst").write_bytes(zstandard.ZstdCompressor().compress(content))
    return {ending: path.parent / (path.name + ending) for ending in text.COMPRESSED}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines(ROWS)),
        ("a.json", json.dumps(ROWS)),
        ("a.csv", '질문,답\n수도는?,서울\n산은?,"한라산, 백두산"\n'),
    ],
)
def test_compressed(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    for ending, path in packed_by_tools(tmp_path / name).items():
        read = load(path)
        assert values(read) == ROWS, ending
        assert read.notes == ()
    assert load(tmp_path / "a.jsonl.xz").name(1) == "a.jsonl.xz line 2" if name == "a.jsonl" else True


def test_several_frames_of_zstd_and_parts_that_are_missing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines(ROWS * 500))
    for ending, path in packed_by_tools(tmp_path / "a.jsonl").items():
        whole = path.read_bytes()
        path.write_bytes(whole + whole)  # tools for many cores write one after the other
        assert len(values(load(path))) == 2000
        path.write_bytes(whole[:-6])
        fails(str(path), "is not a complete", call=lambda path=path: load(path))
        path.write_bytes(b"no " + ending.encode())
        fails(str(path), "is not a complete", call=lambda path=path: load(path))


TABLE = '질문,답\n수도는?,서울\n산은?,"한라산, 백두산"\n'


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("encoding", "called"),
    [
        ("cp949", "CP949"),
        ("euc-kr", "CP949"),
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16-LE"),
        ("utf-16-be", "UTF-16-BE"),
        ("utf-8", None),
        ("utf-8-sig", None),
    ],
)
def test_encodings_are_found_read_and_said(tmp_path: Path, encoding: str, called: str | None, packed: bool) -> None:
    for name, content in (("a.csv", TABLE), ("b.jsonl", lines(ROWS)), ("c.json", json.dumps(ROWS, ensure_ascii=False))):
        path = tmp_path / (name + ".gz" * packed)
        path.write_bytes(gzip.compress(content.encode(encoding)) if packed else content.encode(encoding))
        for _ in range(2):  # the second time from the cache
            read = load(path)
            assert values(read) == ROWS
            assert read.notes == (() if called is None else (f"{path} is read as {called}",))


def test_pandas_and_excel_write_encodings(tmp_path: Path) -> None:
    frame = pd.DataFrame(ROWS)
    frame.to_csv(tmp_path / "a.csv", index=False, encoding="cp949")
    frame.to_csv(tmp_path / "b.tsv", index=False, sep="\t", encoding="utf-16")  # "Unicode text" of Excel
    assert values(load(tmp_path / "a.csv")) == values(load(tmp_path / "b.tsv")) == ROWS


@pytest.mark.parametrize(
    "content",
    [
        "제목\n".encode() + "안녕하세요 여러분\n".encode("cp949"),  # two encodings
        "名前,答え\nこれはテスト,日本語の文章\n".encode("euc_jp"),
        "这是,一个\n测试文本,数据用于训练模型\n".encode("gbk"),
        "a\ncafé déjà\n".encode("latin-1"),
        b"\x89PNG\r\n\x1a\n\x00\xff\xff\x00",
    ],
)
def test_other_encodings_are_not_guessed(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    fails(f"{tmp_path}/a.csv line", call=lambda: load(tmp_path / "a.csv"))


# --- workbooks ------------------------------------------------------------------------------------------------------


def test_a_workbook_of_excel(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    sheet = book.active
    assert sheet is not None
    sheet.title = "설명"
    sheet.append(["이 파일은"])
    data = book.create_sheet("자료")
    data.append(["질문", "답", None, "날짜", "상품\n이름", "값"])
    data.append(["수도는?", "서울\n특별시", None, datetime.date(2024, 1, 2), True, 3])
    data.append([])
    data.append(["7", 7, "x", datetime.datetime(2024, 1, 2, 3, 4, 5), None, 0.5])
    other = book.create_sheet("다른")
    other.append(["a"])
    other.append(["b"])
    book.save(tmp_path / "a.xlsx")
    read = load(tmp_path / "a.xlsx")
    assert values(read) == [
        {"질문": "수도는?", "답": "서울\n특별시", "Unnamed: 2": None, "날짜": "2024-01-02", "상품 이름": True, "값": 3},
        {"질문": "7", "답": 7, "Unnamed: 2": "x", "날짜": "2024-01-02T03:04:05", "상품 이름": None, "값": 0.5},
    ]
    sentence = f"The rows of {tmp_path}/a.xlsx are those of the sheet '자료'; dataset_config names another (다른)"
    assert read.notes == (sentence,)
    assert values(load(tmp_path / "a.xlsx", config="다른")) == [{"a": "b"}]
    fails("has no sheet '없다'", "설명, 자료, 다른", call=lambda: load(tmp_path / "a.xlsx", config="없다"))


def test_workbooks_of_pandas_and_broken_ones(tmp_path: Path) -> None:
    pd.DataFrame(ROWS).to_excel(tmp_path / "a.xlsx", index=False)
    assert values(load(tmp_path / "a.xlsx")) == ROWS and load(tmp_path / "a.xlsx").name(1).endswith("a.xlsx")
    (tmp_path / "b.xlsx").write_bytes((tmp_path / "a.xlsx").read_bytes()[:-700])
    fails(f"{tmp_path}/b.xlsx is damaged or not a workbook", call=lambda: load(tmp_path / "b.xlsx"))
    pd.DataFrame().to_excel(tmp_path / "c.xlsx")
    fails("has no rows", call=lambda: load(tmp_path / "c.xlsx"))


# --- JSON of other tools --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orient", ["columns", "list", "split", "records", "table"])
def test_a_table_as_pandas_writes_it(tmp_path: Path, orient: Any) -> None:
    frame = pd.DataFrame(ROWS)
    if orient == "list":
        (tmp_path / "a.json").write_text(json.dumps(frame.to_dict(orient="list")))
    else:
        frame.to_json(tmp_path / "a.json", orient=orient, force_ascii=False)
    read = [{name: row[name] for name in ROWS[0]} for row in values(load(tmp_path / "a.json"))]
    assert read == ROWS


TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ({"messages": TURNS}, [{"messages": TURNS}]),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, [{"prompt": TURNS[:1], "completion": TURNS[1:]}]),
        ({"messages": [TURNS, TURNS[:1]]}, [{"messages": TURNS}, {"messages": TURNS[:1]}]),
        ({"conversations": [{"id": 1, "messages": TURNS}]}, [{"id": 1, "messages": TURNS}]),
        ({"text": "a", "tags": ["b", "c"]}, [{"text": "a", "tags": ["b", "c"]}]),
        ({"translation": {"ko": "가", "en": "a"}}, [{"translation": {"ko": "가", "en": "a"}}]),
        ({"version": 1, "data": ROWS, "tags": ["a"]}, ROWS),
    ],
)
def test_an_object_is_a_row_or_holds_rows_or_columns(tmp_path: Path, content: Any, rows: Any) -> None:
    (tmp_path / "a.json").write_text(json.dumps(content, indent=1))
    assert values(load(tmp_path / "a.json")) == rows


def test_columns_of_different_lengths(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"prompt": ["a", "b"], "answer": ["c"]}))
    fails("different numbers of values: prompt has 2, answer has 1", call=lambda: load(tmp_path / "a.json"))


# --- names of columns -----------------------------------------------------------------------------------------------


def test_columns_are_renamed(tmp_path: Path) -> None:
    rows = [{"질문\n내용": "q", "번역": {"ko": "가", "en": {"uk": "a"}}, "prompt": "old", "id": 1}]
    (tmp_path / "a.jsonl").write_text(lines(rows))
    read = load(tmp_path / "a.jsonl", columns={"prompt": "질문\n내용", "answer": "번역.en.uk"})
    assert values(read) == [{"prompt": "q", "번역": {"ko": "가", "en": {"uk": "a"}}, "id": 1, "answer": "a"}]
    assert "in the place of the column 'prompt'" in read.notes[0]
    swapped = load(tmp_path / "a.jsonl", columns={"prompt": "id", "id": "prompt"})
    assert values(swapped)[0]["prompt"] == 1 and values(swapped)[0]["id"] == "old"
    fails(
        "columns names the column '질문'",
        "its columns are",
        call=lambda: load(tmp_path / "a.jsonl", columns={"prompt": "질문"}),
    )


def test_names_for_several_files_and_from_a_run(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines([{"질문": "q"}]))
    (tmp_path / "b.jsonl").write_text(lines([{"prompt": "p"}]))
    both = load(tmp_path / "a.jsonl", tmp_path / "b.jsonl", columns={"prompt": "질문"})
    assert values(both) == [{"prompt": "q"}, {"prompt": "p"}]
    assert values(load(tmp_path / "b.jsonl", columns={"prompt": "질문"}, inherited=True)) == [{"prompt": "p"}]


def test_the_first_rows_of_each_path(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(lines([{"x": f"{name}{number}"} for number in range(5)]))
    read = load(tmp_path / "a.jsonl", tmp_path / "b.jsonl", max_rows=2)
    assert read.rows["x"][:] == ["a0", "a1", "b0", "b1"]
    assert [read.name(row) for row in range(4)] == [
        "a.jsonl line 1",
        "a.jsonl line 2",
        "b.jsonl line 1",
        "b.jsonl line 2",
    ]
    assert load(tmp_path, max_rows=7).rows["x"][:] == ["a0", "a1", "a2", "a3", "a4", "b0", "b1"]  # a folder is one path


# --- what is no table -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("보고서.hwp", "Hancom Office"),
        ("a.HWPX", "Hancom Office"),
        ("a.pdf", "spreadsheet"),
        ("a.zip", "unpack"),
    ],
)
def test_documents_say_how_to_make_a_table(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    fails("is no table of rows", words, call=lambda: places.check_paths([str(tmp_path / name)]))


# --- limits ---------------------------------------------------------------------------------------------------------


def test_a_bomb_ends_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_ALWAYS", 1 << 20)
    for name, content in (
        ("a.jsonl.xz", lzma.compress(b"\n" * (1 << 23))),
        ("a.csv.bz2", bz2.compress(b"a\n" * (1 << 21))),
    ):
        (tmp_path / name).write_bytes(content)
        fails(name, "more than 1000 times its size", call=lambda name=name: load(tmp_path / name))


def test_a_line_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("text", "csv"):
        monkeypatch.setattr(f"byeori.data.readers.{module}.LONGEST_LINE", 1000)
    (tmp_path / "a.jsonl").write_text(lines([{"a": "b"}, {"a": "x" * 2000}]))
    fails("a.jsonl line 2 has more than 1,000 characters", call=lambda: load(tmp_path / "a.jsonl"))
    (tmp_path / "a.csv").write_text('a\n"' + "x\n" * 2000 + '"\n')
    fails("a.csv line 2", "field larger than field limit", call=lambda: load(tmp_path / "a.csv"))


def test_deep_values(tmp_path: Path) -> None:
    deep = "[" * 30 + "]" * 30
    (tmp_path / "a.jsonl").write_text(f'{{"a": "x", "deep": {deep}}}\n')
    assert values(load(tmp_path / "a.jsonl"))[0]["deep"] == json.loads(deep)
    for count in (900, 100_000):
        (tmp_path / "b.jsonl").write_text('{"a": ' + "[" * count + "]" * count + "}\n")
        try:
            assert len(values(load(tmp_path / "b.jsonl"))) == 1
        except DataError as error:
            assert "recursion" in str(error) or "nested" in str(error)


def test_a_parquet_file_that_would_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        table = pa.table({name: np.zeros(4_000_000)})
        pq.write_table(table, tmp_path / f"{name}.parquet", compression="zstd", use_dictionary=False)
    assert len(load(tmp_path / "a.parquet").rows) == 4_000_000
    monkeypatch.setattr(text, "_ALWAYS", 1 << 20)
    monkeypatch.setattr(text, "_RATIO", 10)
    fails("b.parquet holds more than 10 times", call=lambda: load(tmp_path / "b.parquet"))


def test_long_values_do_not_fill_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_BATCH_CHARACTERS", 5000)
    rows = [{"a": "x" * 1000, "b": [number]} for number in range(50)]
    (tmp_path / "a.jsonl").write_text(lines(rows))
    assert values(load(tmp_path / "a.jsonl")) == rows
    assert len(load(tmp_path / "a.jsonl").rows.data.to_batches()) > 5


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    """The text is kept byte for byte, in any encoding and compressed; beside a table, texts are about the table."""
    text = "첫 줄\r\n\r\n둘째 줄 \n"
    (tmp_path / "a.txt").write_text(text, encoding="cp949", newline="")
    (tmp_path / "b.md").write_text("# 제목\n", encoding="utf-8")
    with gzip.open(tmp_path / "c.txt.gz", "wt", encoding="utf-8") as file:
        file.write("셋째")
    rows = load(tmp_path).rows
    assert rows["text"][:] == [text, "# 제목\n", "셋째"]
    (tmp_path / "rows.jsonl").write_text('{"prompt": "물음", "completion": "답"}\n', encoding="utf-8")
    assert [row["prompt"] for row in values(load(tmp_path))] == ["물음"]
    (tmp_path / "blank.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(DataError, match=r"blank\.txt is empty but for spaces; leave it out"):
        load(tmp_path / "blank.txt")


def test_one_column_of_text_is_offered_as_documents() -> None:
    with pytest.raises(TemplateError, match="or train all of its text with --text_column text"):
        template.choose(["text", "__row__"])


def test_old_and_open_workbooks(tmp_path: Path) -> None:
    """As written by xlwt (Excel 97) and odfpy (LibreOffice's format)."""
    book = xlwt.Workbook()
    sheet = book.add_sheet("자료")
    for row, cells in enumerate([list(ROWS[0]), *(list(item.values()) for item in ROWS)]):
        for column, cell in enumerate(cells):
            sheet.write(row, column, cell)
    book.save(str(tmp_path / "a.xls"))
    pd.DataFrame(ROWS).to_excel(tmp_path / "a.ods", index=False, engine="odf")
    assert values(load(tmp_path / "a.xls")) == values(load(tmp_path / "a.ods")) == ROWS
