"""The screen of training: runs as their folders show them, stopped and resumed by a click."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from byeori import config
from byeori.artifacts import layout
from byeori.config.flags import flags
from byeori.errors import ConfigError
from byeori.studio import charts, jobs, pages, plan, runs
from byeori.studio.runs import Run
from byeori.studio.workspace import Workspace
from byeori.support.pages import finite

_GIB = 2**30
_MOST_OVERLAID = 11  # studio.css has twelve styles
_POINTS = 512  # of a run in a chart; fewer where there are many, whose lines are as wide as ever
_MOST_DRAWINGS = 16
_KINDS: dict[str, type[config.TrainSettings]] = {"sft": config.SftSettings, "dpo": config.DpoSettings}
# title, keys of the log that are drawn, what a value is divided by
CHARTS = (
    ("Loss", ("loss", "eval_loss"), 1),
    ("Accuracy", ("accuracy", "eval_accuracy"), 1),
    ("Margin", ("margin", "eval_margin"), 1),
    ("Learning rate", ("learning_rate",), 1),
    ("Tokens per second", ("speed",), 1),
    ("Peak memory in GiB", ("peak_memory_bytes",), _GIB),
)


def screen(request: Request, error: str = "") -> Response:
    """Show one run, others beside it, and the list of all."""
    space = pages.workspace(request)
    every = runs.every(space)
    name = request.query_params.get("run") or (every[0].name if every else "")
    beside = request.query_params.getlist("with")[:_MOST_OVERLAID]
    run = runs.named(space, name) if name else None
    settings = _given(run) if run else plan.settings_of(space)
    command = run.command if run else plan.command_of(space)
    return pages.render(
        request,
        "train.html",
        here="train",
        error=error,
        runs=[{"name": other.name, "state": other.state} for other in every],
        run=run,
        beside=beside,
        hour=space.draft("road").get("usd_per_hour"),
        live=_live(space, run, beside) if run else None,
        copies=pages.copies(command, _KINDS[command], settings),
    )


def _given(run: Run) -> dict[str, Any]:
    """Return what the run was given: what the page gave it, or what it recorded that is not the default."""
    if run.job is not None:
        return run.job.settings()
    fields = flags(_KINDS[run.command])
    recorded = {name: value for name, value in run.settings().items() if name in fields}
    return {
        name: value for name, value in recorded.items() if fields[name].is_required() or value != fields[name].default
    }


def _live(space: Workspace, run: Run, beside: list[str]) -> dict[str, Any]:
    """Return everything about a run that changes."""
    log, state, total = run.log, run.state, run.total_steps()
    others = [runs.named(space, name) for name in beside if name != run.name]
    step = int(log.last.get("step", 0))
    tail = run.job.tail() if run.job else ""
    return {
        "version": version(run),
        "state": state,
        "moving": state in ("starting", "running"),
        "can_resume": run.can_resume,
        "step": step,
        "total": total,
        "facts": _facts(space, run, total),
        "charts": _drawn([run, *others]),
        "samples": log.samples,
        "tail": tail,
        "error": run.job.error() if run.job and state in ("failed", "killed") else "",
        "dropped": run.read(layout.AUDIT).get("dropped_rows"),
    }


def version(run: Run) -> str:
    """Return a word that is another one as soon as the run shows something new."""
    size = 0
    if run.job is not None and (said := run.job.folder / "output.txt").exists():
        size = said.stat().st_size
    return f"{run.log.version}-{run.state}-{size}"


def _facts(space: Workspace, run: Run, total: int | None) -> list[tuple[str, str]]:
    """Return the numbers of a run as (what, value)."""
    log, last = run.log, run.log.last
    if not last:
        return []
    facts = [("loss", f"{last['loss']:.4f}" if isinstance(last.get("loss"), float) else "–")]
    for name, title in (("eval_loss", "evaluation loss"), ("accuracy", "accuracy"), ("margin", "margin")):
        if (series := log.series.get(name)) and series.buckets:
            facts.append((title, charts.short(series.points()[-1][1])))
    facts.append(("learning rate", f"{last.get('learning_rate', 0):.2e}"))
    facts.append(("tokens per second", f"{log.tokens / log.seconds:,.0f}" if log.seconds else "–"))
    memory = f"{last.get('peak_memory_bytes', 0) / _GIB:.2f} GiB"
    predicted = run.read(layout.PLAN).get("predicted")
    peak = finite(predicted.get("peak_bytes")) if isinstance(predicted, dict) else None
    planned = peak or _planned_bytes(space, run)
    facts.append(("peak memory", memory))
    if planned:
        facts.append(("planned memory", f"{planned / _GIB:.2f} GiB"))
    facts.append(("time so far", _span(log.seconds)))
    left = log.recent * (total - last["step"]) if total else None
    if left is not None and run.state == "running":
        facts.append(("time left", _span(left)))
    if hour := space.draft("road").get("usd_per_hour"):
        facts.append(("cost so far", f"${log.seconds / 3600 * hour:.2f}"))
        if left is not None and run.state == "running":
            facts.append(("cost left", f"${left / 3600 * hour:.2f}"))
    return facts


def _planned_bytes(space: Workspace, run: Run) -> float | None:
    """What the screen of the plan said about this machine, if it planned these settings."""
    job = jobs.latest(space, "plan")
    if job is None or run.job is None:
        return None
    given, planned = run.job.settings(), job.settings()
    if any(
        given.get(name) != planned.get(name)
        for name in ("base_model", "data_path", "lora_r", "batch_size", "cutoff_len")
    ):
        return None
    here = next(
        (line for line in (plan.result_of(space) or {}).get("orders", []) if line["order"] == "this machine"), None
    )
    return here and here["need"] * _GIB


def _span(seconds: float) -> str:
    """Return a time: 42 s, 3:05 min, 2:05 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02} h"


