"""Rows in, Dataset out: values as written, and one sentence for everything that can be wrong."""

from __future__ import annotations

import gzip
import http.server
import json
import os
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import forks
from byeori.data import files, sources
from byeori.data.hub_dataset import load_dataset
from byeori.data.row_kinds import ANSWER
from byeori.data.sources import ROW, split_rows
from byeori.data.template import parse
from byeori.data.tokenize import make_encoding
from byeori.data.tokenized import encode_table
from byeori.errors import ByeoriError, DataError, HubError
from tiny_models import byte_level_tokenizer

ROWS = [{"document": "본문 하나", "title": "제목"}, {"document": "본문 둘", "title": "두 번째"}]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a cache of its own, so that none uses what another has read."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def load_rows(paths: list[str], **settings: Any) -> datasets.Dataset:
    return sources.load_rows(paths, **settings).rows


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def plain(rows: datasets.Dataset) -> list[dict[str, Any]]:
    """The rows without ROW, which must count from 0."""
    assert rows[ROW] == list(range(len(rows)))
    return list(rows.remove_columns(ROW))


def fails(error: type[ByeoriError], *parts: str, call: Callable[[], object]) -> None:
    """The call raises one sentence that holds all `parts` and shows no other traceback."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


# --- formats ---


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", lines(ROWS)),
        ("a.NDJSON", "\n" + lines(ROWS).replace("\n", "\r\n\r\n")),
        ("a.json", json.dumps(ROWS)),
        ("b.json", json.dumps({"version": 1, "data": ROWS, "license": {"name": "CC"}}, indent=2)),
        ("c.json", lines(ROWS)),
        ("a.csv", "document,title\n본문 하나,제목\n\n본문 둘,두 번째\n"),
        ("a.tsv", 'document\ttitle\r\n"본문 하나"\t제목\r\n본문 둘\t두 번째'),
    ],
)
def test_text_formats(here: Path, name: str, text: str, bom: str, packed: bool) -> None:
    content = (bom + text).encode()
    path = write(here / (name + ".gz" * packed), gzip.compress(content) if packed else content)
    assert plain(load_rows([path])) == ROWS


def test_arrow_and_parquet(here: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, here / "a.parquet")
    pq.write_table(table.set_column(1, "title", table["title"].dictionary_encode()), here / "b.parquet")
    with pa.ipc.new_stream(here / "c.arrow", table.schema) as stream:
        stream.write_table(table)
    with pa.ipc.new_file(here / "d.arrow", table.schema) as file:
        file.write_table(table)
    for path in sorted(here.iterdir()):
        assert plain(load_rows([str(path)])) == ROWS, path
    assert len(load_rows([str(here)])) == 8


def test_json_values_keep_their_types(here: Path) -> None:
    rows = [
        {"date": "2024-01-02", "n": None, "label": 1, "tags": [], "messages": [{"role": "user"}]},
        {"date": "2024-01-02T03:04:05", "n": 1, "score": 0.5, "messages": [{"content": "안녕 {x}"}]},
        {"n": 1.5, "ok": True, "tags": ["a", None], "type": "message", "message": {"role": "x"}},
    ]
    loaded = plain(load_rows([write(here / "a.jsonl", lines(rows))]))
    assert [row["date"] for row in loaded] == ["2024-01-02", "2024-01-02T03:04:05", None]
    assert [row["n"] for row in loaded] == [None, 1.0, 1.5]
    assert [row["label"] for row in loaded] == [1, None, None]
    assert [row["tags"] for row in loaded] == [[], None, ["a", None]]
    assert loaded[0]["messages"] == [{"role": "user"}]  # no key of another row
    assert loaded[1]["messages"] == [{"content": "안녕 {x}"}]
    assert loaded[2]["message"] == {"role": "x"} and loaded[2]["ok"] is True


def test_csv_values_stay_as_written(here: Path) -> None:
    long = "가" * 200_000
    text = f'code,note,,when\n007,NA,0,2024-01-02\n1e3,,1," a ""b"",\nc"\ntrue,{long},2,null\n'
    assert plain(load_rows([write(here / "a.csv", text)])) == [
        {"code": "007", "note": "NA", "Unnamed: 2": "0", "when": "2024-01-02"},
        {"code": "1e3", "note": "", "Unnamed: 2": "1", "when": ' a "b",\nc'},
        {"code": "true", "note": long, "Unnamed: 2": "2", "when": "null"},
    ]


def test_excel_names_the_separator(here: Path) -> None:
    for separator, line in ((";", "sep=;\r\n"), (",", '"sep=,"\n'), ("\t", "\ufeffsep=\t\n")):
        text = f'{line}document{separator} title \n"본문\n{separator}"{separator}제목\n'
        assert plain(load_rows([write(here / "a.csv", text)])) == [{"document": f"본문\n{separator}", "title": "제목"}]


def test_a_missing_number_of_pandas_is_missing(here: Path) -> None:
    rows = [
        {"a": "text", "n": 1, "m": [1.5]},
        {"a": float("nan"), "n": float("nan"), "m": [float("nan"), float("inf")]},
    ]
    text = "\n".join(map(json.dumps, rows))
    wanted = [rows[0], {"a": None, "n": None, "m": [None, float("inf")]}]
    assert plain(load_rows([write(here / "a.jsonl", text)])) == wanted
    assert plain(load_rows([write(here / "b.json", json.dumps(rows, indent=1))])) == wanted


def test_json_objects_that_are_rows(here: Path) -> None:
    pretty = "\n".join(json.dumps(row, indent=2, ensure_ascii=False) for row in ROWS)
    assert plain(load_rows([write(here / "a.json", pretty)])) == ROWS
    assert plain(load_rows([write(here / "b.json", json.dumps(ROWS[0]))])) == ROWS[:1]


def test_column_names_are_composed_and_trimmed(here: Path) -> None:
    loose = {unicodedata.normalize("NFD", " 본문"): "a", "제목 ": "b"}
    pq.write_table(pa.Table.from_pylist([loose]), here / "a.parquet")
    text = "\n".join(",".join(part) for part in (loose.keys(), loose.values()))
    for path in (str(here / "a.parquet"), write(here / "a.csv", text), write(here / "a.jsonl", lines([loose]))):
        assert plain(load_rows([path])) == [{"본문": "a", "제목": "b"}]
    both = write(here / "b.jsonl", lines([{"본문": "a"}, {unicodedata.normalize("NFD", "본문"): "a"}]))
    fails(DataError, both, "'본문' twice", "rename one", call=lambda: load_rows([both]))


def test_type_seen_late(here: Path) -> None:
    rows = [{"a": None, "b": 1} for _ in range(2500)] + [{"a": "text", "b": 1.5}]
    loaded = load_rows([write(here / "a.jsonl", lines(rows))])
    assert loaded[0]["a"] is None and loaded[2500]["a"] == "text" and loaded[2500]["b"] == 1.5


def test_long_values_and_many_rows_of_json(here: Path) -> None:
    rows = [{"i": i, "text": '가\\"\n' * (i * 40_000), "n": [i, -1.5e300, None]} for i in range(12)]
    text = json.dumps({"skip": "x" * 3_000_000, "data": rows}, indent=40).replace(",", "," + " " * 99)
    assert plain(load_rows([write(here / "a.json", text)])) == rows
    numbers = json.dumps([{"n": n} for n in range(200_000)])
    assert load_rows([write(here / "b.json", numbers)])["n"][:] == list(range(200_000))


# --- places ---


def test_saved_folders(here: Path) -> None:
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(here / "one")
    datasets.DatasetDict(train=saved, test=saved.select([1])).save_to_disk(here / "two")
    assert plain(load_rows([str(here / "one")])) == ROWS
    assert plain(load_rows([str(here / "two")], split="test")) == ROWS[1:]
    fails(DataError, "'dev'", "train, test", call=lambda: load_rows([str(here / "two")], split="dev"))
    (here / "two" / "train" / "state.json").write_text("{")
    fails(DataError, "two", "damaged", call=lambda: load_rows([str(here / "two")]))


def test_folder_glob_and_several(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(here / "a.jsonl", lines(ROWS))
    write(here / "b.csv", "title,document\n세 번째,본문 셋\n")
    write(here / "README.md", "not rows")
    write(here / ".hidden.jsonl", "broken")
    third = {"document": "본문 셋", "title": "세 번째"}
    assert plain(load_rows([str(here)])) == [*ROWS, third]
    assert plain(load_rows([str(here / "*.[cj]s*")])) == [*ROWS, third]
    assert plain(load_rows([str(here / "b.csv"), str(here / "a.jsonl")])) == [third, *ROWS]
    assert plain(load_rows([str(here)], max_rows=1)) == ROWS[:1]
    assert len(load_rows([str(here)], max_rows=99)) == 3
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    assert len(load_rows(["a.jsonl"])) == len(load_rows(["~/a.jsonl"])) == 2


def test_folder_keeps_splits_apart(here: Path) -> None:
    for name in ("train-00000-of-00001", "test", "valid", "trainer_notes"):
        write(here / f"{name}.jsonl", lines([{"a": name}]))
    assert load_rows([str(here)])["a"][:] == ["train-00000-of-00001", "trainer_notes"]
    assert load_rows([str(here)], split="validation")["a"][:] == ["trainer_notes", "valid"]
    (here / "trainer_notes.jsonl").unlink()
    fails(DataError, "'dev2'", "valid.jsonl", call=lambda: load_rows([str(here)], split="dev2"))


@pytest.mark.parametrize(
    ("files", "split", "taken"),
    [
        (["news-test", "news-train"], "train", ["news-train"]),
        (["testing", "testset", "training"], "train", ["training"]),
        (["testing", "testset", "training"], "test", ["testing", "testset"]),
        (["Titles_KO.Test", "evaluation", "fold 1 dev", "titles_ko.train.v2", "train1"], "train", [3, 4]),
        (["a-val-00000-of-00001", "b.validation", "c_eval"], "valid", [0, 1]),
        (["attested", "contest", "devices", "latest", "strain"], "train", [0, 1, 2, 3, 4]),  # words, no splits
    ],
)
def test_a_split_is_named_anywhere_in_a_file_name(here: Path, files: list[str], split: str, taken: list[Any]) -> None:
    for name in files:
        write(here / f"{name}.jsonl", lines([{"a": name}]))
    wanted = [files[name] if isinstance(name, int) else name for name in taken]
    table = sources.load_rows([str(here)], split=split)
    assert table.rows["a"][:] == wanted
    others = ", ".join(f"{name}.jsonl" for name in files if name not in wanted)
    note = f"Skipped in {here}, because their names are those of another split: {others}"
    assert table.notes == ((note,) if others else ())


def test_different_columns_and_types(here: Path) -> None:
    first = write(here / "a.jsonl", lines([{"x": 1, "y": "a"}]))
    other = write(here / "b.jsonl", lines([{"x": 1, "z": "a"}]))
    both = sources.load_rows([first, other])
    assert plain(both.rows) == [{"x": 1, "y": "a", "z": None}, {"x": 1, "y": None, "z": "a"}]
    assert both.lacking == {"y": other, "z": first}
    fails(DataError, f"{other} has no column 'y'", call=lambda: both.with_columns(["x", "y"]))
    text = write(here / "c.csv", "x,y\n1,a\n")
    assert [row["x"] for row in load_rows([first, text])] == [1, "1"]
    wide, half = (write(here / f"{n}.jsonl", lines([{"x": n, "y": "a"}])) for n in (2**62, 0.5))
    assert [row["x"] for row in load_rows([wide, half])] == [2**62, 0.5]
    fraction = write(here / "d.jsonl", lines([{"y": None, "x": 0.5}]))
    assert plain(load_rows([first, fraction])) == [{"x": 1.0, "y": "a"}, {"x": 0.5, "y": None}]
    messages = write(here / "e.jsonl", lines([{"y": [{"role": "user", "content": "a"}]}]))
    pq.write_table(pa.Table.from_pylist([{"y": [{"role": "user", "content": "b"}]}]), here / "f.parquet")
    assert [row["y"][0]["content"] for row in load_rows([messages, str(here / "f.parquet")])] == ["a", "b"]


def test_row_column_of_the_source_is_replaced(here: Path) -> None:
    path = write(here / "a.jsonl", lines([{"a": 1, ROW: 7}, {"a": 2, ROW: 9}]))
    assert plain(load_rows([path])) == [{"a": 1}, {"a": 2}]


def test_large_files_are_mapped_not_held(here: Path, cache: Path) -> None:
    sizes = []
    for count in (20_000, 200_000):
        path = write(here / f"{count}.jsonl", lines([{"i": i, "text": f"row {i}"} for i in range(count)]))
        before = pa.total_allocated_bytes()
        rows = load_rows([path])
        sizes.append(pa.total_allocated_bytes() - before)
        assert len(rows) == count and rows[count - 1] == {
            "i": count - 1,
            "text": f"row {count - 1}",
            ROW: count - 1,
        }
        assert [Path(file["filename"]).parent for file in rows.cache_files] == [cache / "byeori"]
    assert max(sizes) < 3_000_000  # 8 bytes a row for ROW; the rows themselves would be 20 MB
    assert len(list((cache / "byeori").glob("*.arrow"))) == 2


def test_the_cache_is_keyed_by_content(here: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(here / "a.jsonl", '{"a": 1}\n')
    stamp = Path(path).stat().st_mtime_ns
    load_rows([path])
    write(here / "a.jsonl", '{"a": 2}\n')
    os.utime(path, ns=(stamp, stamp))
    assert plain(load_rows([path])) == [{"a": 2}]
    monkeypatch.setattr(files, "_write", lambda *_: pytest.fail("read again"))
    assert plain(load_rows([write(here / "b.jsonl", '{"a": 1}\n')])) == [{"a": 1}]


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"x" * len(data), lambda data: b""])
def test_a_damaged_cache_is_made_anew(here: Path, cache: Path, damage: Callable[[bytes], bytes]) -> None:
    """Rows that were read and tables that were tokenized, cut short or with other bytes: not the user's fault."""
    path = write(here / "a.jsonl", lines([{"document": f"a {i}", "title": f"b {i}"} for i in range(50)]))
    template = parse("{document} = {title}")
    encoding = make_encoding(byte_level_tokenizer(), template, cutoff_len=64, add_eos_token=True, train_on_inputs=False)

    def table() -> list[dict[str, object]]:
        return encode_table(load_rows([path]), encoding, ANSWER, progress=False).to_list()

    first, made = table(), sorted(cache.rglob("*.arrow"))
    assert len(made) == 2
    for file in made:
        file.write_bytes(damage(file.read_bytes()))
        assert table() == first


