"""The house rules that no linter checks: sizes of files and functions."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCES = sorted((Path(__file__).parents[1] / "src").rglob("*.py"))


def test_files_stay_under_400_lines() -> None:
    long = {path.name: count for path in SOURCES if (count := len(path.read_text(encoding="utf-8").splitlines())) > 400}
    assert not long


def test_functions_stay_under_60_lines() -> None:
    long = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > 60:
                long[f"{path.name}:{node.name}"] = (node.end_lineno or 0) - node.lineno + 1
    assert not long
