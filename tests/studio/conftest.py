"""A page on which rows and a model are chosen; what a test's page started ends with the test."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from starlette.testclient import TestClient

import forks
from studio_page import studio


@pytest.fixture(autouse=True)
def forked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A page starts forks of a process that has imported torch, but in tests with the mark `own_processes`."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.node.get_closest_marker("own_processes"):
            patch.setattr(sys, "executable", forks.python(tmp_path_factory.mktemp("python")))
        yield


@pytest.fixture(autouse=True)
def end_of_what_it_started(tmp_path: Path) -> Iterator[None]:
    """Runs and answering models outlive the page, and would take the processors of the tests that follow."""
    yield
    for place in Path("/proc").glob("[0-9]*/cwd"):
        with suppress(OSError):
            if place.readlink().is_relative_to(tmp_path) and int(place.parent.name) != os.getpid():
                os.kill(int(place.parent.name), signal.SIGKILL)


@pytest.fixture
def page(tiny_model: Path, title_rows: Path, tmp_path: Path) -> Iterator[TestClient]:
    """Rows and a tiny model are chosen."""
    shutil.copy(title_rows, tmp_path / "rows.jsonl")
    shutil.copytree(tiny_model, tmp_path / "model")
    with studio(tmp_path) as client:
        client.post("/data-choose", data={"path": "rows.jsonl"})
        client.post("/template-model", data={"base_model": "model"})
        yield client