# --- what can be wrong with a file ---


BROKEN: list[tuple[str, str | bytes, list[str]]] = [
    ("a.jsonl", "", ["a.jsonl is empty"]),
    ("a.jsonl", "\ufeff\n\n", ["has no rows"]),
    ("a.jsonl", "{}\n{}\n", ["has no rows", "has a column"]),
    ("a.json", "[]", ["has no rows"]),
    ("a.csv", "a,b\n", ["has no rows"]),
    ("a.rows", "text", ["ending", ".jsonl", ".parquet"]),
    ("noending", "text", ["ending", ".jsonl"]),
    ("a.jsonl", '{"a": 1}\n\n{"a": }\n', ["a.jsonl line 3", "not valid JSON", "Expecting value"]),
    ("a.jsonl", "[" * 100_000, ["line 1", "not valid JSON"]),
    ("a.jsonl", '{"a": 1}\n[1]\n', ["line 2 is a list, not an object"]),
    ("a.jsonl", '{"a": 1}\nnull\n', ["line 2 is null, not an object"]),
    ("a.jsonl", '[\n{"a": 1}\n]', ["line 1", "name the file .json"]),
    ("a.json", '[\n{"a": 1},\n{"a": 2}\n{"a": 3}]', ["a.json line 4", "not valid JSON"]),
    ("a.json", '[\n{"a": 1},\n{"a": "x}]', ["a.json line 3", "Unterminated string"]),
    ("a.json", '[{"a": 1}', ["line 1", "Expecting ']'"]),
    ("a.json", '[{"a": 1},\n2]', ["line 2 is a number, not an object"]),
    ("a.json", '[{"a": 1}]\n[', ["line 2 goes on after the end"]),
    ("a.json", '{"a": [], "b": [{"c": 1}]}', ["the lists a, b", "one list"]),
    ("a.json", "{}", ["has no rows", "has a column"]),
    ("a.json", '{\n"a": 1}\n{"a": 2}\n[1]', ["line 4 goes on after the end", ".jsonl"]),
    ("a.json", '{\n"a": [{"b": 1}]}\n{"a": [{"b": 1}]}', ["line 3 goes on after the end", ".jsonl"]),
    ("a.json", '"a"', ["neither a list"]),
    ("a.csv", b"\x89PNG\r\n\x1a\n\x00\xff\xff\x00", ["line 1 is not text"]),
    ("a.jsonl", b"a\n\xff\xff\n", ["line 2 is not text"]),
    ("a.csv", 'a,b\n"1\n1",2\n1,2,3\n', ["a.csv line 4", "has 3 fields and the header has 2"]),
    ("a.tsv", "a\tb\n1\n", ["a.tsv line 2", "has 1 field and the header has 2"]),
    ("a.csv", 'a,b\n1,2\n"1,2\n3,4\n', ["a.csv line 3", "unexpected end of data", "double quote"]),
    ("a.csv", "a,b,a\n1,2,3\n", ["'a' twice"]),
    ("a.csv", "a,b, a\n1,2,3\n", ["'a' twice"]),
    ("a.csv", "a;b\n1;2\n", ["one column, 'a;b', which looks like several with ';' between", "sep=;"]),
    ("a.csv.gz", gzip.compress(b"a\tb\n1\t2\n"), ["one column", "'\\t' between them"]),
    ("a.tsv", "a,b\n1,2\n", ["one column", "',' between them"]),
    ("a.csv", "sep=;\na;b\n1;2\n1;2;3\n", ["a.csv line 4", "has 3 fields and the header has 2"]),
    ("a.parquet", b"PAR1 not really PAR1", ["a.parquet", "damaged or not parquet"]),
    ("a.arrow", b"\x00" * 100, ["a.arrow", "damaged or not arrow"]),
    ("a.jsonl.gz", b'{"a": 1}\n', ["not a complete gzip file"]),
    ("a.jsonl.gz", gzip.compress(lines(ROWS).encode())[:-12], ["not a complete gzip file"]),
]


