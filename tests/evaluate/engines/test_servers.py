"""Command lines of servers, and which of them is chosen."""

from __future__ import annotations

import json
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from byeori.errors import ConfigError
from byeori.evaluate.engines import servers
from byeori.evaluate.engines.servers import Address

HERE = Address(host="127.0.0.1", port=8000)


def test_an_engine_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "program", lambda engine: None)
    with pytest.raises(ConfigError, match=r"--engine vllm is not installed; pip install vllm"):
        servers.choose("vllm")
    with pytest.raises(ConfigError, match="no engine is installed"):
        servers.choose("auto")


def test_auto_is_the_first_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"transformers", "llamacpp"}
    monkeypatch.setattr(servers, "program", lambda engine: [] if engine in there else None)
    assert servers.choose("auto") == "llamacpp"
    there.add("vllm")
    assert servers.choose("auto") == "vllm"


def test_vllm_serves_the_base_and_the_adapter_beside_it(trained: Path, tiny_model: Path) -> None:
    ends = {"eos_token_id": [0, 2]}
    server = servers.vllm(tiny_model, trained, HERE, dtype="float32", rank=16, ends=ends)
    words = server.command
    flags = dict(pairwise(words))
    assert server.model == "tuned" and str(tiny_model) in words and "--enable-lora" in words
    assert flags["--lora-modules"] == f"tuned={trained}" and flags["--max-lora-rank"] == "16"
    assert flags["--tokenizer"] == str(trained) and flags["--served-model-name"] == "base"
    assert flags["--chat-template"] == str(trained / "chat_template.jinja")
    assert json.loads(flags["--override-generation-config"]) == ends


def test_vllm_serves_a_whole_model(merged: Path) -> None:
    server = servers.vllm(merged, merged, HERE, dtype="auto", rank=None, ends=None)
    assert server.model == merged.name and not [word for word in server.command if "lora" in word]


@pytest.mark.parametrize(("host", "asked"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", "[::1]")])
def test_the_curl_line_names_an_address_that_this_machine_reaches(host: str, asked: str) -> None:
    request = {"messages": [{"role": "user", "content": "it's 봄"}]}
    line = servers.curl(Address(host=host, port=81), "tuned", request)
    words = shlex.split(line.replace("\\\n", ""))
    assert words[1] == f"http://{asked}:81/v1/chat/completions"
    assert json.loads(words[-1]) == {"model": "tuned", **request, "max_tokens": 128, "temperature": 0}
    assert "/v1/completions" in servers.curl(HERE, "m", {"prompt": "a"})
