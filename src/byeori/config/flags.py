"""A command line -> settings: `--data-path rows.jsonl` and `--data_path=rows.jsonl` are the same flag.

Values may begin with a dash, a list ends at the next `--flag`, and a flag that may stand alone, such as a boolean,
consumes the word after it only if that is one of its values.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic.fields import FieldInfo

from byeori.config.base import S, Settings, alone, check, choices, in_order, is_list, metavar, read_yaml
from byeori.errors import ConfigError
from byeori.support.suggestions import nearest

HELP = ("-h", "--help", "--help-all", "--help_all")
_TYPES = {int: "INT", float: "FLOAT"}
_BOOLEANS = {"true", "false", "yes", "no", "on", "off", "1", "0", "t", "f", "y", "n"}


@dataclass
class _Line:
    """What a command line holds.

    words: what belongs to no flag, each with the flag before it. columns: flags that are not settings, with a value.
    """

    values: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    words: list[tuple[str, str]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def flags(kind: type[Settings]) -> dict[str, FieldInfo]:
    """Return the settings of a command by the names of their flags; template columns have flags of their own."""
    return {field.alias or name: field for name, field in in_order(kind).items() if name != kind.own_flags}


def value_type(field: FieldInfo) -> str:
    """Return how help names the value of a setting: INT, PATH, {a,b,c}, NAME ...; [BOOL] where it may be left out."""
    parts = [part for part in (field.annotation, *typing.get_args(field.annotation)) if part in _TYPES]
    if field.annotation is bool:
        name = "BOOL"
    elif listed := choices(field.annotation):
        name = "{" + ",".join(listed) + "}"
    elif is_list(field.annotation):
        name = (metavar(field) or "NAME") + " ..."
    else:
        name = metavar(field) or (_TYPES[parts[0]] if parts else "TEXT")
    return f"[{name}]" if alone(field) else name


def settings_from(kind: type[S], arguments: Sequence[str], see: str = "--help") -> S:
    """Return the settings of a command line: flags override the YAML file, which overrides the defaults.

    see: where the flags are listed.

    Raises:
        ConfigError: if a flag is unknown or lacks its value, or a setting is missing or wrong.
    """
    line = _read(kind, arguments, see)
    fields, values = flags(kind), line.values
    for name in kind.inputs:
        if name in values or not line.words:
            continue
        if is_list(fields[name].annotation):
            rest = kind.inputs[kind.inputs.index(name) + 1 :]
            count = len(line.words) if all(other in values for other in rest) else 1  # adapters, before --data-path
            values[name], line.words = [word for word, _ in line.words[:count]], line.words[count:]
        else:
            values[name] = line.words.pop(0)[0]
    if line.columns and {"data_path", "raw"} & set(values):  # columns make one prompt: these are misspelt flags
        line.unknown += [f"--{name}" for name in line.columns]
    elif line.columns:
        values[kind.own_flags or ""] = line.columns
    if line.unknown:
        known = [f"--{name}" for name in (*fields, "config")]
        raise ConfigError(
            "there is no flag " + ", ".join(f"{flag}{nearest(flag, known)}" for flag in line.unknown) + f"; see {see}"
        )
    if line.words:
        raise ConfigError(f"{_stray(*line.words[0], fields)}; see {see}")
    path = values.pop("config", None)
    file = read_yaml(path, kind) if path else {}
    for name in kind.inputs:
        lists = [other for other, value in values.items() if isinstance(value, list) and value[1:]]
        if name not in values and name not in file and fields[name].is_required() and lists:
            raise ConfigError(f"{name} is missing: give it before --{lists[0]}, which accepts all words up to a flag")
    return check(kind, file | values)


def _read(kind: type[Settings], arguments: Sequence[str], see: str) -> _Line:
    """Sort the words of a command line.

    Raises:
        ConfigError: if a flag lacks its value.
    """
    fields, line, rest = flags(kind), _Line(), list(arguments)
    before = ""
    while rest:
        item = rest.pop(0)
        flag, equals, text = item.partition("=")
        name = flag[2:].replace("-", "_")
        if not item.startswith("-") or item == "-":
            line.words.append((item, before))
        elif not flag.startswith("--") or not name:
            line.unknown.append(item)
        elif name in fields or name == "config":
            value = text if equals else _value(name, fields.get(name), rest, see)
            line.values[name] = _repeated(line.values.get(name), value, fields.get(name))
        elif kind.own_flags:
            if not equals and (not rest or rest[0].startswith("--")):
                raise ConfigError(f"{flag} needs a value: {flag} TEXT or {flag} @file")
            line.columns[flag[2:]] = text if equals else rest.pop(0)
        else:
            line.unknown.append(f"--{name}")
            if not equals and rest and not rest[0].startswith("--"):
                rest.pop(0)  # most likely its value
        before = flag
    return line


def _repeated(before: Any, value: Any, field: FieldInfo | None) -> Any:
    """Return the value of a flag that may have been given before: lists of texts grow, of other flags the last counts.

    A text may hold what parts the words of other lists, so one flag for each is the natural way to give several.
    """
    if before is None or field is None or not (is_list(field.annotation) and metavar(field) == "TEXT"):
        return value
    return [item for part in (before, value) for item in (part if isinstance(part, list) else [part])]


def _value(name: str, field: FieldInfo | None, rest: list[str], see: str) -> str | list[str]:
    """Remove the value of a flag from the front of `rest` and return it.

    Raises:
        ConfigError: if the flag has none and needs one.
    """
    following = next((number for number, item in enumerate(rest) if item.startswith("--")), len(rest))
    default = alone(field) if field else None
    if field and default is not None:
        known = _BOOLEANS | set(typing.get_args(field.annotation)) | set(choices(field.annotation))
        return rest.pop(0) if following and rest[0].lower() in {value.lower() for value in map(str, known)} else default
    if not following:
        raise ConfigError(f"--{name} needs a value: --{name} {value_type(field) if field else 'PATH'}; see {see}")
    if field and is_list(field.annotation):
        values, rest[:] = rest[:following], rest[following:]
        return values
    return rest.pop(0)


def _stray(word: str, flag: str, fields: dict[str, FieldInfo]) -> str:
    """Return what is wrong with a word that belongs to no flag. flag: the one before it."""
    name = flag[2:].replace("-", "_")
    if flag.startswith("--") and name in fields and alone(fields[name]):
        return f"--{name} {word!r}: give one of {', '.join(choices(fields[name].annotation))}"
    return f"{word!r} belongs to no flag"
