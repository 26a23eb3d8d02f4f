"""Settings as the keywords of a Python function: its signature and docstring, from which __init__.pyi is made."""

from __future__ import annotations

import inspect
import textwrap
import typing
from typing import Any

from pydantic.fields import FieldInfo

from byeori.config.base import Settings, about, choices, in_order, is_list, metavar, summary


def signature(kind: type[Settings], result: str) -> inspect.Signature:
    """Return the signature of a function that accepts settings as keywords. result: the type that it returns."""
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.is_required() else field.default,
            annotation=annotation(field),
        )
        for name, field in in_order(kind).items()
    ]
    required_first = sorted(parameters, key=lambda parameter: parameter.default is not inspect.Parameter.empty)
    return inspect.Signature(required_first, return_annotation=result)


def annotation(field: FieldInfo) -> str:
    """Return the type of a keyword as source code. Paths and names of models may be Path objects."""
    plain = _parts(field.annotation)
    numbers = [kind.__name__ for kind in (int, float) if kind in _inside(field.annotation)]
    one = "str | Path" if metavar(field) in ("PATH", "MODEL") else (numbers or ["str"])[0]
    if dict in plain:
        names = [f"dict[str, {one}]"]
    elif is_list(field.annotation):
        names = ["str" if numbers else one, f"Sequence[{one}]"]
    else:
        words = [word for word in choices(field.annotation) if word not in ("True", "False")]
        names = ["Literal[" + ", ".join(f'"{word}"' for word in words) + "]"] if words else []
        names += [kind.__name__ for kind in (bool, int, float) if kind in plain]
        names += [one] if str in plain else []
    return " | ".join([*names, *["None"] * (type(None) in plain)])


def docstring(kind: type[Settings]) -> str:
    """Return the docstring of such a function, with the first sentence of each setting."""
    what = about(kind)
    lines = [f"{what[0].upper()}{what[1:]}.", *["", "Args:"] * bool(kind.model_fields)]
    for name, field in in_order(kind).items():
        text = f"{name}: {summary(field)}."
        lines += textwrap.wrap(text, 112, initial_indent="    ", subsequent_indent="        ")
    return "\n".join(
        [*lines, "", "Raises:", "    ByeoriError: if something is wrong that you can fix; the message says how."]
    )


def _parts(kind: Any) -> set[Any]:
    """Return the classes in a type, without those inside of lists."""
    origin = typing.get_origin(kind)
    if origin in (None, list, dict):
        return {origin or kind}
    return set().union(*map(_parts, typing.get_args(kind)))


def _inside(kind: Any) -> set[Any]:
    """Return the classes in the lists and dictionaries of a type."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) in (list, dict):
        return _parts(arguments[-1])
    return set().union(*map(_inside, arguments))
