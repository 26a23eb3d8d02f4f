"""What byeori says, found by reading its source: the messages of its errors and of the notes that it prints.

The text of a message is followed backwards from where it is raised or said: through local names, the arguments of the
callers, module constants, the results of the package's functions, lists and their appends. An f-string becomes a
message with a `{name}` for each value; texts of several words inside a value are messages of their own.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from string import Formatter

Scope = ast.FunctionDef | ast.Module
_SAYS = {"say", "_say", "note", "progress"}
_TRANSLATED = {"tr", "counted", "later", "translated"}  # their messages are marked


def shape(message: str) -> str:
    """Return a message without the names of its values: {a} is {b} -> {} is {}."""
    return "".join(literal + ("{}" if name is not None else "") for literal, name, _, _ in Formatter().parse(message))


def spoken(source: Path) -> dict[str, str]:
    """Return {message: file:line} of every error that is raised and every note that is said."""
    reader = _Reader(source)
    reader.read()
    return reader.found


class _Reader:
    def __init__(self, source: Path):
        self.found: dict[str, str] = {}
        self._seen: set[int] = set()
        self._scope: dict[int, Scope] = {}  # of a node, by its id
        self._file: dict[int, str] = {}
        self._functions: dict[str, list[ast.FunctionDef]] = defaultdict(list)
        self._calls: dict[str, list[ast.Call]] = defaultdict(list)
        self._constants: dict[str, list[ast.expr]] = defaultdict(list)
        self._trees = [
            ast.parse(path.read_text(encoding="utf-8"), str(path.relative_to(source))) for path in _files(source)
        ]
        for path, tree in zip(_files(source), self._trees, strict=True):
            self._index(tree, tree, str(path.relative_to(source)))

    def _index(self, node: ast.AST, scope: Scope, file: str) -> None:
        self._scope[id(node)], self._file[id(node)] = scope, file
        if isinstance(node, ast.FunctionDef):
            self._functions[node.name].append(node)
        if isinstance(node, ast.Call):
            self._calls[_name(node.func)].append(node)
        if scope is node or isinstance(scope, ast.Module):
            for name, value in _assigned(node):
                self._constants[name].append(value)
        for child in ast.iter_child_nodes(node):
            self._index(child, node if isinstance(node, ast.FunctionDef) else scope, file)

    def read(self) -> None:
        for calls in list(self._calls.values()):
            for call in calls:
                name = _name(call.func)
                raised = name.endswith("Error") and name != "AssertionError"
                to_errors = name == "print" and any(ast.unparse(item) == "file=sys.stderr" for item in call.keywords)
                if raised or to_errors or name in (*_SAYS, "__init__"):
                    for argument in call.args:
                        self._follow(argument)

    def _follow(self, node: ast.AST) -> None:
        """Find the messages that an expression can be."""
        if id(node) in self._seen:
            return
        self._seen.add(id(node))
        texts = self._texts(node)
        for text in texts:
            self._keep(text, node)
        if isinstance(node, ast.Name):
            self._follow_name(node.id, self._scope[id(node)])
        elif isinstance(node, ast.Call):
            self._follow_call(node)
        elif isinstance(node, ast.Dict):
            for value in node.values:
                self._follow(value)
        elif isinstance(node, ast.Subscript):
            self._follow(node.value)
        elif isinstance(node, ast.GeneratorExp | ast.ListComp):
            self._follow(node.elt)
        elif isinstance(node, ast.IfExp):
            self._follow(node.body)
            self._follow(node.orelse)
        elif texts:
            self._follow_values(node)
        elif isinstance(node, ast.BinOp | ast.BoolOp | ast.List | ast.Tuple | ast.Set):
            for child in ast.iter_child_nodes(node):
                self._follow(child)
        elif isinstance(node, ast.NamedExpr | ast.Starred):
            self._follow(node.value)

    def _follow_values(self, text: ast.AST) -> None:
        """Find the messages in the values of an f-string, or of a sum of texts."""
        for part in ast.iter_child_nodes(text):
            if isinstance(part, ast.FormattedValue):
                self._follow(part.value)
            elif self._texts(part):
                self._follow_values(part)
            else:
                self._follow(part)

    def _follow_call(self, call: ast.Call) -> None:
        name = _name(call.func)
        if name in _TRANSLATED:
            return
        for function in self._functions.get(name, ()):
            if function.returns is not None and "str" in ast.unparse(function.returns):
                for node in ast.walk(function):
                    if isinstance(node, ast.Return | ast.Yield) and node.value is not None:
                        self._follow(node.value)
        if isinstance(call.func, ast.Attribute) and name not in self._functions:  # text.replace(...), "; ".join(...)
            self._follow(call.func.value)
        if name in ("join", "str", "next", "sorted", "list", "getattr", "fromkeys", "one_line"):
            for argument in call.args:
                self._follow(argument)

    def _follow_name(self, name: str, scope: Scope) -> None:
        here = False
        for node in ast.walk(scope) if isinstance(scope, ast.FunctionDef) else ():
            for assigned, value in _assigned(node):
                if assigned == name:
                    here = True
                    self._follow(value)
        if isinstance(scope, ast.FunctionDef):
            parameters = [item.arg for item in [*scope.args.posonlyargs, *scope.args.args]]
            if name in [*parameters, *(item.arg for item in scope.args.kwonlyargs)]:
                here = True
                self._follow_parameter(scope, name, parameters)
        if not here:
            for value in self._constants.get(name, ()):
                self._follow(value)

    def _follow_parameter(self, function: ast.FunctionDef, name: str, parameters: list[str]) -> None:
        method = parameters[:1] in (["self"], ["cls"])
        place = parameters.index(name) - method if name in parameters else None
        defaults = [*zip(parameters[::-1], function.args.defaults[::-1], strict=False)]
        defaults += zip((item.arg for item in function.args.kwonlyargs), function.args.kw_defaults, strict=True)
        given = [value for parameter, value in defaults if parameter == name]
        if function.name != "__init__" and function.name not in _TRANSLATED:
            for call in self._calls.get(function.name, ()):
                given += [item.value for item in call.keywords if item.arg == name]
                given += [] if place is None else call.args[place : place + 1]
        for value in given:
            if value is not None:
                self._follow(value)

    def _keep(self, text: str, node: ast.expr) -> None:
        text = re.sub(r"(?<!\{)\{\{(!r)?\}\}(?!\})", "{value}", text)  # of str.format
        plain = re.sub(r"\{[^{}]*\}", " \0 ", text.replace("{{", "").replace("}}", ""))
        several = re.search(r"[A-Za-z]{2,}\W* \W*[A-Za-z]{2,}", plain)
        if several or ("\0" in plain and " " in text.strip() and re.search(r"(?<![\w-])[a-z]{3,}", plain)):
            self.found.setdefault(text, f"{self._file[id(node)]}:{node.lineno}")

    # ---- texts and f-strings as messages

    def _texts(self, node: ast.AST) -> list[str]:
        """The messages that a text, an f-string or a sum of both can be; [] of anything else."""
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = self._texts(node.left), self._texts(node.right)
            sides = product(
                left or ["{" + _value_name(node.left) + "}"], right or ["{" + _value_name(node.right) + "}"]
            )
            return [_distinct(a + b) for a, b in sides] if left or right else []
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return [node.value.replace("{", "{{").replace("}", "}}")]
        if isinstance(node, ast.JoinedStr):
            parts = [
                self._texts(value) if isinstance(value, ast.Constant) else self._words(value.value)
                for value in node.values
                if isinstance(value, ast.Constant | ast.FormattedValue)
            ]
            return [_distinct("".join(choice)) for choice in product(*parts)]
        return []

    def _words(self, value: ast.expr) -> list[str]:
        """A value of an f-string: `{name}`, or what it can be where that is a word such as a plural s or has, have."""
        scope = self._scope.get(id(value))
        if isinstance(value, ast.Name) and isinstance(scope, ast.FunctionDef):
            given = [item for node in ast.walk(scope) for name, item in _assigned(node) if name == value.id]
            before = max(
                (item for item in given if item.lineno <= value.lineno), key=lambda item: item.lineno, default=None
            )
            value = before if isinstance(before, ast.IfExp) else value
        if isinstance(value, ast.IfExp):
            ways = [side.value for side in (value.body, value.orelse) if isinstance(side, ast.Constant)]
            if len(ways) == 2 and all(len(str(way).split()) < 2 for way in ways):
                return [str(way) for way in ways]
        return ["{" + _value_name(value) + "}"]


def _files(source: Path) -> list[Path]:
    return sorted(source.rglob("*.py"))


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")


def _assigned(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """The names that a node gives a value, adds to, or loops over."""
    if isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                yield from zip(map(_name, target.elts), node.value.elts, strict=False)
            else:
                for name in target.elts if isinstance(target, ast.Tuple) else [target]:
                    yield _name(name), node.value
    elif isinstance(node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr) and node.value is not None:
        yield _name(node.target), node.value
    elif isinstance(node, ast.For | ast.comprehension):
        for target in node.target.elts if isinstance(node.target, ast.Tuple) else [node.target]:
            yield _name(target), node.iter
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("append", "extend"):
        for argument in node.args:
            yield _name(node.func.value), argument


_SAYS_NOTHING = {
    "self",
    "for",
    "in",
    "if",
    "else",
    "str",
    "len",
    "join",
    "map",
    "repr",
    "not",
    "sorted",
    "or",
    "and",
    "f",
}


def _value_name(value: ast.expr) -> str:
    """A name for a value: of its expression the first or the last word that says something."""
    if isinstance(value, ast.Call) and _name(value.func) in ("len", "sum", "round", "int"):
        return "count"
    words = re.findall(r"[A-Za-z]\w*", re.sub(r"'[^']*'|\"[^\"]*\"", "", ast.unparse(value)))
    words = [word.lower().strip("_") for word in words if word not in _SAYS_NOTHING] or ["value"]
    return words[0] if isinstance(value, ast.Call | ast.Subscript) else words[-1]


def _distinct(message: str) -> str:
    """Number the names of values that stand twice."""
    seen: dict[str, int] = defaultdict(int)

    def named(match: re.Match[str]) -> str:
        seen[match[1]] += 1
        return match[0] if seen[match[1]] == 1 else "{" + f"{match[1].rstrip('0123456789')}{seen[match[1]]}" + "}"

    return re.sub(r"(?<!\{)\{(\w+)\}(?!\})", named, message)
