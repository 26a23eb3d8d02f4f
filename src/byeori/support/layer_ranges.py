"""Layers by their numbers, counted from 0: `last:8`, `first:4`, `0-3,20-23`."""

from __future__ import annotations

import re


def parse(text: str, count: int | None = None) -> list[int]:
    """Return the layers that a text names, ascending. count: how many there are; None only checks the text.

    Raises:
        ValueError: if it names none, or one that is not there.
    """
    if match := re.fullmatch(r"(first|last):([1-9]\d{0,3})", text.strip()):
        number = int(match[2])
        if count is not None and number > count:
            raise ValueError(f"{text!r} is more than the {count} layers of this model")
        last = count or number
        return list(range(number)) if match[1] == "first" else list(range(last - number, last))
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"{text!r}: give last:8, first:4 or numbers such as 0-3,20-23")
        found |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    if count is not None and max(found) >= count:
        raise ValueError(f"layer {max(found)} is not there; this model has {count} layers, counted from 0")
    return sorted(found)
