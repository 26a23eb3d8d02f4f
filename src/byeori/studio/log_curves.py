"""A log of any length as curves of bounded size: read once, then only what was added.

train_log.jsonl ── new lines ──> Series (at most _BUCKETS means of neighbouring steps) ──> the points of a chart
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
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
_CHUNK = 1 << 20


@dataclass(slots=True)
class Series:
    """The mean of `width` neighbouring values each, as [first step, last step, sum, count, lowest, highest]."""

    width: int = 1
    buckets: list[list[float]] = field(default_factory=list)

    def add(self, step: float, value: float) -> None:
        """Add a value of a later step."""
        last = self.buckets[-1] if self.buckets else None
        if last is not None and last[3] < self.width:
            last[1], last[2], last[3] = step, last[2] + value, last[3] + 1
            last[4], last[5] = min(last[4], value), max(last[5], value)
            return
        self.buckets.append([step, step, value, 1, value, value])
        if len(self.buckets) > _BUCKETS:
            pairs = zip(self.buckets[::2], self.buckets[1::2], strict=False)
            joined = [[a[0], b[1], a[2] + b[2], a[3] + b[3], min(a[4], b[4]), max(a[5], b[5])] for a, b in pairs]
            self.buckets = joined + ([self.buckets[-1]] if len(self.buckets) % 2 else [])
            self.width *= 2

    def points(self) -> list[tuple[float, float]]:
        """Return (step, mean) of each bucket."""
        return [((first + last) / 2, total / count) for first, last, total, count, _, _ in self.buckets]

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
        self.samples: list[dict[str, Any]] = []  # answers at the last evaluation
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
            for line in lines:
                self._read += len(line) + 1
                self._add(line)

    def _add(self, text: bytes) -> None:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            return
        step = _number(line.get("step")) if isinstance(line, dict) else None
        if step is None:
            return
        self.lines += 1
        if isinstance(line.get("samples"), list):
            self.samples = [item for item in line["samples"][:_MOST_SAMPLES] if isinstance(item, dict)]
        if "loss" in line:
            seconds = _number(line.get("seconds")) or 0.0
            self.last = line
            self.seconds += seconds
            self.tokens += int(_number(line.get("tokens")) or 0)
            self.recent = seconds if not self.recent else 0.9 * self.recent + 0.1 * seconds
            if seconds:
                line = line | {"speed": (_number(line.get("tokens")) or 0.0) / seconds}
        for name in CURVES:
            if name in line and (number := _number(line[name])) is not None:
                if name not in self.series:
                    self.series[name] = Series()
                self.series[name].add(step, number)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


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
