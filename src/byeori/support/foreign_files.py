"""One door for the small files that byeori did not just write: JSON and YAML beside weights, records of runs, settings.

    path ── size, UTF-8, JSON or YAML, depth ── fields and their types ──> a dict

Whatever is wrong is one sentence that names the file, the field and what belongs there. Nothing else may parse such a
file: a wrong type, an encoding or ten thousand brackets would end as an exception somewhere behind.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from byeori.errors import ByeoriError, ModelError
from byeori.support.text_files import read_text, visible

_MOST_BYTES = 64 << 20  # the index of a model of a thousand layers has 10 MB
_MOST_DEPTH = 100

T = TypeVar("T")


def json_file(path: Path, error: type[ByeoriError] = ModelError, *, advice: str = "copy it again") -> Any:
    """Return what a JSON file holds. advice: what to do about a damaged one.

    Raises:
        ByeoriError: of the class `error`, if it cannot be read, is too large, or is no JSON.
    """
    text = _text(path, error, advice)
    try:
        value = json.loads(text)
    except RecursionError:
        raise error(f"{path} is nested too deeply; {advice}") from None
    except ValueError as problem:
        raise error(f"{path} is damaged, it is not valid JSON ({_short(problem)}); {advice}") from None
    if depth(value) > _MOST_DEPTH:
        raise error(f"{path} is nested more than {_MOST_DEPTH} levels deep; {advice}")
    return value


def json_record(
    path: Path, kind: type[T], error: type[ByeoriError] = ModelError, *, advice: str = "copy it again"
) -> T:
    """Return a JSON file's object, with its fields checked. kind: a TypedDict; fields that it lacks are not checked.

    Raises:
        ByeoriError: of the class `error`, if it is no such object.
    """
    return checked(json_file(path, error, advice=advice), kind, path, error, advice=advice)


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON lines file. Others, such as the last line of a killed run, are skipped.

    Raises:
        ModelError: if it cannot be read.
    """
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict) and depth(value) <= _MOST_DEPTH:
                yield value


def checked(value: Any, kind: type[T], path: Path, error: type[ByeoriError], *, advice: str) -> T:
    """Return a value whose fields are those of a TypedDict.

    Raises:
        ByeoriError: of the class `error`, naming the file, the field and what belongs there.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as problems:
        first = problems.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "its content"
        given = "" if first["type"] == "missing" else f" {_short(first['input'], 60)}"
        reason = "is missing" if first["type"] == "missing" else f"is wrong: {_lower(first['msg'])}"
        raise error(f"{path} is damaged: {visible(field)[:100]}{given} {reason}; {advice}") from None


def depth(value: Any) -> int:
    """Return how many objects and lists lie inside each other, counted to no more than is allowed."""
    level, deepest = [value], 0
    while level and deepest <= _MOST_DEPTH:
        level = [
            item
            for container in level
            if isinstance(container, (dict, list))
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, (dict, list))
        ]
        deepest += 1
    return deepest


def _text(path: Path, error: type[ByeoriError], advice: str) -> str:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise error(f"{path} has {path.stat().st_size:,} bytes, too many for such a file; {advice}")
        return read_text(path, error)
    except OSError as problem:
        raise error(f"cannot read {path} ({problem.strerror or problem}); {advice}") from None


def _short(value: object, most: int = 120) -> str:
    text = str(value) if isinstance(value, (Exception, str)) else type(value).__name__
    return repr(visible(text[:most])) if isinstance(value, str) else visible(" ".join(text[:most].split()))


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
