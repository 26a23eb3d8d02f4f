"""The house rules that no linter checks: sizes of files and functions."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

TESTS = Path(__file__).parent
SOURCES = sorted((TESTS.parent / "src").rglob("*.py"))


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_files_stay_under_400_lines() -> None:
    long = {path.name: count for path in SOURCES if (count := len(path.read_text(encoding="utf-8").splitlines())) > 400}
    assert not long


def test_functions_stay_under_60_lines() -> None:
    long = {}
    for path in SOURCES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > 60:
                long[f"{path.name}:{node.name}"] = (node.end_lineno or 0) - node.lineno + 1
    assert not long


def test_no_test_imports_another_test() -> None:
    """What two of them need stands in tests/helpers."""
    modules = {path.stem for path in TESTS.rglob("*.py") if "helpers" not in path.parts}
    wrong = []
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(parsed(path)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            wrong += [f"{path.name} imports {name}" for name in names if name.split(".")[0] in modules]
    assert not wrong


def test_every_folder_says_what_it_is_for() -> None:
    root = TESTS.parent / "src" / "byeori"
    assert not [path.parent.name for path in root.glob("*/__init__.py") if not path.with_name("README.md").is_file()]
    for path in root.glob("*/README.md"):
        named = re.findall(r"`([a-z_/]+\.(?:py|yaml|csv|js|css|j2|c))`", path.read_text(encoding="utf-8"))
        gone = [name for name in named if not any(path.parent.rglob(name))]
        assert not [name for name in gone if not any((place / name).exists() for place in (root, TESTS.parent))], path


def test_no_file_imports_a_private_name_of_another_folder() -> None:
    root, wrong = TESTS.parent / "src" / "byeori", []
    for path in SOURCES:
        own = path.relative_to(root).parts[0]
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("byeori"):
                names = [*(node.module or "").split(".")[2:], *(alias.name for alias in node.names)]
                private = [name for name in names if name.startswith("_") and not name.startswith("__")]
                if private and (node.module or "").split(".")[1:2] != [own]:
                    wrong.append(f"{path.relative_to(root)} imports {private[0]}")
    assert not wrong
