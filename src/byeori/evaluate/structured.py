"""Answers that are JSON or calls of tools, compared by what they say and not by how they are written.

Calls are read as models write them: JSON objects with `name` and `arguments` (or `parameters`), alone, in a list, with
text or tags around them (Hermes, Qwen, Llama 3, Mistral), under `function` (OpenAI), and `<function=name>` with
`<parameter=key>` (Qwen3-Coder). The order of keys and of parallel calls, and arguments as JSON text, do not matter.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

_FENCE = re.compile(r"\A\s*```(?:json)?\s*\n(.*?)\n?```\s*\Z", re.DOTALL)
_XML_CALL = re.compile(r"<function=([^>\n]+)>(.*?)</function>", re.DOTALL)
_XML_ARGUMENT = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)

Row = Mapping[str, Any]


def json_valid(_row: Row, _reference: str, answer: str) -> bool:
    """Return whether an answer is one JSON value and nothing else; a code fence around it is allowed."""
    return _parsed(answer) is not _NOTHING


def json_fields(_row: Row, reference: str, answer: str) -> float | None:
    """Return F1, 0 to 100, over the values inside the JSON of the reference; None if the reference is no JSON.

    A value counts with its path: {"a": 1, "b": [2, 3]} has .a = 1, .b[0] = 2 and .b[1] = 3.
    """
    wanted, given = _parsed(reference), _parsed(answer)
    if wanted is _NOTHING:
        return None
    if given is _NOTHING:
        return 0.0
    expected, found = dict(_leaves(wanted)), dict(_leaves(given))
    equal = sum(path in found and _same(found[path], value) for path, value in expected.items())
    return 200.0 * equal / (len(expected) + len(found))


def calls_valid(_row: Row, reference: str, answer: str) -> bool | None:
    """Return whether calls can be read in an answer, and none where the reference has none; None: see `calls_equal`."""
    wanted, given = calls(reference), calls(answer)
    return None if wanted is None else bool(given) == bool(wanted) and given is not None


def calls_names(_row: Row, reference: str, answer: str) -> bool | None:
    """Return whether an answer calls the tools of the reference, each as often."""
    wanted, given = calls(reference), calls(answer)
    if wanted is None:
        return None
    return given is not None and Counter(name for name, _ in wanted) == Counter(name for name, _ in given)


def calls_equal(_row: Row, reference: str, answer: str) -> bool | None:
    """Return whether an answer has the calls of the reference with equal arguments; None if that cannot be read."""
    wanted, given = calls(reference), calls(answer)
    if wanted is None:
        return None
    return given is not None and Counter(map(_key, wanted)) == Counter(map(_key, given))


def calls(text: str) -> list[tuple[str, Any]] | None:
    """Return the calls in a text as (name, arguments); [] for one without calls, None if one is broken.

    calls('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>') == [("add", {"a": 1})]
    """
    if tagged := _XML_CALL.findall(text):
        return [
            (name.strip(), {key: _value(value) for key, value in _XML_ARGUMENT.findall(body)}) for name, body in tagged
        ]
    found: list[tuple[str, Any]] = []
    for value in _values(text):
        for item in value if isinstance(value, list) else [value]:
            call = _call(item)
            found += [call] if call else []
    looks_like_one = re.search(r'"(?:name|arguments|parameters)"\s*:|<tool_call>|<function=|\[TOOL_CALLS\]', text)
    return None if not found and looks_like_one else found


def _call(item: Any) -> tuple[str, Any] | None:
    if not isinstance(item, dict):
        return None
    item = item.get("function") if isinstance(item.get("function"), dict) else item
    arguments = item.get("arguments", item.get("parameters"))
    if isinstance(arguments, str):
        arguments = _value(arguments)
    name = item.get("name")
    if not isinstance(name, str) or not ("arguments" in item or "parameters" in item or len(item) == 1):
        return None
    return name, arguments or {}


def _values(text: str) -> Iterator[Any]:
    """Yield the JSON objects and lists in a text, from left to right."""
    decoder, at = json.JSONDecoder(), 0
    while (start := min((p for c in "{[" if (p := text.find(c, at)) >= 0), default=-1)) >= 0:
        try:
            value, at = decoder.raw_decode(text, start)
            yield value
        except (ValueError, RecursionError):
            at = start + 1


def _key(call: tuple[str, Any]) -> str:
    return json.dumps([call[0], _plain(call[1])], sort_keys=True, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """Return a value in which 1 and 1.0 are the same."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


_NOTHING = object()


def _parsed(text: str) -> Any:
    """Return what JSON text holds, _NOTHING if it is none. NaN and Infinity are not JSON."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    fenced = _FENCE.match(text)
    try:
        return json.loads(fenced[1] if fenced else text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return _NOTHING


def _value(text: str) -> Any:
    found = _parsed(text)
    return text if found is _NOTHING else found


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and value of everything inside that holds nothing else."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}")
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, value


def _same(first: Any, second: Any) -> bool:
    return (
        type(first) is type(second) and first == second
        if bool in (type(first), type(second))
        else bool(first == second)
    )
