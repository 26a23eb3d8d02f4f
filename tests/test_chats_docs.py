"""docs/chats.md: its table is what the code does with the chat templates of current models."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "chats_docs.py"


@pytest.mark.parametrize("language", ["en", "ko"])
def test_the_table_is_current(language: str) -> None:
    spec = importlib.util.spec_from_file_location("chats_docs", SCRIPT)
    assert spec and spec.loader
    chats_docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(chats_docs)
    written = chats_docs.page(language).read_text(encoding="utf-8")
    assert written == chats_docs.filled(language), "run scripts/chats_docs.py"
