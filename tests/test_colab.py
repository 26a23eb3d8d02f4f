"""The notebook for Colab: committed without outputs, in two languages, and its commands run."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import nbformat
import pytest

from byeori import cli
from tiny_models import byte_level_tokenizer, tiny_llama

ROOT = Path(__file__).parents[1]
BOOK = nbformat.read(ROOT / "examples" / "colab.ipynb", as_version=4)
CODE = [cell.source for cell in BOOK.cells if cell.cell_type == "code"]
# What makes a command small enough for a random model of two layers.
SMALL = {
    "sft": {"--num_epochs": "1", "--max_steps": "1"},
    "dpo": {"--max_steps": "1", "--max_rows": "16", "--val_set_size": "4"},
    "generate": {"--max_new_tokens": "4"},
    "compare": {"--max_new_tokens": "4", "--max_rows": "3"},
}


def split(cell: str) -> tuple[str, list[str]]:
    """The Python of a cell, and its shell lines."""
    lines = cell.replace("\\\n", " ").splitlines()
    python = "\n".join(line for line in lines if not line.startswith(("!", "%")))
    return python, [line[1:] for line in lines if line.startswith("!")]


def test_it_is_valid_and_without_outputs() -> None:
    nbformat.validate(BOOK)
    assert all(not cell.outputs and cell.execution_count is None for cell in BOOK.cells if cell.cell_type == "code")


def test_it_speaks_both_languages() -> None:
    for cell in BOOK.cells:
        if cell.cell_type == "markdown":
            assert re.search("[가-힣]", cell.source) and re.search("[a-z]", cell.source), cell.source


def test_it_installs_byeori_and_asks_for_a_gpu() -> None:
    assert CODE[0].startswith("%pip install") and "byeori" in CODE[0]
    assert "torch.cuda.is_available()" in CODE[1]
    assert BOOK.metadata["accelerator"] == "GPU"


def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Except the installation; with a random model in place of the Hub's."""
    monkeypatch.chdir(tmp_path)
    tokenizer = byte_level_tokenizer()
    for made in (tiny_llama(len(tokenizer), max_position_embeddings=4096), tokenizer):
        made.save_pretrained(tmp_path / "model")
    names: dict[str, Any] = {}
    ran = []
    for cell in CODE[1:]:
        python, commands = split(cell)
        exec(compile(ast.parse(python), "colab.ipynb", "exec"), names)
        names |= {"MODEL": tmp_path / "model"} if "MODEL" in names else {}
        for command in commands:
            words = shlex.split(command)
            assert words.pop(0) == "byeori"
            ran.append(words[0])
            words = [str(names[word[1:-1]]) if re.fullmatch(r"\{\w+\}", word) else word for word in words]
            assert cli.main(resized(words)) == 0, words
    assert ran == ["preview", "plan", "sft", "generate", "compare", "merge", "dpo"]
    assert Path("title-generator.zip").is_file() and Path("report/report.html").is_file()


def resized(words: list[str]) -> list[str]:
    """A command with the values of SMALL in place of its own."""
    for flag, value in SMALL.get(words[0], {}).items():
        if flag in words:
            place = words.index(flag)
            words = words[:place] + words[place + 2 :]
        words = [*words, f"{flag}={value}"]
    return words
