"""The house rules that no linter checks: sizes of files and functions."""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).parent
SOURCES = sorted((TESTS.parent / "src").rglob("*.py"))


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


def test_no_test_imports_another_test() -> None:
    """What two of them need stands in tests/helpers."""
    modules = {path.stem for path in TESTS.rglob("*.py") if "helpers" not in path.parts}
    wrong = []
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            wrong += [f"{path.name} imports {name}" for name in names if name.split(".")[0] in modules]
    assert not wrong
