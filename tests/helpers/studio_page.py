"""The page of byeori studio, asked as a browser asks it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

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
