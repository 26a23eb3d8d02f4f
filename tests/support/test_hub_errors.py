"""What the Hub, or something between, answers decides the sentence; what is temporary is tried again, with a line."""

from __future__ import annotations

import json
import os
import subprocess
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import forks
from byeori.support import hub_errors
from hub_server import TOKEN, Fault, Hub, serve

RUN = """
import sys
from byeori.errors import ByeoriError
from byeori.support import hub_errors
hub_errors._WAITS = (0, 0)
from byeori.model import load
try:
    print("FOLDER", load.local_folder(sys.argv[1]))
except ByeoriError as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(2)
"""


def fetch(hub: Hub, home: Path, name: str = "me/tiny", **variables: str) -> tuple[int, str]:
    """Download in a process of its own, since the client reads its endpoint once."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "NO_PROXY": "*"}
    done = forks.run("-c", RUN, name, env=environment | {"HF_HUB_DISABLE_TELEMETRY": "1"} | variables)
    output = done.stdout + done.stderr
    assert "Traceback" not in output, output
    assert len([line for line in output.splitlines() if "Error: " in line]) == (done.returncode == 2), output
    return done.returncode, output


@pytest.fixture
def files() -> dict[str, bytes]:
    return {"config.json": b"{}", "model.safetensors": bytes(300_000)}


@pytest.mark.parametrize(
    ("fault", "words", "line"),
    [
        (401, "the Hub asks for a log-in for me/tiny", None),
        (403, "the Hub refuses access to me/tiny", None),
        (404, "the Hub has no me/tiny that this token may see", None),
        (Fault(429, headers={"Retry_After": "900"}), "(HTTP 429) (fault, and your token", None),
        (Fault(429, headers={"Retry_After": "900"}), "try again in 15 minutes", None),
        (Fault(429, headers={"Retry_After": "0"}), "try again later", "The Hub answered HTTP 429 for me/tiny; trying"),
        (500, "the Hub failed (HTTP 500)", "The Hub answered HTTP 500 for me/tiny; trying again in 0 s"),
        (503, "the Hub failed (HTTP 503)", "The Hub answered HTTP 503 for me/tiny; trying again in 0 s"),
        (418, "the Hub rejected me/tiny (HTTP 418)", None),
        (451, "the Hub may not give out me/tiny here (HTTP 451)", None),
        (407, "the proxy of this network asks for a log-in", None),
        (Fault(502, page="<html>Bad Gateway</html>"), "the Hub failed (HTTP 502); try again later", "HTTP 502"),
        (Fault(200, page="<html>Welcome to our hotel</html>"), "something else answered in place of the Hub", None),
        (Fault(cut=True), "the connection to the Hub broke off in the middle of me/tiny", "broke off for me/tiny"),
    ],
)
def test_the_answer_decides_the_sentence(
    tmp_path: Path, files: dict[str, bytes], fault: int | Fault, words: str, line: str | None
) -> None:
    with serve() as hub:
        hub.put("me/tiny", files)
        hub.fault = {"/api/models/": fault}
        code, said = fetch(hub, tmp_path)
    assert code == 2 and words in said, said
    assert (line in said) if line else ("trying again" not in said), said
    assert "out of reach" not in said and "cannot be reached" not in said


@pytest.mark.parametrize(
    "fault",
    [
        {"/api/models/": Fault(503, times=1)},
        {"/api/models/": Fault(429, times=2, headers={"Retry_After": "1"})},
        {"/api/models/": Fault(times=1, cut=True)},
        {"/resolve/.*/model.safetensors": Fault(times=1, cut=True)},
    ],
    ids=["503", "429", "cut", "cut file"],
)
def test_what_is_temporary_is_tried_again(tmp_path: Path, files: dict[str, bytes], fault: dict[str, Any]) -> None:
    with serve() as hub:
        hub.put("me/tiny", files)
        hub.fault = fault
        code, said = fetch(hub, tmp_path)
    assert code == 0, said
    folder = Path(said.partition("FOLDER ")[2].splitlines()[0])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    if "/api/models/" in fault:
        assert "; trying again in " in said


def test_a_certificate_that_is_not_trusted(tmp_path: Path, files: dict[str, bytes]) -> None:
    pem = tmp_path / "hub.pem"
    key = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(pem), "-out", str(tmp_path / "hub.crt")]
    subprocess.run([*key, *names], check=True, capture_output=True)
    pem.write_text(pem.read_text() + (tmp_path / "hub.crt").read_text())
    with serve(pem) as hub:
        hub.put("me/tiny", files)
        code, said = fetch(hub, tmp_path / "home")
        assert code == 2 and "certificate is not trusted" in said and "SSL_CERT_FILE" in said, said
        assert fetch(hub, tmp_path / "home", SSL_CERT_FILE=str(tmp_path / "hub.crt"))[0] == 0


def test_offline_mode_and_a_mirror_that_is_down(tmp_path: Path, files: dict[str, bytes]) -> None:
    with serve() as hub:
        hub.put("me/tiny", files)
        assert fetch(hub, tmp_path)[0] == 0
        code, said = fetch(hub, tmp_path, name="me/other", HF_HUB_OFFLINE="1")
        assert code == 2 and "HF_ENDPOINT and HF_HUB_OFFLINE" in said
        assert fetch(hub, tmp_path, HF_HUB_OFFLINE="1")[0] == 0  # from the cache
    code, said = fetch(hub, tmp_path, name="me/other")
    assert code == 2 and "cannot be reached; check the name, the network, HF_ENDPOINT" in said
    assert fetch(hub, tmp_path)[0] == 0


def test_no_token_is_shown(tmp_path: Path, files: dict[str, bytes]) -> None:
    with serve() as hub:
        hub.put("me/tiny", files)
        hub.fault = {"/api/models/": 403}
        said = fetch(hub, tmp_path, HF_TOKEN=TOKEN)[1]
    assert TOKEN not in said


def test_retry_after_in_every_form() -> None:
    def after(**headers: str) -> int | None:
        return hub_errors.retry_after(SimpleNamespace(headers={key.replace("_", "-"): v for key, v in headers.items()}))

    assert after(retry_after="17") == 17 and after() is None and after(retry_after="soon") is None
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    assert 88 <= (after(retry_after=later) or 0) <= 92
    assert after(ratelimit='"api";r=0;t=55') == 55 and after(ratelimit='"api";r=3;t=55') is None


def test_waits_are_those_asked_for_and_not_longer_than_a_person_waits() -> None:
    class Answer(Exception):
        def __init__(self, status: int, **headers: str) -> None:
            headers = {key.replace("_", "-"): value for key, value in headers.items()}
            self.response = SimpleNamespace(status_code=status, headers=headers)

    def run(*answers: Exception) -> tuple[list[float], list[str]]:
        left, waits, lines = list(answers), [], []

        def action() -> str:
            if left:
                raise left.pop(0)
            return "done"

        assert hub_errors.retried(action, "me/x", show=lines.append, sleep=waits.append) == "done"
        return waits, lines

    assert run(Answer(503), Answer(502), Answer(500)) == (
        [1, 2, 4],
        [
            f"The Hub answered HTTP {status} for me/x; trying again in {wait} s"
            for status, wait in ((503, 1), (502, 2), (500, 4))
        ],
    )
    assert run(Answer(429, retry_after="30"))[0] == [30]
    for answers in ([Answer(429, retry_after="121")], [Answer(404)], [Answer(503)] * 4, [ValueError("a bug")]):
        with pytest.raises((Answer, ValueError)):
            run(*answers)


def test_an_explanation_of_something_else_is_none() -> None:
    assert hub_errors.explanation(ValueError("a bug"), "me/x") is None
    assert "something else answered" in str(hub_errors.explanation(json.JSONDecodeError("x", "<html>", 0), "me/x"))