_drawings: OrderedDict[tuple[str, ...], list[dict[str, Any]]] = OrderedDict()  # many readers look at the same run


def _drawn(shown: list[Run]) -> list[dict[str, Any]]:
    """Return the charts of some runs, one over the other."""
    wanted = tuple(f"{run.folder} {run.log.version}" for run in shown)
    if wanted in _drawings:
        return _drawings[wanted]
    found = []
    for title, keys, scale in CHARTS:
        lines = []
        for number, run in enumerate(shown):
            series = run.log.series
            for key in keys:
                if key in series:
                    points = series[key].points(max(96, _POINTS // len(shown)))
                    lines.append(
                        charts.Line(
                            name=run.name,
                            number=number,
                            evaluation=key.startswith("eval_"),
                            points=[(step, value / scale) for step, value in points],
                        )
                    )
        if drawn := charts.chart(lines):
            found.append(drawn | {"title": title})
    _drawings[wanted] = found
    while len(_drawings) > _MOST_DRAWINGS:
        _drawings.popitem(last=False)
    return found


def live(request: Request) -> Response:
    """The part of the screen that changes; nothing if it has not."""
    space = pages.workspace(request)
    run = runs.named(space, request.query_params.get("run", ""))
    beside = request.query_params.getlist("with")[:_MOST_OVERLAID]
    if request.query_params.get("seen") == version(run):
        return Response(status_code=204)
    return pages.render(request, "train_live.html", run=run, live=_live(space, run, beside), beside=beside)


# ---- what a person does ----------------------------------------------------------------------------------------------


@pages.action(screen)
def stop(request: Request, form: FormData) -> Response:
    """Do what Ctrl-C does: the step is finished and saved; a second one stops at once."""
    run = runs.named(pages.workspace(request), str(form.get("run", "")))
    run.stop()
    return pages.go(pages.address("train", run=run.name))


@pages.action(screen)
def resume(request: Request, form: FormData) -> Response:
    """Go on from the last checkpoint."""
    space = pages.workspace(request)
    run = runs.named(space, str(form.get("run", "")))
    if run.state in ("starting", "running"):
        raise ConfigError(f"{run.name} runs already")
    values = _given(run) | {"output_dir": run.name, "resume_from_checkpoint": "latest"}
    jobs.start(space, run.command, values)
    return pages.go(pages.address("train", run=run.name))


@pages.action(screen)
def duplicate(request: Request, form: FormData) -> Response:
    """Fill the screens with the settings of a run, for another one."""
    space = pages.workspace(request)
    run = runs.named(space, str(form.get("run", "")))
    values = {
        name: value for name, value in _given(run).items() if name not in ("output_dir", "resume_from_checkpoint")
    }
    space.save_draft("train", values)
    space.save_draft("road", space.draft("road") | {"command": run.command})
    return pages.go("plan")


@pages.action(screen)
def price(request: Request, form: FormData) -> Response:
    """Keep what this machine costs an hour."""
    space = pages.workspace(request)
    text = str(form.get("usd_per_hour", "")).strip()
    try:
        value = float(text) if text else None
    except ValueError:
        raise ConfigError(f"{text[:40]!r} is no price; give dollars per hour, such as 2.5") from None
    if value is not None and not 0 <= value < 10_000:
        raise ConfigError("a price per hour is between 0 and 10,000 dollars")
    space.save_draft("road", space.draft("road") | {"usd_per_hour": value})
    return pages.go(pages.address("train", run=str(form.get("run", ""))))


@pages.action(screen)
def overlay(request: Request, form: FormData) -> Response:
    """Show other runs over this one."""
    chosen = [("run", str(form.get("run", ""))), *(("with", str(name)) for name in form.getlist("with"))]
    return pages.go("train?" + pages.query(chosen))


routes = [
    Route("/train", pages.view(screen)),
    Route("/train-live", pages.view(live)),
    Route("/train-stop", stop, methods=["POST"]),
    Route("/train-resume", resume, methods=["POST"]),
    Route("/train-duplicate", duplicate, methods=["POST"]),
    Route("/train-price", price, methods=["POST"]),
    Route("/train-overlay", overlay, methods=["POST"]),
]
