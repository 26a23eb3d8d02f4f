"""Rows behind an address: a query to SQLite and to a PostgreSQL that runs here, files of a file system of fsspec."""

from __future__ import annotations

import gzip
import http.server
import json
import os
import shutil
import sqlite3
import subprocess
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import datasets
import fsspec
import pytest

from byeori.data import sources
from byeori.errors import DataError

ROWS = [{"질문": "수도는?", "답": "서울", "번호": 1}, {"질문": "산은?", "답": None, "번호": 2}]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def values(table: sources.Table) -> list[dict[str, object]]:
    return list(table.rows.remove_columns(sources.ROW))


# --- databases ------------------------------------------------------------------------------------------------------


def test_rows_of_sqlite(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "a.db") as base:
        base.execute("CREATE TABLE rows (질문 TEXT, 답 TEXT, 번호 INTEGER)")
        base.executemany("INSERT INTO rows VALUES (?, ?, ?)", [tuple(row.values()) for row in ROWS])
    base.close()
    url = f"sqlite:///{tmp_path}/a.db"
    query = "SELECT * FROM rows WHERE 질문 LIKE '%?' AND 'a:b' <> ':c' ORDER BY 번호"
    read = sources.load_rows([url], query=query)
    assert values(read) == ROWS and read.name(1) == f"row 2 of {url}"
    for text, words in (
        ("SELECT * FROM missing", "no such table: missing"),
        ("SELECT * FROM rows WHERE 번호 > 9", "returns no rows"),
        ("DELETE FROM rows", "returns no rows"),
        ("SELECT 질문 AS a, 답 AS a FROM rows", "'a' twice"),
        ("SELEC", "syntax error"),
    ):
        with pytest.raises(DataError, match=words):
            sources.load_rows([url], query=text)
    assert values(sources.load_rows([url], query=query)) == ROWS  # nothing was deleted
    with pytest.raises(DataError, match="there is no file"):
        sources.load_rows([f"sqlite:///{tmp_path}/none.db"], query=query)
    assert not (tmp_path / "none.db").exists()
    with pytest.raises(DataError, match="--query"):
        sources.load_rows([url])


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of this machine's PostgreSQL, on a socket of its own."""
    folders = [shutil.which("initdb"), *map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb"))]
    initdb = next((path for path in folders if path), None)
    if initdb is None:
        pytest.skip("PostgreSQL's server is not installed (apt-get install postgresql)")
    folder = tmp_path_factory.mktemp("pg")
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []  # a server refuses to run as root
    place = Path("/tmp") / f"pg-{uuid.uuid4().hex[:8]}"  # sockets have short paths
    place.mkdir(mode=0o777)
    place.chmod(0o777)
    subprocess.run([*user, initdb, "-D", place / "data", "-A", "trust", "-U", "me"], check=True, capture_output=True)
    control = Path(initdb).with_name("pg_ctl")
    options = f"-k {place} -c listen_addresses='' -c fsync=off"
    subprocess.run(
        [*user, control, "-D", place / "data", "-o", options, "-w", "-l", place / "log", "start"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    yield f"postgresql://me:s3cr3t@/postgres?host={place}"
    subprocess.run([*user, control, "-D", place / "data", "-m", "immediate", "stop"], check=True, capture_output=True)
    shutil.rmtree(place, ignore_errors=True)
    assert folder


def test_rows_of_postgresql(postgres: str, tmp_path: Path) -> None:
    import psycopg

    with psycopg.connect(postgres) as connection:
        connection.execute("CREATE TABLE pairs (prompt text, answer jsonb, price numeric(6,2), at date, n bigint)")
        for number in range(2500):
            row = (f"질문 {number}", json.dumps([{"role": "user", "content": "a"}]), 3.1, "2024-01-02", number or None)
            connection.execute("INSERT INTO pairs VALUES (%s, %s, %s, %s, %s)", row)
    read = sources.load_rows([postgres], query="SELECT * FROM pairs WHERE prompt LIKE '질문%' ORDER BY prompt")
    assert len(read.rows) == 2500
    first = {
        "prompt": "질문 0",
        "answer": [{"role": "user", "content": "a"}],
        "price": "3.10",
        "at": "2024-01-02",
        "n": None,
    }
    assert values(read)[0] == first and "s3cr3t" not in read.name(0)
    with pytest.raises(DataError, match='relation "missing" does not exist'):
        sources.load_rows([postgres], query="SELECT * FROM missing")
    with pytest.raises(DataError, match="passwords are not saved with a run"):
        sources.load_rows(["postgresql://***@host/db"], query="SELECT 1")


def test_other_processes_read_the_rows_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with sqlite3.connect(tmp_path / "a.db") as base:
        base.execute("CREATE TABLE rows (a TEXT)")
        base.execute("INSERT INTO rows VALUES ('one')")
    url, query = f"sqlite:///{tmp_path}/a.db", "SELECT * FROM rows"
    assert len(sources.load_rows([url], query=query).rows) == 1
    base.execute("INSERT INTO rows VALUES ('two')")
    base.commit()
    base.close()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert len(sources.load_rows([url], query=query).rows) == 1
    monkeypatch.delenv("LOCAL_RANK")
    assert len(sources.load_rows([url], query=query).rows) == 2


# --- addresses of files ---------------------------------------------------------------------------------------------


def test_files_of_fsspec(tmp_path: Path) -> None:
    place = f"memory://{uuid.uuid4().hex}"
    system, root = fsspec.core.url_to_fs(place)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    system.pipe(f"{root}/a.jsonl", text.encode())
    system.pipe(f"{root}/b.jsonl.gz", gzip.compress(text.encode()))
    system.pipe(f"{root}/c-test.jsonl", b'{"x": 1}\n')
    assert values(sources.load_rows([f"{place}/a.jsonl"])) == ROWS
    whole = sources.load_rows([place])
    assert values(whole) == ROWS + ROWS and "c-test.jsonl" in whole.notes[0]
    assert values(sources.load_rows([f"{place}/*.gz"])) == ROWS
    mixed = sources.load_rows([f"{place}/a.jsonl:0.5", f"{place}/b.jsonl.gz:0.5"])
    assert [weight for _, _, weight in mixed.sources] == [0.5, 0.5]
    system.pipe(f"{root}/a.jsonl", b'{"x": 2}\n')
    assert values(sources.load_rows([f"{place}/a.jsonl"])) == [{"x": 2}]  # changed there
    for url, words in (
        (f"{place}/none.jsonl", "there is no file"),
        (f"{place}/*.csv", "no file matches"),
        ("nosuch://bucket/a.jsonl", "nosuch"),
        ("abfs://bucket/a.jsonl", "install that package"),
    ):
        with pytest.raises(DataError, match=words):
            sources.load_rows([url])


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a web server with rows.jsonl; it forbids what begins with `secret` and fails for `broken`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = {"secret": 403, "broken": 500, "rows.j": 200}.get(self.path[1:7], 404)
            body = "".join(json.dumps(row) + "\n" for row in ROWS).encode() if status == 200 else b""
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if self.command == "GET" else b"")

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_files_of_a_web_server(web: str) -> None:
    read = sources.load_rows([f"{web}/rows.jsonl?download=true"])
    assert values(read) == ROWS
    for name, words in (
        ("none.jsonl", "there is no file"),
        ("secret.jsonl", r"cannot be read: 403, message='Forbidden'"),
        ("broken.jsonl", r"cannot be read: 500, message='Internal Server Error'"),
    ):
        with pytest.raises(DataError, match=words):
            sources.load_rows([f"{web}/{name}"])
    with pytest.raises(DataError, match=r"cannot be read: Cannot connect to host 127\.0\.0\.1:9"):
        sources.load_rows(["http://127.0.0.1:9/rows.jsonl"])
