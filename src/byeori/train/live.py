"""What a run shows while it trains: on the terminal, and as live.html, which a browser loads again every few seconds.

lines of the log ── Seen (smoothed loss, evaluations, speed) ──┬──> Live: three lines that move, or plain ones
                                                               └──> LivePage: the report's curve, sample answers
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from byeori.artifacts.layout import LIVE
from byeori.errors import CheckpointError
from byeori.evaluate.chart import loss_chart
from byeori.support import atomic_files, pages
from byeori.support.console import moving, say
from byeori.support.language import tr, translated
from byeori.support.text_files import redacted, visible

_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARKS = 32  # columns of the sparkline
_PAGE_SECONDS = 5.0  # between two versions of the page
_PAGE_SHARE = 50  # and at least so many times as long as the last one took to write
_PICTURE_SECONDS = 0.2
_LINE_ENDS = (1, 3, 5, 7)  # facts after which a line ends
_MOST = 4_000  # losses that are kept for the curve
_LINE_SECONDS = 10.0  # between two lines where nothing can move


@dataclass
class Seen:
    """What the lines of a run's log add up to. total: its steps; epochs: those of them all.

    planned: bytes that the plan expects at the peak, 0 without a plan.
    """

    total: int
    epochs: float
    planned: int = 0
    points: list[tuple[int, float]] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a line of the log: of a step, of an evaluation, or of sample answers."""
        line = {name: math.nan if value is None else value for name, value in line.items()}  # null in the file
        if "samples" in line:
            self.samples.append(line)
        elif "eval_loss" in line:
            self.evaluations.append(line)
        elif "loss" in line:
            self.last = line
            if (loss := pages.finite(line["loss"])) is not None:
                self.points.append((line["step"], loss))
            if len(self.points) > _MOST:  # a long run: neighbours become their mean
                pairs = zip(self.points[::2], self.points[1::2], strict=False)
                self.points = [(b[0], (a[1] + b[1]) / 2) for a, b in pairs]

    @property
    def losses(self) -> list[float]:
        """The losses of the steps so far, of a long run as means."""
        return [loss for _, loss in self.points]

    @property
    def log(self) -> list[dict[str, Any]]:
        """What the curve is drawn of."""
        return [{"step": step, "loss": loss} for step, loss in self.points] + self.evaluations

    @property
    def smoothed(self) -> float:
        """The mean of the last fifteenth of the losses, of five at least: about what the curve of the report shows."""
        recent = self.losses[-max(5, len(self.points) // 15) :]
        return sum(recent) / len(recent) if recent else math.nan

    @property
    def best(self) -> dict[str, Any] | None:
        known = [item for item in self.evaluations if pages.finite(item["eval_loss"]) is not None]
        return min(known, key=lambda item: item["eval_loss"]) if known else None

    def facts(self) -> list[tuple[str, str, str]]:
        """Return what is shown as (name, value, what is said beside it)."""
        line, planned = self.last, self.planned
        if not line:
            return []
        peak = line["peak_memory_bytes"] / 2**30
        out = [
            (tr("Epoch"), f"{line['epoch']:.2f}", tr("of {count}", count=f"{self.epochs:g}")),
            (tr("Loss"), f"{self.smoothed:.4f}", tr("smoothed; last {loss}", loss=f"{line['loss']:.4f}")),
        ]
        if "accuracy" in line:
            margin = tr("margin {value}", value=f"{line.get('margin', math.nan):.3f}")
            out.append((tr("Preference accuracy"), f"{100 * line['accuracy']:.0f}%", margin))
        if self.evaluations:
            last, best = self.evaluations[-1], self.best or self.evaluations[-1]
            beside = tr("best {loss} at step {step}", loss=f"{best['eval_loss']:.4f}", step=best["step"])
            out.append((tr("Evaluation loss"), f"{last['eval_loss']:.4f}", beside))
            if "eval_accuracy" in last:
                margin = tr("margin {value}", value=f"{last.get('eval_margin', math.nan):.3f}")
                out.append((tr("Evaluation accuracy"), f"{100 * last['eval_accuracy']:.0f}%", margin))
        rate = f"{line['learning_rate']:.2e}"
        out.append((tr("Speed"), f"{line['tokens'] / max(line['seconds'], 1e-9):,.0f}", tr("tokens per second")))
        beside = tr("{size} planned", size=f"{planned / 2**30:.1f} GiB") if planned else ""
        out.append((tr("Peak memory"), f"{peak:.1f} GiB", beside))
        return [*out, (tr("Learning rate"), rate, "")]


def sparkline(values: Sequence[float], width: int = _SPARKS) -> str:
    """Return numbers as blocks of eighths, averaged to at most `width` of them: [3, 2, 1, 1] -> "█▅▁▁"."""
    if len(values) > width:
        edges = [round(at * len(values) / width) for at in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    if not values:
        return ""
    low, reach = min(values), (max(values) - min(values)) or 1.0
    return "".join(_BLOCKS[min(7, int(8 * (value - low) / reach))] for value in values)


class Live:
    """The terminal: progress and time left, the smoothed loss with a sparkline, evaluation, speed and memory.

    It is updated in place on a terminal and in a notebook with ipywidgets; elsewhere a plain line is printed every few
    seconds.
    """

    def __init__(self, seen: Seen, *, start: int, shown: bool) -> None:
        from rich import live, progress
        from rich.console import Console

        self._console = Console(stderr=True)
        self._moving = shown and moving()
        self._shown, self._seen, self._last = shown, seen, 0.0
        columns = (progress.TextColumn(tr("step")), progress.MofNCompleteColumn(), progress.BarColumn(bar_width=24))
        times = (progress.TimeElapsedColumn(), progress.TextColumn(tr("left")), progress.TimeRemainingColumn())
        self._progress = progress.Progress(*columns, *times, console=self._console)
        self._task = self._progress.add_task("train", total=seen.total, completed=start)
        self._live = live.Live(console=self._console, auto_refresh=False) if self._moving else None
        self._start, self._began = start, time.monotonic()

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._show()
            self._live.stop()

    def say(self, text: str) -> None:
        """Print a line above what moves."""
        if self._shown:
            self._console.print(visible(redacted(translated(text))), highlight=False, markup=False)

    def update(self) -> None:
        """Show what was seen after a step."""
        step, now = self._seen.last["step"], time.monotonic()
        self._progress.update(self._task, completed=step)
        wait = _PICTURE_SECONDS if self._live else _LINE_SECONDS
        if not self._shown or (now - self._last <= wait and step != self._seen.total):
            return
        self._last = now
        if self._live:
            self._show()
        else:
            left = (now - self._began) / max(1, step - self._start) * (self._seen.total - step)
            say(f"step {step}/{self._seen.total}  {plain(self._seen.last)}  {left / 60:.1f} min left")

    def _show(self) -> None:
        from rich.console import Group
        from rich.text import Text

        assert self._live
        text = Text()
        for at, (name, value, beside) in enumerate(self._seen.facts()):
            text.append(f"{name} ", style="dim").append(value, style="bold")
            text.append(f" {beside}" if beside else "", style="dim")
            if name == tr("Loss"):
                text.append(f" {sparkline(self._seen.losses)}", style="cyan")
            text.append("\n" if at in _LINE_ENDS else "   ")
        self._live.update(Group(self._progress, text), refresh=True)


def plain(line: Mapping[str, Any]) -> str:
    """Return the numbers of a step as a line of text, for terminals where nothing can move."""
    speed, memory = line["tokens"] / max(line["seconds"], 1e-9), line["peak_memory_bytes"] / 2**30
    pairs = f"accuracy {line['accuracy']:.0%}  margin {line['margin']:.3f}  " if "accuracy" in line else ""
    rate = f"lr {line['learning_rate']:.2e}"
    return f"loss {line['loss']:.4f}  {pairs}{rate}  {speed:,.0f} tokens/s  {memory:.1f} GiB"


class LivePage:
    """output_dir/live.html, rewritten while the run goes on: the curve of the report, numbers, sample answers."""

    def __init__(self, folder: Path, seen: Seen, *, title: str, shown: bool) -> None:
        self._path, self._seen, self._title, self._shown = folder / LIVE, seen, title, shown
        self._next, self._began = 0.0, time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.write(state=tr("stopped") if kind else tr("finished"), running=False)

    def update(self) -> None:
        """Write the page if it is time."""
        if time.monotonic() >= self._next:
            self.write(state=tr("training"), running=True)

    def write(self, *, state: str, running: bool) -> None:
        """Write the page. A disk that is full does not stop the run here: the log and the checkpoints say it better."""
        if not self._shown or not self._seen.last:
            return
        began, seen = time.monotonic(), self._seen
        step = seen.last["step"]
        page = pages.render(
            "train/live.html.j2",
            script="train/live.js" if running else "",
            title=self._title,
            state=state,
            running=running,
            step=step,
            total=seen.total,
            share=100 * step / max(1, seen.total),
            minutes=f"{(began - self._began) / 60:.1f}",
            left=f"{(began - self._began) / 60 / step * (seen.total - step):.1f}",
            facts=seen.facts(),
            pairs="accuracy" in seen.last,
            chart=loss_chart(seen.log, seen.best["step"] if seen.best else None),
            samples=seen.samples[-1] if seen.samples else None,
            earlier=seen.samples[:-1][::-1][:8],
        )
        try:
            atomic_files.write(self._path, page)
        except CheckpointError:
            self._shown = False
        now = time.monotonic()
        self._next = now + max(_PAGE_SECONDS, _PAGE_SHARE * (now - began))


class Display:
    """All that a run shows, by its first process alone. earlier: lines of the log of a run that is resumed."""

    def __init__(
        self,
        seen: Seen,
        folder: Path,
        *,
        title: str,
        start: int,
        shown: bool,
        earlier: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._seen = seen
        for line in earlier:
            seen.add(line)
        self._terminal = Live(seen, start=start, shown=shown)
        self._page = LivePage(folder, seen, title=title, shown=shown)
        self.say = self._terminal.say

    def __enter__(self) -> Self:
        self._terminal.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._terminal.__exit__(kind, *rest)
        self._page.__exit__(kind, *rest)

    def step(self, line: Mapping[str, Any]) -> None:
        """Show the line of a step."""
        self._seen.add(line)
        self._terminal.update()
        self._page.update()

    def note(self, line: Mapping[str, Any]) -> None:
        """Show an evaluation or sample answers, the answers also on the terminal."""
        self._seen.add(line)
        for sample in line.get("samples", ()):
            answer = " ".join(sample["answer"].split())
            self.say(f"  {sample['name']}: {answer[:160]}{'...' if len(answer) > 160 else ''}")
        self._page.update()
