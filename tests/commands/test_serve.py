"""`byeori serve`: transformers' own server, started for an adapter and asked with the printed line."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

import byeori
import forks


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def served(model: Path, engine: str, tmp_path: Path) -> str:
    """Start a server, ask it with its own line, end it; returns the reply."""
    log = tmp_path / "log"
    flags = [str(model), "--engine", engine, "--port", str(free_port()), "--dtype", "float32"]
    with log.open("w") as file:
        process = forks.start("-m", "byeori", "serve", *flags, stdio=(None, file.fileno(), file.fileno()))
        try:
            for _ in range(1200):
                if asked := re.search(r"^curl .*?\n\n", log.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
                    break
                assert process.poll() is None, log.read_text(encoding="utf-8")
                time.sleep(0.1)
            assert asked, log.read_text(encoding="utf-8")
            line = asked.group().replace("curl ", "curl -s --noproxy '*' ", 1)
            return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True, timeout=60).stdout
        finally:
            os.kill(process.pid, signal.SIGTERM)
            assert process.wait(30) == 0


@pytest.mark.parametrize("kind", ["trained", pytest.param("merged", marks=pytest.mark.slow)])
def test_transformers_serves_an_adapter_and_a_model(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model: Path = request.getfixturevalue(kind)
    columns = {"document": "안녕하세요. Hello."}
    (answer,) = byeori.generate(model=model, columns=columns, dtype="float32", max_new_tokens=128)
    reply = json.loads(served(model, "transformers", tmp_path))
    assert reply["choices"][0]["message"]["content"].strip() == answer


@pytest.mark.parametrize("kind", ["trained", "merged"])
def test_llama_cpp_serves_an_adapter_and_a_model(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BYEORI_CACHE", str(tmp_path / "cache"))
    model: Path = request.getfixturevalue(kind)
    given = {"columns": {"document": "안녕하세요. Hello."}, "dtype": "float32", "max_new_tokens": 128}
    (answer,) = byeori.generate(model=model, engine="llamacpp", **given)
    reply = json.loads(served(model, "llamacpp", tmp_path))
    assert reply["choices"][0]["message"]["content"].strip() == answer


def test_a_port_in_use(trained: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(byeori.ConfigError, match=r"cannot listen on 127.0.0.1 port .* give another --port"),
    ):
        byeori.serve(model=trained, engine="transformers", port=taken.getsockname()[1])


def test_a_server_that_ends_by_itself(trained: Path) -> None:
    with pytest.raises(byeori.ModelError, match="the server ended with exit code 2"):
        byeori.serve(model=trained, engine="transformers", port=free_port(), engine_args="--no-such-flag")
