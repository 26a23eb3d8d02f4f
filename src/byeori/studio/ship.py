"""The screen for what leaves: merging, exporting with its check, publishing, and the line that serves."""

from __future__ import annotations

from typing import Any

from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from byeori import config
from byeori.artifacts import layout
from byeori.errors import ConfigError
from byeori.studio import command_form, pages, plan, questions, runs
from byeori.studio.workspace import Workspace

STEPS = {"merge": "Merge", "export": "Export", "publish": "Publish", "serve": "Serve"}
_REPORTS = (layout.EXPORT_REPORT, layout.MERGE_REPORT)
_MOST_VALUES = 40


def screen(request: Request, error: str = "") -> Response:
    """Show one of the steps."""
    space = pages.workspace(request)
    step = request.query_params.get("do", "")
    step = step if step in STEPS else _step_of(request)
    values: dict[str, Any] = (
        _serve(request) if step == "serve" else command_form.context(request, step, _defaults(request, step))
    )
    return pages.render(
        request,
        "ship.html",
        here="ship",
        error=error,
        step=step,
        steps=STEPS,
        models=[name for name in space.model_folders() if not (space.folder / name / layout.EXPORT_REPORT).is_file()],
        results=_results(space),
        **values,
    )


def _step_of(request: Request) -> str:
    """The step whose form was sent, where that went wrong."""
    return next((name for name in STEPS if request.url.path == f"/ship-{name}"), "export")


def _defaults(request: Request, step: str) -> dict[str, Any]:
    space = pages.workspace(request)
    adapter = request.query_params.get("run") or next((run.name for run in runs.adapters(space)), None)
    merged = next((name for name, kind in _kinds(space) if kind == "merged"), None)
    defaults: dict[str, dict[str, Any]] = {
        "merge": {"peft_model_path": adapter, "output_dir": plan.free_folder(space, "merged")},
        "export": {"model": merged or adapter, "format": "gguf", "output_dir": plan.free_folder(space, "export")},
        "publish": {"folder": merged or adapter, "dry_run": True},
    }
    return defaults[step]


def _kinds(space: Workspace) -> list[tuple[str, str]]:
    """Return the results in the folder with what they are."""
    found = []
    for folder, _, files in space.walk():
        kind = "export" if layout.EXPORT_REPORT in files else "merged" if layout.MERGE_REPORT in files else ""
        if kind:
            found.append((space.shown(folder), kind))
    return found


def _serve(request: Request) -> dict[str, Any]:
    space = pages.workspace(request)
    values = {"model": _defaults(request, "export")["model"] or "MODEL"} | space.draft("serve")
    return {
        "command": "serve",
        "kind": config.ServeSettings,
        "values": values,
        "groups": {},
        "job": None,
        "copies": pages.copies("serve", config.ServeSettings, values),
    }


def _results(space: Workspace) -> list[dict[str, Any]]:
    """Return merged models and exports: their files, and what their check found."""
    found = []
    for name, kind in _kinds(space):
        folder = space.folder / name
        files = [(path.name, path.stat().st_size) for path in sorted(folder.iterdir()) if path.is_file()]
        report = next((values for file in _REPORTS if (values := questions.read(folder / file))), {})
        found.append({"name": name, "kind": kind, "files": files, "report": list(_flat(report))[:_MOST_VALUES]})
    return found


def _flat(values: dict[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Return nested values as lines of (name, text)."""
    lines: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines += _flat(value, f"{before}{name}.")
        elif not isinstance(value, list) or len(value) < 6:
            lines.append((before + str(name), f"{value:.6g}" if isinstance(value, float) else str(value)[:300]))
    return lines


@pages.action(screen)
def act(request: Request, form: FormData) -> Response:
    """Do one of the steps."""
    step = _step_of(request)
    space = pages.workspace(request)
    if step == "serve":
        name = str(form.get("model", ""))
        space.check(config.ServeSettings, {"model": name})
        space.save_draft("serve", {"model": name} if name else {})
    else:
        if step == "publish" and not form.get("repo_id"):
            raise ConfigError("repo_id is missing; give the repository to upload to, such as user/name")
        command_form.start(space, step, form, _defaults(request, step))
    return pages.go(pages.address("ship", do=step))


routes = [
    Route("/ship", pages.view(screen)),
    *(Route(f"/ship-{name}", act, methods=["POST"]) for name in STEPS),
]
