"""The page of byeori studio, asked as a browser asks it."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from typing import Any

import yaml
from starlette.testclient import TestClient

from byeori import cli, config
from byeori.config import flags
from byeori.studio.app import make_app
from byeori.studio.workspace import Workspace

TOKEN = "a-token-of-the-tests"
ADDRESS = "http://127.0.0.1:8080"


@contextmanager
def studio(
    folder: Path, *, token: str | None = TOKEN, models: tuple[Path, ...] = (), **settings: Any
) -> Iterator[TestClient]:
    """A browser that has opened the address with the token; it stands in the folder, as the server does."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        app = make_app(Workspace(folder, models), TOKEN, **settings)
        with TestClient(app, base_url=ADDRESS, headers={"origin": ADDRESS, "accept-language": "en"}) as client:
            if token:
                client.get("/", params={"token": token})
            yield client
    finally:
        os.chdir(before)


def copied(html: str, name: str) -> str:
    """What a button of a screen copies: as-command or as-yaml."""
    return unescape(html.split(f'<pre id="{name}" tabindex="0">')[1].split("</pre>")[0])


def meant(html: str) -> tuple[str, config.Settings]:
    """The command that a screen copies, and its settings, which are those of the YAML that it copies."""
    words = shlex.split(copied(html, "as-command"))
    assert words[0] == "byeori"
    kind = cli.COMMANDS[words[1]]
    settings = flags.settings_from(kind, words[2:], see="")
    assert settings == config.check(kind, yaml.safe_load(copied(html, "as-yaml")) or {})
    return words[1], settings


def wait_for(found: Callable[[], Any], seconds: float = 120) -> Any:
    """What a function returns once that is true."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if value := found():
            return value
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} s: {found()}")
