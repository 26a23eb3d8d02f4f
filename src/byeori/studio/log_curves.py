"""A log of any length as curves of bounded size: read once, then only what was added.

train_log.jsonl ── new lines ──> Series (at most _BUCKETS means of neighbouring steps) ──> the points of a chart
"""

from __future__ import annotations

import json
import math
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

_BUCKETS = 512  # of a curve; neighbours are joined when there are more
_MOST_LOGS = 64  # that are kept in memory
# numbers of a line that are kept as curves: those that the charts draw
CURVES = (
    "loss",
    "eval_loss",
    "accuracy",
    "eval_accuracy",
    "margin",
    "eval_margin",
    "learning_rate",
    "speed",
    "peak_memory_bytes",
)
_MOST_SAMPLES = 10
_MOST_EVALUATIONS = 5  # whose answers are kept
_CHUNK = 1 << 20


@dataclass(slots=True)
class Series:
    """The mean of `width` neighbouring values each, as [first step, last step, sum, count, lowest, highest]."""

    width: int = 1
    buckets: list[list[float]] = field(default_factory=list)

    def extend(self, steps: Sequence[float], values: Sequence[float]) -> None:
        """Add values of later steps."""
        at = 0
        while at < len(values):
            if not self.buckets or self.buckets[-1][3] >= self.width:
                self.buckets.append([steps[at], steps[at], 0.0, 0, values[at], values[at]])
            last = self.buckets[-1]
            part = values[at : at + self.width - int(last[3])]
            at += len(part)
            last[1], last[2], last[3] = steps[at - 1], last[2] + sum(part), last[3] + len(part)
            last[4], last[5] = min(last[4], *part), max(last[5], *part)
            if len(self.buckets) > _BUCKETS:
                pairs = zip(self.buckets[::2], self.buckets[1::2], strict=False)
                joined = [[a[0], b[1], a[2] + b[2], a[3] + b[3], min(a[4], b[4]), max(a[5], b[5])] for a, b in pairs]
                self.buckets = joined + ([self.buckets[-1]] if len(self.buckets) % 2 else [])
                self.width *= 2

    def points(self, most: int = _BUCKETS) -> list[tuple[float, float]]:
        """Return (step, mean) of each bucket, or of as many neighbours as make `most` points or fewer."""
        width = max(1, -(-len(self.buckets) // most))
        groups = [self.buckets[at : at + width] for at in range(0, len(self.buckets), width)]
        return [
            ((group[0][0] + group[-1][1]) / 2, sum(item[2] for item in group) / sum(item[3] for item in group))
            for group in groups
        ]

    def range(self) -> tuple[float, float]:
        """Return the lowest and the highest value of all."""
        return min(bucket[4] for bucket in self.buckets), max(bucket[5] for bucket in self.buckets)


class Log:
    """The curves of one train_log.jsonl, read as it grows.

    last: the newest step's line. version: changes whenever a line is read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = Lock()
        self._forget()

    def _forget(self) -> None:
        self.series: dict[str, Series] = {}
        self.last: dict[str, Any] = {}
        self.samples: list[dict[str, Any]] = []  # answers at the last evaluations, as step and answers
        self.seconds, self.tokens, self.lines = 0.0, 0, 0
        self.recent = 0.0  # seconds of a step, smoothed
        self._read, self._file, self._head = 0, -1, b""

    @property
    def version(self) -> str:
        """Return a word that is another one as soon as there is something new."""
        return f"{self._file}-{self._read}"

    def update(self) -> Log:
        """Read what was added; everything if the file was replaced, as when a run is resumed."""
        with self._lock:
            try:
                facts = self.path.stat()
                with self.path.open("rb") as file:
                    head = file.read(64)
                    if facts.st_ino != self._file or facts.st_size < self._read or not head.startswith(self._head):
                        self._forget()
                    self._file, self._head = facts.st_ino, head
                    file.seek(self._read)
                    self._take(file)
            except OSError:
                self._forget()
        return self

    def _take(self, file: Any) -> None:
        rest = b""
        while chunk := file.read(_CHUNK):
            *lines, rest = (rest + chunk).split(b"\n")
            self._read += sum(map(len, lines)) + len(lines)
            self._add(_parsed(lines))

    def _add(self, found: list[Any]) -> None:
        lines = [line for line in found if isinstance(line, dict) and _number(line.get("step")) is not None]
        self.lines += len(lines)
        for line in lines:
            if isinstance(line.get("samples"), list):
                answers = [item for item in line["samples"][:_MOST_SAMPLES] if isinstance(item, dict)]
                self.samples = [*self.samples[1 - _MOST_EVALUATIONS :], {"step": line["step"], "answers": answers}]
            if "loss" not in line:
                continue
            seconds, tokens = _number(line.get("seconds")) or 0.0, _number(line.get("tokens")) or 0.0
            self.last = _numbers(line)
            self.seconds += seconds
            self.tokens += int(tokens)
            self.recent = seconds if not self.recent else 0.9 * self.recent + 0.1 * seconds
            if seconds:
                line["speed"] = tokens / seconds
        for name in CURVES:
            curve = [(line["step"], line[name]) for line in lines if name in line and _number(line[name]) is not None]
            if curve:
                steps, values = zip(*curve, strict=True)
                self.series.setdefault(name, Series()).extend(steps, values)


def last_step(path: Path) -> dict[str, Any]:
    """Return the newest step's line of a log, whose end is read; {} without one."""
    length = 1 << 14
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            while True:
                file.seek(max(0, size - length))
                lines = file.read().split(b"\n")[:-1]
                for text in reversed(lines[length < size :]):  # the first may be half a line
                    for line in _parsed([text]):
                        if isinstance(line, dict) and "loss" in line and _number(line.get("step")) is not None:
                            return _numbers(line)
                if length >= size:
                    return {}
                length *= 8
    except OSError:
        return {}


def _parsed(lines: list[bytes]) -> list[Any]:
    """Return the values of lines of JSON, without those that are none. All at once takes half the time."""
    try:
        found: list[Any] = json.loads(b"[" + b",".join(lines) + b"]")
        if len(found) == len(lines):
            return found
    except (ValueError, RecursionError):
        pass
    if len(lines) < 2:
        return []
    middle = len(lines) // 2
    return _parsed(lines[:middle]) + _parsed(lines[middle:])


def _numbers(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if _number(value) is not None}


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # more digits than a float has
        return None


_logs: OrderedDict[Path, Log] = OrderedDict()
_logs_lock = Lock()


def log_of(path: Path) -> Log:
    """Return a log, up to date; the least recently used ones are forgotten."""
    with _logs_lock:
        log = _logs.pop(path, None) or Log(path)
        _logs[path] = log
        while len(_logs) > _MOST_LOGS:
            _logs.popitem(last=False)
    return log.update()
