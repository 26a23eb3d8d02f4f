"""Settings as a command, as YAML, as fields of a form, and what they mean in each language."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from byeori.config import Settings, choices
from byeori.config.base import is_list, korean
from byeori.config.flags import flags, value_type
from byeori.config.help import groups
from byeori.support import language
from byeori.support.text_files import exists
from byeori.support.yaml_files import yaml_text

_BOOLEAN = "[BOOL]"


def as_yaml(values: Mapping[str, Any]) -> str:
    """Return settings as `--config` reads them."""
    return yaml_text(dict(values)) if values else ""


def as_command(command: str, kind: type[Settings], values: Mapping[str, Any]) -> str:
    """Return the command line that means the same as the YAML of `as_yaml`."""
    known, words = flags(kind), ["byeori", command]
    for name, value in values.items():
        field = known.get(name)
        if field is None or value is None:
            continue
        if is_list(field.annotation) and isinstance(value, (list, dict)):
            items = (
                [f"{key}={item}" for key, item in value.items()] if isinstance(value, dict) else list(map(str, value))
            )
            words += (
                [f"--{name}", *map(shlex.quote, items)] if len(items) > 1 else [f"--{name}={_word(''.join(items))}"]
            )
        elif isinstance(value, dict):
            words.append(f"--{name}={_word(json.dumps(value, ensure_ascii=False))}")
        else:
            words.append(
                f"--{name}={_word(str(value))}" if str(value).startswith("-") else f"--{name} {_word(str(value))}"
            )
    return " ".join(words)


def _word(text: str) -> str:
    return shlex.quote(text)


def from_form(kind: type[Settings], form: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a form that are filled in and are not the default, as YAML would hold them."""
    values: dict[str, Any] = {}
    for name, field in flags(kind).items():
        if name not in form:
            continue
        given = str(form[name]).replace("\r\n", "\n")
        if given.strip() == "" or given == _as_text(field.default):
            continue
        values[name] = _words(given) if is_list(field.annotation) and name != "gpu" else _typed(given)
    return values


def _words(text: str) -> list[str]:
    """Return the words of a field that holds several, quoted as a shell has them; a path may have spaces."""
    if exists(text):
        return [text]
    try:
        return shlex.split(text)
    except ValueError:  # a quote alone
        return text.split()


def _typed(text: str) -> Any:
    """Return a number as YAML writes it, and any other text as it is."""
    loaded = None if "\n" in text else _loaded(text)
    return loaded if isinstance(loaded, (int, float)) else text


def _loaded(text: str) -> Any:
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text


def fields(kind: type[Settings], values: Mapping[str, Any], *, without: tuple[str, ...] = ()) -> dict[str, list[Any]]:
    """Return group -> the fields of a form, as `--help-all` orders them."""
    return {
        group: [
            {
                "name": name,
                "value": _as_text(values.get(name)),
                "default": _as_text(field.default) if not field.is_required() else "",
                "choices": choices(field.annotation),
                "type": value_type(field),
            }
            for name, field in members.items()
            if name not in without
        ]
        for group, members in groups(kind).items()
    }


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return " ".join(f"{name}={item}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return str(value[0]) if len(value) == 1 and exists(str(value[0])) else shlex.join(map(str, value))
    return str(value)


def about(command: str, kind: type[Settings], name: str) -> str:
    """Return what a setting does."""
    if language.chosen() == "en":
        return str(flags(kind)[name].description)
    return korean(command, name)
