"""Whoever has no token, or stands on another page, sees and changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from studio_page import ADDRESS, TOKEN, studio


@pytest.fixture
def page(tmp_path: Path) -> TestClient:
    with studio(tmp_path) as client:
        yield client


def paths(client: TestClient) -> list[tuple[str, str]]:
    return [(method, route.path) for route in client.app.routes for method in getattr(route, "methods", None) or []]


def test_without_the_token_every_route_is_closed(tmp_path: Path) -> None:
    with studio(tmp_path, token=None) as client:
        for method, path in [*paths(client), ("GET", "/static/studio.css")]:
            answer = client.request(method, path)
            assert answer.status_code == 403, (method, path)
            assert method == "HEAD" or "byeori studio" in answer.text
            assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("token", ["wrong", "", TOKEN[:-1], TOKEN + "x", "토큰"])
def test_a_wrong_token_opens_nothing(token: str, tmp_path: Path) -> None:
    with studio(tmp_path, token=None) as client:
        assert client.get("/", params={"token": token}).status_code == 403
        assert client.get("/").status_code == 403


def test_the_token_leaves_the_address(tmp_path: Path) -> None:
    with studio(tmp_path, token=None) as client:
        answer = client.get("/data", params={"token": TOKEN, "a": "b"}, follow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (303, "data?a=b")
        cookie = answer.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie and "path" not in cookie
        assert client.get("/data").status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:9999", "http://localhost:8080"])
def test_another_origin_changes_nothing(origin: str, page: TestClient) -> None:
    for method, path in paths(page):
        assert page.request(method, path, headers={"origin": origin}).status_code == 403, (method, path)


def test_a_form_without_an_origin_is_refused(page: TestClient) -> None:
    del page.headers["origin"]
    assert page.post("/data-choose", data={"path": "x"}).status_code == 403
    assert page.get("/").status_code == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_another_pages_script_reads_nothing(site: str, page: TestClient) -> None:
    headers = {"sec-fetch-site": site, "sec-fetch-mode": "no-cors"}
    assert page.get("/", headers=headers).status_code == 403
    assert page.get("/", headers=headers | {"sec-fetch-mode": "navigate"}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "[::1", ""])
def test_another_host_name_is_refused(host: str, page: TestClient) -> None:
    """A name that an attacker points at this machine (DNS rebinding)."""
    assert page.get("/", headers={"host": host, "origin": f"http://{host}"}).status_code == 421


@pytest.mark.parametrize("host", ["localhost:8080", "127.0.0.1:1234", "[::1]:80", "hub.example.org", "a.colab.dev"])
def test_forwarded_ports_and_named_proxies_are_known(host: str, tmp_path: Path) -> None:
    with studio(tmp_path, origins=["https://hub.example.org", "https://*.colab.dev"]) as client:
        assert client.get("/", headers={"host": host, "origin": f"https://{host}"}).status_code == 200


def test_a_proxys_path_is_removed(tmp_path: Path) -> None:
    with studio(tmp_path, root_path="/user/me/proxy/8080") as client:
        assert client.get("/user/me/proxy/8080/data").status_code == 200
        assert client.get("/data").status_code == 200  # a proxy that removes it


def test_every_answer_has_the_headers(page: TestClient) -> None:
    for path in ("/", "/data", "/static/htmx.min.js", "/no/such/page"):
        headers = page.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "script-src 'self';" in policy
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert headers["cache-control"] == "no-store" or path.startswith("/static")


def test_no_html_has_inline_scripts_or_styles() -> None:
    import re

    from byeori.studio import pages

    for path in (Path(pages.__file__).parent / "templates").glob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)|javascript:|hx-on|\|\s*safe", text), path


def test_addresses_are_relative() -> None:
    """So they hold behind every proxy."""
    import re

    from byeori.studio import pages

    for path in (Path(pages.__file__).parent / "templates").glob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r'(href|src|action|hx-get|hx-post)="(/|https?:)', text), path


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../outside.jsonl", "link.jsonl", "sub/../../outside.jsonl", "linked/outside.jsonl", "*/*.jsonl"],
)
def test_files_outside_the_folder_are_not_opened(path: str, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    (folder / "sub").mkdir(parents=True)
    outside = tmp_path / "outside.jsonl"
    outside.write_text('{"prompt": "geheim", "completion": "b"}\n', encoding="utf-8")
    (folder / "link.jsonl").symlink_to(outside)
    (folder / "linked").symlink_to(tmp_path)
    with studio(folder) as client:
        answer = client.post("/data-choose", data={"other": path})
        assert "geheim" not in answer.text and "is outside" in answer.text
        client.app.state.workspace.save_draft("train", {"data_path": [path]})  # nor if something else wrote it there
        answer = client.get("/data")
        assert "geheim" not in answer.text and "is outside" in answer.text


@pytest.mark.parametrize(
    ("address", "query"),
    [
        ("file://{outside}", ""),
        ("FILE://{outside}", ""),
        ("local://{outside}", ""),
        ("file://{outside}:0.5", ""),
        ("simplecache::file://{outside}", ""),
        ("https://a.example/x.zip::file://{outside}", ""),
        ("zip://rows.jsonl::file://{outside}", ""),
        ("dir://{outside}", ""),
        ("git://{outside}", ""),
        ("sqlite:///{outside}", "SELECT * FROM t"),
        ("sqlite:////../{outside}", "SELECT * FROM t"),
        ("sqlite+pysqlite:///{outside}?mode=ro", "SELECT * FROM t"),
        ("sqlite:///file:{outside}?uri=true", "SELECT * FROM t"),
        ("sqlite:///file:%2F{outside}?uri=true", "SELECT * FROM t"),
        ("sqlite:///link.db", "SELECT * FROM t"),
        ("sqlite:///link.db:0.5", "SELECT * FROM t"),
        ("sqlite:///own.db", "VACUUM INTO '{outside}-copy'"),
        ("sqlite:///own.db", "ATTACH '{outside}' AS o"),
        ("duckdb:///:memory:", "SELECT * FROM read_text('{outside}')"),
        ("duckdb:///own.db", "COPY t TO '{outside}-copy'"),
    ],
)
def test_addresses_lead_to_no_file_outside(address: str, query: str, tmp_path: Path) -> None:
    """As rows on the screen, as rows of a command, and as the place that checkpoints are copied to."""
    import sqlite3

    from byeori import config
    from byeori.errors import ByeoriError

    folder, outside = tmp_path / "work", tmp_path / "outside.jsonl"
    folder.mkdir()
    for path in (outside, folder / "own.db"):
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE t AS SELECT 'geheim' AS prompt, 'b' AS completion")
    (folder / "link.db").symlink_to(outside)
    address, query = address.format(outside=outside), query.format(outside=outside)
    with studio(folder) as client:
        answer = client.post("/data-choose", data={"other": address, "query": query})
        assert answer.status_code == 200 and "geheim" not in answer.text and 'role="alert"' in answer.text
        space = client.app.state.workspace
        space.save_draft("train", {"data_path": [address], "query": query})
        answer = client.get("/data")
        assert "geheim" not in answer.text and 'role="alert"' in answer.text
        for name in ("data_path", "validation_path"):
            with pytest.raises(ByeoriError):
                space.check(config.SftSettings, {name: [address], "query": query})
        if "own.db" not in address:
            with pytest.raises(ByeoriError):
                space.check(config.SftSettings, {"mirror_to": address})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside.jsonl", "work"]


def test_addresses_elsewhere_are_allowed(tmp_path: Path) -> None:
    import sqlite3

    from byeori import config

    with sqlite3.connect(tmp_path / "own.db") as connection:
        connection.execute("CREATE TABLE t AS SELECT 'offen' AS prompt, 'b' AS completion")
    with studio(tmp_path) as client:
        for address in ("https://a.example/x.csv", "s3://bucket/x.jsonl", "hf://datasets/a/b/x", "postgresql://h/db"):
            client.app.state.workspace.check(config.SftSettings, {"data_path": [address]})
        answer = client.post("/data-choose", data={"other": "sqlite:///own.db", "query": "SELECT * FROM t"})
        assert "offen" in answer.text and 'role="alert"' not in answer.text


@pytest.mark.parametrize("name", ["../../x.jsonl", "/abs/x.jsonl", "..\\x.jsonl", ".hidden.jsonl", "<img src=x>.jsonl"])
def test_a_sent_file_stays_in_the_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    with studio(folder) as client:
        for _ in range(2):
            answer = client.post("/data-choose", files={"file": (name, b'{"prompt": "a", "completion": "b"}\n')})
            assert answer.status_code == 200 and "<img" not in answer.text
    made = sorted(path for path in tmp_path.rglob("*x*.jsonl") if ".byeori" not in str(path))
    assert len(made) <= 2 and all(path.parent == folder / "data" for path in made)


SCRIPT = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{7*7}}"


def test_scripts_in_data_are_text(tmp_path: Path) -> None:
    import json

    rows = [{"prompt": SCRIPT, SCRIPT: "x", "completion": SCRIPT}]
    rows += [{"messages": [{"role": SCRIPT, "content": SCRIPT}, {"role": "assistant", "content": SCRIPT}]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with studio(tmp_path) as client:
        answer = client.post("/data-choose", data={"path": "rows.jsonl"})
        assert answer.status_code == 200 and "&lt;script&gt;alert(1)" in answer.text
        assert "<script>alert" not in answer.text and "<img" not in answer.text and "49" not in answer.text


@pytest.mark.parametrize("text", [SCRIPT, "x" * 300, "~nobody", "a\0['"])
def test_scripts_in_every_text_field_are_text(text: str, page: TestClient) -> None:
    """Every form of every screen, with every field holding a script, or no path: no answer fails or shows it as one."""
    from html.parser import HTMLParser

    class Forms(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.forms: list[tuple[str, dict[str, str]]] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            given = dict(attrs)
            if tag == "form":
                self.forms.append((str(given.get("action") or ""), {}))
            elif tag in ("input", "select", "textarea", "button") and given.get("name") and self.forms:
                self.forms[-1][1][str(given["name"])] = text

    tried = 0
    for name in ("", "data", "template", "plan", "train", "try", "compare", "ship"):
        found = Forms()
        found.feed(page.get(f"/{name}", params={"run": text, "error": text}).text)
        for action, fields in found.forms:
            answer = page.post(f"/{action}", data=fields)
            assert answer.status_code < 500 and "<script>alert" not in answer.text and "<img" not in answer.text
            tried += 1
    assert tried


def test_the_origin_is_that_of_the_page(page: TestClient) -> None:
    assert page.post("/data-choose", data={}, headers={"origin": ADDRESS}).status_code == 200
