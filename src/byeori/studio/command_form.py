"""Forms of commands other than training: their settings, kept while they are filled in, and the job that they start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.datastructures import FormData
from starlette.requests import Request

from byeori import config
from byeori.studio import jobs, pages, settings_text
from byeori.studio.jobs import COMMANDS, Job
from byeori.studio.workspace import Workspace


def context(
    request: Request, command: str, defaults: Mapping[str, Any], *, without: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return what a template needs to show the form of a command. defaults: for what is not filled in."""
    space = pages.workspace(request)
    values = filled(space, command, defaults)
    job = jobs.latest(space, command)
    return {
        "command": command,
        "kind": COMMANDS[command],
        "values": values,
        "groups": settings_text.fields(COMMANDS[command], values, without=without),
        "job": shown(job) if job else None,
        "copies": pages.copies(command, COMMANDS[command], values),
    }


def filled(space: Workspace, command: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a form, with defaults for what is empty."""
    draft = {name: value for name, value in space.draft(command).items() if value is not None}
    return {name: value for name, value in {**defaults, **draft}.items() if value not in (None, "", [])}


def keep(space: Workspace, command: str, form: FormData) -> None:
    """Keep what is filled in.

    Raises:
        ConfigError: if a value is wrong, or a path is outside.
    """
    kind = COMMANDS[command]
    values = settings_text.from_form(kind, dict(form))
    missing = {name: "x" for name, field in kind.model_fields.items() if field.is_required() and name not in values}
    config.check(kind, {**missing, **({"format": "gguf"} if "format" in missing else {}), **_trial(command), **values})
    space.check(kind, values)
    space.save_draft(command, values)


def _trial(command: str) -> dict[str, str]:
    return {"repo_id": "user/name"} if command == "publish" else {}


def start(space: Workspace, command: str, form: FormData, defaults: Mapping[str, Any]) -> Job:
    """Keep what is filled in, and start the command. The next one gets a folder of its own.

    Raises:
        ByeoriError: if the command would refuse it.
    """
    keep(space, command, form)
    job = jobs.start(space, command, filled(space, command, defaults))
    if job.output:
        space.change_draft(command, output_dir=None)
    return job


def shown(job: Job) -> dict[str, Any]:
    """Return a job, ready for a template."""
    state, tail = job.state, job.tail()
    return {
        "name": job.name,
        "command": job.command,
        "output": job.output,
        "state": state,
        "tail": tail,
        "result": job.tail("result.txt"),
        "error": job.error() if state in ("failed", "killed", "gate not met") else "",
        "version": f"{state}-{len(tail)}",
    }