@pytest.mark.parametrize(
    ("name", "content", "parts"), BROKEN, ids=[f"{number}-{name}" for number, (name, _, _) in enumerate(BROKEN)]
)
def test_broken_file(here: Path, cache: Path, name: str, content: str | bytes, parts: list[str]) -> None:
    path = write(here / name, content)
    fails(DataError, str(here / name), *parts, call=lambda: load_rows([path]))
    assert not list(cache.rglob("*.arrow"))


def test_damage_inside_parquet_and_arrow(here: Path) -> None:
    table = pa.table({"a": [str(i) for i in range(50_000)]})
    pq.write_table(table, here / "a.parquet")
    with pa.ipc.new_stream(here / "a.arrow", table.schema) as stream:
        stream.write_table(table)
    for path in sorted(here.iterdir()):
        whole = path.read_bytes()
        write(path, whole[:2000] + b"\xff" * 3000 + whole[5000:] if path.suffix == ".parquet" else whole[:-5000])
        fails(DataError, str(path), call=lambda path=path: load_rows([str(path)]))


def test_two_columns_of_one_name_in_parquet_and_arrow(here: Path) -> None:
    table = pa.table([["a"], ["b"]], names=["x", "x"])
    pq.write_table(table, here / "a.parquet")
    with pa.ipc.new_stream(here / "a.arrow", table.schema) as stream:
        stream.write_table(table)
    for path in sorted(here.iterdir()):
        fails(DataError, f"{path} has the column 'x' twice; rename", call=lambda path=path: load_rows([str(path)]))


