"""The screen of comparisons: base against tuned on rows that were not trained, and runs against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from byeori.artifacts import layout
from byeori.evaluate import verdict
from byeori.studio import command_form, pages, plan, questions, runs, trying
from byeori.studio.workspace import Workspace
from byeori.support import language
from byeori.support.pages import finite

_MEASURES = {"chrf": 1, "rouge_l": 1, "exact": 1, "stopped": 1, "length": 1, "loss": 3}


def screen(request: Request, error: str = "") -> Response:
    """Show the comparisons of the folder, and one of their reports."""
    space = pages.workspace(request)
    report = request.query_params.get("report", "")
    if report:
        space.inside(report)
    return pages.render(
        request,
        "compare.html",
        here="compare",
        error=error,
        adapters=[run.name for run in runs.adapters(space)],
        tables=space.tables(),
        comparisons=_comparisons(space, pages.spoken(request)),
        measures=list(_MEASURES),
        judged=trying.counts(space),
        report=report,
        **command_form.context(request, "compare", _defaults(request), without=("adapter", "data_path")),
    )


def _defaults(request: Request) -> dict[str, Any]:
    """The newest adapter, and rows that look held out."""
    space = pages.workspace(request)
    adapters = [run.name for run in runs.adapters(space)]
    asked = request.query_params.get("run")
    tables = space.tables()
    held_out = next((name for name in tables if any(word in name.lower() for word in ("test", "eval", "valid"))), None)
    data_path = held_out or next(iter(tables), None)
    return {
        "adapter": asked if asked in adapters else next(iter(adapters), None),
        "data_path": [data_path] if data_path else None,
        "output_dir": plan.free_folder(space, "report"),
    }


def _comparisons(space: Workspace, spoken: str) -> list[dict[str, Any]]:
    """Return each comparison with its verdict and its numbers as (tuned, difference, low, high)."""
    found = []
    for folder, _, files in space.walk():
        if layout.REPORT in files and (folder / layout.METRICS).is_file():
            metrics = questions.read(folder / layout.METRICS)
            changed = (folder / layout.METRICS).stat().st_mtime
            found.append(
                (changed, {"name": space.shown(folder), "rows": metrics.get("rows"), **_numbers(metrics, spoken)})
            )
    return [item for _, item in sorted(found, key=lambda pair: -pair[0])]


def _numbers(metrics: dict[str, Any], spoken: str) -> dict[str, Any]:
    numbers = {}
    tuned, difference = (part if isinstance(part, dict) else {} for part in map(metrics.get, ("tuned", "difference")))
    for name, digits in _MEASURES.items():
        value, apart = finite(tuned.get(name)), difference.get(name)
        if value is not None and isinstance(apart, dict):
            mean, low, high = (finite(apart.get(key)) for key in ("mean", "low", "high"))
            change = "" if mean is None else f"{mean:+.{digits}f}"
            between = "" if low is None or high is None else f"{low:+.{digits}f} … {high:+.{digits}f}"
            numbers[name] = (f"{value:.{digits}f}", change, between)
    return {"numbers": numbers, "verdict": verdict_of(metrics, spoken)}


def verdict_of(metrics: dict[str, Any], spoken: str) -> str:
    """Return the verdict of a comparison; "" if it is of another version."""
    with language.speaking(spoken):
        try:
            return language.translated(verdict.verdict(metrics)) if metrics.get("difference") else ""
        except (KeyError, TypeError, ValueError, AttributeError):
            return ""


def _result(space: Workspace, name: str) -> Path:
    return space.inside(name) / layout.REPORT


def report(request: Request) -> Response:
    """A report, for the frame."""
    return pages.document(_result(pages.workspace(request), request.query_params.get("folder", "")))


@pages.action(screen)
def start(request: Request, form: FormData) -> Response:
    """Compare."""
    command_form.start(pages.workspace(request), "compare", form, _defaults(request))
    return pages.go("compare")


routes = [
    Route("/compare", pages.view(screen)),
    Route("/compare-report", pages.view(report)),
    Route("/compare-start", start, methods=["POST"]),
]
