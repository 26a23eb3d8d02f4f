"""The first screen: recent runs with their state and verdict, and a guided first run."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from byeori.artifacts import layout
from byeori.studio import pages, runs
from byeori.studio.runs import Run


def screen(request: Request, error: str = "") -> Response:
    """Show the runs of the folder."""
    space = pages.workspace(request)
    return pages.render(request, "home.html", here="home", error=error, runs=[_line(run) for run in runs.every(space)])


def _line(run: Run) -> dict[str, Any]:
    log = run.log
    return {
        "name": run.name,
        "command": run.command,
        "state": run.state,
        "step": log.last.get("step"),
        "total": run.total_steps(),
        "loss": log.last.get("loss"),
        "eval_loss": run.read(layout.METRICS).get("tuned", {}).get("loss"),
    }


routes = [Route("/", pages.view(screen))]
