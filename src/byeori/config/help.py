"""`--help`: the settings of a command by group, on one screen or in full."""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata

from pydantic.fields import FieldInfo

from byeori.config.base import ESSENTIAL, GROUPS, Settings, about, extra, korean, shown
from byeori.config.flags import flags, value_type
from byeori.support.language import chosen, tr

_SHORT = 14  # a command with so many settings shows all of them at once


def groups(kind: type[Settings]) -> dict[str, dict[str, FieldInfo]]:
    """Return the settings of a command by group, in the order in which help shows the groups."""
    out: dict[str, dict[str, FieldInfo]] = {}
    for group in GROUPS:
        members = {name: field for name, field in flags(kind).items() if extra(field, "group") == group}
        if members:
            out[group] = members
    return out


def help_text(kind: type[Settings], command: str, *, prog: str, full: bool = False) -> str:
    """Return the help of a command. full: every setting with its details, not only the essentials."""
    style, what = _Style(), tr(about(kind))
    everything = groups(kind)
    short = sum(map(len, everything.values())) <= _SHORT
    column = kind.own_flags is not None
    places = [f"[{name.upper()}]" if not flags(kind)[name].is_required() else name.upper() for name in kind.inputs]
    usage = [prog, *places, *["[--COLUMN TEXT ...]"] * column, "[--FLAG VALUE ...]"]
    lines = [style.bold(tr("usage:") + " ") + " ".join(usage), "", *_wrap(f"{what[:1].upper()}{what[1:]}.", 0)]
    for group, members in everything.items():
        if group != ESSENTIAL and not (full or short):
            continue
        lines += ["", style.bold(f"{tr(group)}:")]
        for name, field in members.items():
            lines += _entry(command, name, field, full=full, style=style)
        if group == ESSENTIAL:
            if column:
                lines += _entry(command, "COLUMN", kind.model_fields["columns"], full=full, style=style)
            lines += _wrap(tr("YAML file of settings; flags override it"), 30, first="  --config PATH", style=style)
    if not (full or short):
        lines += ["", style.bold(tr("more settings")) + tr(" ({prog} --help-all describes them):", prog=prog)]
        for group, members in everything.items():
            if group != ESSENTIAL:
                names = _wrap(f"\0\0{tr(group)}: {', '.join(members)}", 4)
                lines += [line.replace("  \0\0", "") for line in names]  # the first line begins further left
    return "\n".join(lines)


def _entry(command: str, name: str, field: FieldInfo, *, full: bool, style: _Style) -> list[str]:
    kind = "TEXT" if name == "COLUMN" else value_type(field)
    note = tr(" (required)") if field.is_required() else ""
    if not note and field.default not in (None, [], {}, False):
        note = tr(" (default {value})", value=shown(field.default))
    text = str(field.description)
    if chosen() == "ko":
        text = korean(command, "columns" if name == "COLUMN" else name)
    text = text if full else text.split(". ")[0].rstrip(".")
    return _wrap(text + note, 30, first=f"  --{name} {kind}", style=style)


def _wrap(text: str, indent: int, *, first: str = "", style: _Style | None = None) -> list[str]:
    """Wrap a text beside, or if that is too long below, its heading."""
    width = max(30, min(100, shutil.get_terminal_size().columns) - indent)
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        lines[-1:] = [joined] if not lines[-1] or _cells(joined) <= width else [lines[-1], word]
    head = style.bold(first) if style and first else first
    if len(first) >= indent and first:
        return [head, *(" " * indent + line for line in lines)]
    return [head + " " * (indent - len(first)) + lines[0], *(" " * indent + line for line in lines[1:])]


def _cells(text: str) -> int:
    """Return how many columns of a terminal a text takes; Hangul takes two each."""
    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)


class _Style:
    """Bold text on a terminal that shows it; NO_COLOR and FORCE_COLOR decide as usual."""

    def __init__(self) -> None:
        wanted = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.on = bool(os.environ.get("FORCE_COLOR") or wanted) and not os.environ.get("NO_COLOR")

    def bold(self, text: str) -> str:
        return f"\x1b[1;36m{text}\x1b[0m" if self.on else text
