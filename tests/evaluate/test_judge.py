"""The judge against a local server of the OpenAI protocol: both orders, ties, cache, cost, what can go wrong."""

from __future__ import annotations

import io
import json
import socketserver
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import byeori
from byeori.errors import ConfigError
from byeori.evaluate import judge as judging
from byeori.evaluate.judge import Judge, judge_items, sentence, verdict_in


class Server(ThreadingHTTPServer):
    """decide: the text of a question -> what the judge says, or a status."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.decide: Any = longer
        self.failures: list[int] = []
        self.cost: float | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.keys.append(self.headers.get("Authorization"))
        status = self.server.failures.pop(0) if self.server.failures else 200
        said = self.server.decide(body["messages"][0]["content"])
        usage = {"prompt_tokens": 10, "completion_tokens": 2, "cost": self.server.cost}
        answer = {"choices": [{"message": {"content": said}}], "usage": usage}
        data = json.dumps(answer if status == 200 else {"error": {"message": "wrong"}}).encode()
        self.send_response(status if self.path == "/v1/chat/completions" else 404)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def longer(text: str) -> str:
    first, second = text.split("|")[1:3]
    return "The better one is [[A]]" if len(first) > len(second) else "B" if len(second) > len(first) else "T"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(judging, "_WAITS", (0.0, 0.0, 0.0))
    for name in judging.KEYS:
        monkeypatch.delenv(name, raising=False)
    running = Server()
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()


def items(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    made = [{"prompt": "p", "reference": "r", "base_output": a, "tuned_output": b} for a, b in pairs]
    return [item | {"base": {}, "tuned": {}} for item in made]


def judge_of(server: Server, folder: Path) -> Judge:
    return Judge(url=server.url, model="m", prompt="{prompt}|{first}|{second}", cache=folder)


def test_both_orders_ties_and_cost(server: Server, tmp_path: Path) -> None:
    rows = items(("a", "aaa"), ("bbb", "b"), ("cc", "cc"))
    found = judge_items(rows, judge_of(server, tmp_path), lambda done, total: None)
    assert [(row["base"]["judge"], row["tuned"]["judge"]) for row in rows] == [(0, 100), (100, 0), (50, 50)]
    counts = {"wins": 1, "ties": 1, "losses": 1, "unreadable": 0, "agreed": 3}
    # "p|cc|cc" is the same question in both orders; two threads may ask it at once
    assert found.items() >= {**counts, "model": "m"}.items() and found["requests"] + found["cached"] == 6
    assert found["prompt_tokens"] == 10 * found["requests"] and found["completion_tokens"] == 2 * found["requests"]
    asked = {body["messages"][0]["content"] for body in server.asked}
    assert asked == {"p|a|aaa", "p|aaa|a", "p|bbb|b", "p|b|bbb", "p|cc|cc"}
    before = len(server.asked)
    again = judge_items(rows, judge_of(server, tmp_path), lambda done, total: None)
    assert len(server.asked) == before and again["cached"] == 6 and again["prompt_tokens"] == 0


def test_money_by_a_price_and_by_what_the_endpoint_says(server: Server, tmp_path: Path) -> None:
    priced = replace(judge_of(server, tmp_path / "one"), price=(0.5, 4.0))
    found = judge_items(items(("a", "aaa")), priced, lambda done, total: None)
    assert found["cost"] == pytest.approx((20 * 0.5 + 4 * 4.0) / 1e6)
    assert sentence(found, 1).endswith("(2 requests, 24 tokens, $2.6e-05).")
    server.cost = 0.01
    named = judge_items(items(("a", "aaa")), judge_of(server, tmp_path / "three"), lambda done, total: None)
    assert named["cost"] == pytest.approx(0.02) and sentence(named, 1).endswith(" tokens, $0.02).")
    server.cost = None
    free = judge_items(items(("a", "aaa")), judge_of(server, tmp_path / "two"), lambda done, total: None)
    assert "cost" not in free and sentence(free, 1).endswith("(2 requests, 24 tokens).")


def test_a_damaged_cache_is_asked_again(server: Server, tmp_path: Path) -> None:
    rows = items(("a", "aaa"))
    judge_items(rows, judge_of(server, tmp_path), lambda done, total: None)
    for path, said in zip(sorted(tmp_path.rglob("*.json")), (b"\xff{", b'{"text": "A"}'), strict=True):
        path.write_bytes(said)
    asked = len(server.asked)
    found = judge_items(rows, judge_of(server, tmp_path), lambda done, total: None)
    assert len(server.asked) == asked + 2 and found["cached"] == 0 and found["wins"] == 1


@pytest.mark.parametrize(
    "said", [b'{"choices": [{"message": {"content": "A"}}], "usage": {"prompt_tokens": "x"}}', b"[" * 100_000]
)
def test_an_odd_answer_is_one_sentence(said: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "_WAITS", ())
    monkeypatch.setattr(urllib.request, "urlopen", lambda *given, **named: io.BytesIO(said))
    judge = Judge(url="http://127.0.0.1:9/v1", model="m", prompt="{prompt}", cache=tmp_path)
    with pytest.raises(ConfigError, match="--judge"):
        judge_items(items(("a", "b")), judge, lambda done, total: None)


def test_a_judge_that_prefers_the_first_proves_nothing(server: Server, tmp_path: Path) -> None:
    server.decide = lambda text: "A"
    rows = items(("a", "aaa"), ("bbb", "b"))
    found = judge_items(rows, judge_of(server, tmp_path), lambda done, total: None)
    assert (found["ties"], found["agreed"]) == (2, 0)
    assert "its two orders agreed in 0%" in judging.sentence(found, 2)


def test_a_verdict_that_cannot_be_read_is_counted(server: Server, tmp_path: Path) -> None:
    server.decide = lambda text: "hard to say"
    found = judge_items(items(("a", "b")), judge_of(server, tmp_path), lambda done, total: None)
    assert (found["unreadable"], found["ties"]) == (1, 1)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("A", "A"),
        ("[[B]]", "B"),
        ("Answer A is good, but B.", "B"),
        ("B is a better answer.", "B"),
        ("A, since B's title isn't one, and A’s is a title that doesn’t end", "A"),
        ("'B'", "B"),
        ("(b)", "B"),
        ("tie", "T"),
        ("It is a Tie", "T"),
        ("**T**", "T"),
        ("ABBA", None),
        ("", None),
    ],
)
def test_verdicts(text: str, verdict: str | None) -> None:
    assert verdict_in(text) == verdict


def test_what_is_temporary_is_tried_again(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BYEORI_JUDGE_KEY", "secret")
    server.failures = [429, 503]
    assert judge_of(server, tmp_path).ask("p|a|b")["text"] == "T"
    assert len(server.asked) == 3 and set(server.keys) == {"Bearer secret"}
    assert "secret" not in "".join(path.read_text() for path in tmp_path.iterdir())


def test_a_refusal_is_one_sentence(server: Server, tmp_path: Path) -> None:
    server.failures = [401]
    with pytest.raises(ConfigError, match=r"answered 401 .*; set BYEORI_JUDGE_KEY to your key"):
        judge_of(server, tmp_path).ask("p|a|b")
    gone = Judge(url="http://127.0.0.1:1/v1", model="m", prompt="", cache=tmp_path)
    with pytest.raises(ConfigError, match=r"does not answer .*; check the address"):
        gone.ask("x")


def test_a_key_with_a_line_break_is_used_without_it(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BYEORI_JUDGE_KEY", "secret\n")
    judge_of(server, tmp_path).ask("p|a|b")
    assert server.keys == ["Bearer secret"]
    monkeypatch.setenv("BYEORI_JUDGE_KEY", "secret\nmore")
    with pytest.raises(ConfigError, match="holds characters that no key has") as refused:
        judge_of(server, tmp_path).ask("p|a|c")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("said", [b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"])
def test_what_speaks_no_http_is_one_sentence(said: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)
            self.request.sendall(said)

    monkeypatch.setattr(judging, "_WAITS", (0.0,))
    with socketserver.TCPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        judge = Judge(url=f"http://127.0.0.1:{other.server_address[1]}/v1", model="m", prompt="", cache=tmp_path)
        with pytest.raises(ConfigError, match=r"does not answer .*; check the address"):
            judge.ask("x")
        other.shutdown()


def test_a_comparison_with_a_judge(
    server: Server, trained: Path, title_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BYEORI_CACHE", str(tmp_path / "cache"))
    (tmp_path / "ask.txt").write_text("{reference}|{first}|{second}", encoding="utf-8")
    given: dict[str, Any] = {"adapter": trained, "data_path": title_rows, "max_rows": 6, "max_new_tokens": 6}
    given |= {"dtype": "float32", "few_shots": 0, "output_dir": tmp_path / "report"}
    asked = {"judge": server.url, "judge_model": "m", "judge_prompt": tmp_path / "ask.txt"}
    result = byeori.compare(**given, **asked, fail_unless="judge.low > -101")
    rows = [json.loads(line) for line in result.rows.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        sizes = [len(row[f"{side}_output"]) for side in ("base", "tuned")]
        assert row["tuned"]["judge"] == (100 if sizes[1] > sizes[0] else 0 if sizes[0] > sizes[1] else 50)
    assert result.metrics["judge"]["wins"] + result.metrics["judge"]["ties"] + result.metrics["judge"]["losses"] == 6
    assert "m preferred the tuned model in " in result.verdict
    given["output_dir"] = tmp_path / "other"
    (tmp_path / "ask.txt").write_text("{first} only", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"needs \{first\} and \{second\}"):
        byeori.compare(**given, **asked)
    for wrong, words in (({"judge": server.url}, "needs --judge_model"), ({"judge_model": "m"}, "need --judge,")):
        with pytest.raises(ConfigError, match=words):
            byeori.compare(**given, **wrong)
