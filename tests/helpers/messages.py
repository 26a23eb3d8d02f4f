"""Every message that the source marks for translation, by reading the code and the templates."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment, nodes

SOURCE = Path(__file__).parents[2] / "src" / "byeori"


def marked() -> dict[str, str]:
    """Return {message: file} of every tr("..."), counted(n, "...", "..."), later("...") and t("...") of a template."""
    found: dict[str, str] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        for message in _of_code(ast.parse(path.read_text(encoding="utf-8"))):
            found.setdefault(message, path.name)
    for path in sorted([*SOURCE.rglob("*.html.j2"), *SOURCE.rglob("templates/*.html")]):
        for call in Environment().parse(path.read_text(encoding="utf-8")).find_all(nodes.Call):
            if isinstance(call.node, nodes.Name) and call.node.name == "t" and isinstance(call.args[0], nodes.Const):
                found.setdefault(call.args[0].value, path.name)
    return found


def _of_code(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if name in ("tr", "counted", "later"):
                for argument in node.args:
                    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                        yield argument.value
