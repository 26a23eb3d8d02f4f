"""`--help`: the settings of a command by group, on one screen or in full."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap

from pydantic.fields import FieldInfo

from byeori.config.base import ESSENTIAL, GROUPS, Settings, about, extra, shown, summary
from byeori.config.flags import flags, value_type

_SHORT = 14  # a command with so many settings shows all of them at once


def groups(kind: type[Settings]) -> dict[str, dict[str, FieldInfo]]:
    """Return the settings of a command by group, in the order in which help shows the groups."""
    out: dict[str, dict[str, FieldInfo]] = {}
    for group in GROUPS:
        members = {name: field for name, field in flags(kind).items() if extra(field, "group") == group}
        if members:
            out[group] = members
    return out


def help_text(kind: type[Settings], *, prog: str, full: bool = False) -> str:
    """Return the help of a command. full: every setting with its details, not only the essentials."""
    style, what = _Style(), about(kind)
    everything = groups(kind)
    short = sum(map(len, everything.values())) <= _SHORT
    column = kind.own_flags is not None
    places = [f"[{name.upper()}]" if not flags(kind)[name].is_required() else name.upper() for name in kind.inputs]
    usage = [prog, *places, *["[--COLUMN TEXT ...]"] * column, "[--FLAG VALUE ...]"]
    lines = [style.bold("usage: ") + " ".join(usage), "", *_wrap(f"{what[:1].upper()}{what[1:]}.", 0)]
    for group, members in everything.items():
        if group != ESSENTIAL and not (full or short):
            continue
        lines += ["", style.bold(f"{group}:")]
        for name, field in members.items():
            lines += _entry(name, field, full=full, style=style)
        if group == ESSENTIAL:
            if column:
                lines += _entry("COLUMN", kind.model_fields["columns"], full=full, style=style)
            lines += _wrap("YAML file of settings; flags override it", 30, first="  --config PATH", style=style)
    if not (full or short):
        lines += ["", style.bold("more settings") + f" ({prog} --help-all describes them):"]
        for group, members in everything.items():
            if group != ESSENTIAL:
                width = min(100, shutil.get_terminal_size().columns)
                names = f"{group}: {', '.join(members)}"
                lines += textwrap.wrap(names, width, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


def _entry(name: str, field: FieldInfo, *, full: bool, style: _Style) -> list[str]:
    kind = "TEXT" if name == "COLUMN" else value_type(field)
    note = " (required)" if field.is_required() else ""
    if not note and field.default not in (None, [], {}, False):
        note = f" (default {shown(field.default)})"
    text = str(field.description) if full else summary(field)
    return _wrap(text + note, 30, first=f"  --{name} {kind}", style=style)


def _wrap(text: str, indent: int, *, first: str = "", style: _Style | None = None) -> list[str]:
    """Wrap a text beside, or if that is too long below, its heading."""
    width = min(100, shutil.get_terminal_size().columns) - indent
    lines = textwrap.wrap(text, max(30, width), break_long_words=False, break_on_hyphens=False) or [""]
    head = style.bold(first) if style and first else first
    if len(first) >= indent and first:
        return [head, *(" " * indent + line for line in lines)]
    return [head + " " * (indent - len(first)) + lines[0], *(" " * indent + line for line in lines[1:])]


class _Style:
    """Bold text on a terminal that shows it; NO_COLOR and FORCE_COLOR decide as usual."""

    def __init__(self) -> None:
        wanted = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.on = bool(os.environ.get("FORCE_COLOR") or wanted) and not os.environ.get("NO_COLOR")

    def bold(self, text: str) -> str:
        return f"\x1b[1;36m{text}\x1b[0m" if self.on else text