def test_tables_without_rows(here: Path) -> None:
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), here / "a.parquet")
    datasets.Dataset.from_dict({"a": []}).save_to_disk(here / "saved")
    for path in (here / "a.parquet", here / "saved"):
        fails(DataError, str(path), "has no rows", call=lambda path=path: load_rows([str(path)]))


def test_missing_places(here: Path) -> None:
    write(here / "train.jsonl", lines(ROWS))
    for path, parts in {
        f"{here}/trian.jsonl": ["no file", "did you mean train.jsonl?"],
        f"{here}/zzz.csv": ["no file", "check the path"],
        f"{here}/none/a.csv": [f"the folder {here}/none does not exist"],
        "./nothing": ["no file ./nothing"],
        "~/nothing/here": ["no file ~/nothing/here"],
        "a/b/c": ["no file a/b/c"],
        "data.csv": ["no file data.csv"],
        f"{here}/*.csv": ["no file matches", "*.csv"],
    }.items():
        fails(DataError, *parts, call=lambda path=path: load_rows([path]))
    (here / "empty").mkdir()
    fails(DataError, "no data file", ".jsonl", call=lambda: load_rows([str(here / "empty")]))


def test_a_wrong_path_is_reported_before_anything_heavy_is_imported(here: Path) -> None:
    write(here / "rows.jsonl", lines(ROWS))
    (here / "saved").mkdir()
    write(here / "saved" / "state.json", "{}")
    write(here / "empty.jsonl", "")
    write(here / "rows.tab", "x")
    wrong = [f"{here}/rwos.jsonl", f"{here}/*.csv", f"{here}/empty.jsonl", f"{here}/rows.tab", f"{here}/none/a.csv"]
    program = (
        "import sys; from byeori.data import places; from byeori.errors import DataError\n"
        f"places.check_paths([{str(here)!r} + '/rows.jsonl', {str(here)!r} + '/saved', 'user/dataset'])\n"
        f"for path in {wrong!r}:\n"
        "    try: places.check_paths([path])\n"
        "    except DataError as error: print(error)\n"
        "assert not {'torch', 'datasets', 'transformers', 'pyarrow', 'huggingface_hub'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for path, sentence in zip(wrong, done.stdout.splitlines(), strict=True):
        fails(DataError, sentence, call=lambda path=path: load_rows([path]))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(here: Path) -> None:
    path = write(here / "a.csv", "a\n1\n")
    Path(path).chmod(0)
    fails(DataError, "Permission denied", call=lambda: load_rows([path]))


def test_cache_that_cannot_be_written(here: Path, cache: Path) -> None:
    cache.write_text("a file where a folder should be")
    path = write(here / "a.csv", "a\n1\n")
    fails(DataError, "cache", call=lambda: load_rows([path]))


# --- the Hub ---


def test_configuration_and_split_of_a_dataset(here: Path) -> None:
    """datasets' own messages, from a folder that is laid out like a Hub dataset."""
    for name in ("ko", "en"):
        (here / name).mkdir()
        write(here / name / "train.jsonl", lines(ROWS))
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in ("ko", "en"))
    write(here / "README.md", f"---\nconfigs:\n{configs}---\n")
    for config, split, parts in [
        (None, "train", ["needs a configuration", "dataset_config", "ko, en"]),
        ("jp", "train", ["no configuration 'jp'", "dataset_config", "ko, en"]),
        ("ko", "dev", ["no split 'dev'", "dataset_split", "train"]),
    ]:
        fails(HubError, *parts, call=lambda c=config, s=split: load_dataset(str(here), c, s, None))
    assert [len(part.rows) for part in load_dataset(str(here), "ko", "train", None)] == [2]


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers every request with the status and error code that its path asks for."""

    def do_GET(self) -> None:
        code = next((c for c in ("GatedRepo", "RevisionNotFound") if c in self.path), "RepoNotFound")
        self.send_response(403 if code == "GatedRepo" else 404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def ask(endpoint: str, home: Path, name: str, **settings: str) -> str:
    """The message of the HubError for a dataset, from its own process: the endpoint is read at import."""
    program = (
        "import sys; from byeori.data.sources import load_rows; from byeori.errors import HubError\n"
        f"try: load_rows([{name!r}], **{settings!r})\n"
        "except HubError as error: print(error)\n"
    )
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = forks.run("-c", program, env=environment, cwd=home, timeout=60)  # no long series of attempts
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1, done.stdout
    return done.stdout


def test_hub_not_found(hub: str, tmp_path: Path) -> None:
    message = ask(hub, tmp_path, "user/nothing")
    assert "user/nothing" in message and "not found" in message and "hf auth login" in message


def test_hub_gated(hub: str, tmp_path: Path) -> None:
    message = ask(hub, tmp_path, "user/GatedRepo")
    assert "is gated" in message and "https://huggingface.co/datasets/user/GatedRepo" in message


def test_hub_revision(hub: str, tmp_path: Path) -> None:
    message = ask(hub, tmp_path, "user/RevisionNotFound", revision="v9")
    assert "no revision 'v9'" in message and "dataset_revision" in message


def test_hub_unreachable(tmp_path: Path) -> None:
    message = ask("http://127.0.0.1:9", tmp_path, "user/nothing")
    assert "cannot be reached" in message and "HF_ENDPOINT" in message


# --- splitting and naming ---


def table(values: list[Any]) -> datasets.Dataset:
    count = len(values)
    return datasets.Dataset.from_dict({"a": values, "b": list(map(str, range(count))), ROW: range(count)})


def held_out(rows: datasets.Dataset, size: float, seed: int, key_columns: list[str]) -> list[int]:
    """The numbers of the held-out rows."""
    _, part = split_rows(rows, size, seed, key_columns)
    assert part is not None
    return list(part[ROW])


@pytest.mark.parametrize(("size", "expected"), [(1, 1), (7, 7), (0.1, 10), (0.001, 1), (99, 99)])
def test_split_sizes(size: float, expected: int) -> None:
    rows = table(list(range(100)))
    train, part = split_rows(rows, size, 3, ["a"])
    assert part is not None and len(part) == expected
    assert sorted(train[ROW][:] + part[ROW][:]) == list(range(100))
    assert train[ROW][:] == sorted(train[ROW]) and part[ROW][:] == sorted(part[ROW])
    assert train["a"][:] == train[ROW][:]


def test_split_by_the_seed() -> None:
    rows = table(list(range(100)))
    parts = {seed: held_out(rows, 10, seed, ["a"]) for seed in range(20)}
    assert parts[3] == held_out(rows, 10, 3, ["a"])
    assert len({tuple(part) for part in parts.values()}) == 20
    # 200 draws from 100 rows leave about 12 rows never drawn
    assert 75 < len({row for part in parts.values() for row in part}) <= 100


def test_split_nothing() -> None:
    rows = table([1, 2])
    assert split_rows(rows, 0, 0, ["a"]) == (rows, None)


def test_split_keeps_copies_together() -> None:
    rows = table([0, 0, 0, 1, 2, 2, 3, 4, 5, 5])  # in column a, three values occur once
    for seed in range(30):
        train, part = split_rows(rows, 3, seed, key_columns=["a"])
        assert part is not None and sorted(part["a"]) == [1, 3, 4]
        train, part = split_rows(rows, 6, seed, key_columns=["a"])
        assert part is not None and len(part) == 5 and not set(train["a"]) & set(part["a"])


def test_split_compares_the_key_columns_alone() -> None:
    rows = table(["x"] * 4)
    fails(DataError, "copies of each other in a (at least 4 times", call=lambda: split_rows(rows, 2, 0, ["a"]))
    assert len(held_out(rows, 2, 0, ["a", "b"])) == 2


def test_a_split_that_leaves_nothing_to_train() -> None:
    rows = table([1, 2, 3])
    fails(DataError, "val_set_size 3", "3 rows", call=lambda: split_rows(rows, 3, 0, ["a"]))
    fails(DataError, "val_set_size 0.9", "3 rows", call=lambda: split_rows(rows, 0.9, 0, ["a"]))
    fails(DataError, "'c'", "a, b", call=lambda: split_rows(rows, 1, 0, ["c"]))


def test_row_names(here: Path) -> None:
    path = write(here / "news.jsonl", "\n" + '{"a": "1"}\n' * 2 + "\n\n" + '{"a": "1"}\n')
    assert names([path]) == [f"news.jsonl line {n}" for n in (2, 3, 6)]
    packed = write(here / "news.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 20))
    assert names([packed])[11] == "news.jsonl.gz line 12"
    table_path = write(here / "news.csv", "a\n1\n2\n")
    assert names([table_path]) == ["row 1 of news.csv", "row 2 of news.csv"]
    assert names([path, table_path])[2:] == ["news.jsonl line 6", "row 1 of news.csv", "row 2 of news.csv"]
    assert names([path, table_path], max_rows=4)[3] == "row 1 of news.csv"


def test_row_names_of_a_folder_and_a_glob(here: Path) -> None:
    for folder in ("a", "b"):
        (here / folder).mkdir()
        write(here / folder / "news.jsonl", "\n" + lines(ROWS))
    write(here / "b" / "more.csv", "document,title\n본문,제목\n")
    in_b = ["row 1 of more.csv", "news.jsonl line 2", "news.jsonl line 3"]
    assert names([str(here / "b")]) == in_b
    assert names([str(here / "?" / "*.*")])[:3] == [*(f"{here}/a/news.jsonl line {n}" for n in (2, 3)), in_b[0]]
    saved = str(here / "saved")
    datasets.Dataset.from_list(ROWS).save_to_disk(saved)
    assert names([saved]) == [f"row 1 of {saved}", f"row 2 of {saved}"]
    parts = (("user/name", 2), ("a.csv", 1))
    hub = sources.Table(rows=load_rows([saved]), parts=parts)
    assert [hub.name(row) for row in range(3)] == ["row 1 of user/name", "row 2 of user/name", "row 1 of a.csv"]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("dataset_info.json", b'{"a": "\xff\xfe"}'),
        ("state.json", b'{"_data_files": 5}'),
        ("state.json", b'{"_format_columns": 5, "_data_files": [{"filename": "data-00000-of-00001.arrow"}]}'),
        ("state.json", b"[]"),
        ("state.json", b"[" * 9999),
    ],
)
def test_damaged_notes_of_a_saved_dataset(file: str, text: bytes, here: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(here / "saved")
    (here / "saved" / file).write_bytes(text)
    with pytest.raises(DataError, match=r"saved (is damaged or not|has no rows or is damaged|has values)"):
        load_rows([str(here / "saved")])


def names(paths: list[str], **settings: Any) -> list[str]:
    table = sources.load_rows(paths, **settings)
    return [table.name(row) for row in range(len(table.rows))]


def test_a_pipe_in_a_saved_dataset_is_not_waited_for(here: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(here / "saved")
    file = next((here / "saved").glob("*.arrow"))
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(DataError, match="arrow is a pipe or a device"):
        load_rows([str(here / "saved")])
