"""The screen of rows: a file or dataset, its first rows, its columns, and what is wrong with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from byeori import config
from byeori.data import chat_columns, places, sources, template
from byeori.data.conversation import conversation
from byeori.data.readers import READERS, ending
from byeori.data.readers.text import encoding_of
from byeori.data.rendered_text import rendered_turns
from byeori.data.sources import ROW, Table
from byeori.errors import ByeoriError, ConfigError, TemplateError
from byeori.studio import jobs, pages, settings_text
from byeori.studio.workspace import Workspace
from byeori.support.text_files import sentence, visible

SHOWN = 20  # rows of the table
_CELL = 300  # characters of a value in the table
_GLANCE = 1000  # rows that are read for the screen
_BINARY = (".xlsx", ".xls", ".xlsb", ".ods", ".parquet", ".arrow", ".feather")
PREVIEW = (
    "base_model",
    *config.DataSettings.model_fields,
    "validation_path",
    "val_set_size",
    "seed",
    "text_column",
    "train_turns",
    "chat_template",
    "chat_template_kwargs",
)


def screen(request: Request, error: str = "") -> Response:
    """Show the rows that are chosen."""
    space = pages.workspace(request)
    draft = space.draft("train")
    found: dict[str, Any] = {"table": None}
    try:
        found = _found(space, draft)
    except ByeoriError as problem:
        error = error or sentence(problem)
    return pages.render(
        request,
        "data.html",
        here="data",
        error=error,
        draft=draft,
        tables=space.tables(),
        names=_names(),
        checked=_checked(space, draft),
        copies=pages.copies(
            "preview", config.PreviewSettings, {name: draft[name] for name in PREVIEW if name in draft}
        ),
        **found,
    )


def _found(space: Workspace, draft: dict[str, Any]) -> dict[str, Any]:
    table = load(space, draft)
    if table is None:
        return {"table": None}
    columns = [name for name in table.rows.column_names if name != ROW]
    rows = [dict(table.rows[number]) for number in range(min(SHOWN, len(table.rows)))]
    path = Path(draft["data_path"][0])
    facts: dict[str, Any] = {"rows": len(table.rows), "more": len(table.rows) == _GLANCE}
    if path.is_file():
        facts["encoding"] = "" if path.suffix.lower() in _BINARY else encoding_of(path)
        facts["size"] = path.stat().st_size
    return {
        "table": facts,
        "columns": columns,
        "rows": [(table.name(number), [cell(row[name]) for name in columns]) for number, row in enumerate(rows)],
        "chats": [chat for chat in map(bubbles, rows[:5]) if chat],
        "notes": [*table.notes, *(f"{name}: {why}" for name, why in table.left_out.items())],
    }


def load(space: Workspace, draft: dict[str, Any], most: int = _GLANCE) -> Table | None:
    """Return the first rows of the table that is chosen; None if there is none.

    Raises:
        ByeoriError: if it cannot be read, or is outside.
    """
    if not draft.get("data_path"):
        return None
    space.check(config.PreviewSettings, draft)
    return sources.load_rows(
        list(draft["data_path"]),
        config=draft.get("dataset_config"),
        split=draft.get("dataset_split", "train"),
        query=draft.get("query"),
        max_rows=min(most, draft.get("max_rows") or most),
        columns=draft.get("columns"),
    )


def cell(value: Any) -> str:
    """Return a value as the table shows it."""
    text = "" if value is None else visible(value if isinstance(value, str) else repr(value))
    return text if len(text) <= _CELL else f"{text[:_CELL]} …"


def bubbles(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (role, text) of the turns of a row that is a conversation; none if it is none."""
    if not set(chat_columns.COLUMNS) & set(row) and not rendered_turns(row.get("text")):
        return []
    try:
        found = conversation(row)
    except TemplateError:
        return []
    turns = []
    for message in found.messages:
        beside = {name: value for name, value in message.items() if name not in ("role", "content") and value}
        parts = [str(message.get("content") or ""), *(f"{name}: {value}" for name, value in beside.items())]
        turns.append((str(message["role"]), visible("\n".join(part for part in parts if part))))
    return turns


def _names() -> list[str]:
    """Names that the built-in templates and chats give to columns."""
    known = {name for text in template.shipped().values() for name in template.parse(text, "").columns}
    return sorted({*known, "messages", "chosen", "rejected", "prompt", "completion", "system", "tools", "text"})


def _checked(space: Workspace, draft: dict[str, Any]) -> dict[str, Any] | None:
    """What the last check of all rows found, if it was of these settings."""
    job = jobs.latest(space, "preview")
    if job is None or {name: draft.get(name) for name in PREVIEW} != {
        name: job.settings().get(name) for name in PREVIEW
    }:
        return None
    return {
        "state": job.state,
        "audit": job.result(),
        "error": job.error() if job.state == "failed" else "",
        "job": job,
    }


# ---- what a person does ----------------------------------------------------------------------------------------------


@pages.action(screen)
def choose(request: Request, form: FormData) -> Response:
    """Choose a file of the folder, a Hub dataset, or one that is sent."""
    space = pages.workspace(request)
    sent = form.get("file")
    if isinstance(sent, UploadFile) and sent.filename:
        path = _keep(space, sent)
    else:
        path = str(form.get("other") or form.get("path") or "").strip()
    if not path:
        raise ConfigError("no rows are chosen; choose a file, or type the name of a dataset on the Hub")
    draft = space.draft("train") | {"data_path": [path], "columns": None, "template": None}
    draft |= {
        name: str(form[name]).strip() or None for name in ("dataset_config", "dataset_split", "query") if name in form
    }
    space.check(config.PreviewSettings, draft)
    places.check_paths([path], draft.get("dataset_split") or "train")
    space.save_draft("train", draft)
    return pages.go("data")


def _keep(space: Workspace, sent: UploadFile) -> str:
    """Write a file that the browser sent into FOLDER/data, under a free name."""
    name = re.sub(r"[^\w .()-]", "_", Path(str(sent.filename)).name).lstrip(".")[-120:] or "rows"
    if ending(Path(name)) not in READERS:
        raise ConfigError(f"{name} has an unknown ending; known endings are {', '.join(READERS)}")
    folder = space.folder / "data"
    folder.mkdir(exist_ok=True)
    space.inside(folder)
    for number in range(1000):
        path = folder / (f"{number}-{name}" if number else name)
        try:
            with path.open("xb") as file:
                while part := sent.file.read(1 << 20):
                    file.write(part)
        except FileExistsError:
            continue
        return space.shown(path)
    raise ConfigError(f"there are a thousand files called {name}; delete some")


@pages.action(screen)
def rename(request: Request, form: FormData) -> Response:
    """Give columns other names, and say how many rows are held out."""
    space = pages.workspace(request)
    draft = space.draft("train")
    before = draft.get("columns") or {}
    columns = {}
    for key, value in form.multi_items():
        if key.startswith("as:") and str(value).strip():
            old = before.get(key[3:], key[3:])
            if str(value).strip() != old:
                columns[str(value).strip()] = old
    held_out = str(form.get("val_set_size", "")).strip()
    values = settings_text.from_form(config.PreviewSettings, {"val_set_size": held_out})
    config.check(config.PreviewSettings, {"base_model": "x", "data_path": ["x"], **values})
    changes = draft | {"columns": columns or None, "val_set_size": values.get("val_set_size")}
    load(space, changes, 1)
    space.save_draft("train", changes)
    return pages.go("data")


@pages.action(screen)
def check(request: Request, form: FormData) -> Response:
    """Tokenize all rows, in a process of its own."""
    space = pages.workspace(request)
    draft = space.draft("train")
    values = {name: draft[name] for name in PREVIEW if name in draft}
    jobs.start(space, "preview", values | {"json": True})
    return pages.go("data#checked")


def checked(request: Request) -> Response:
    """The part of the screen that shows the check, while it runs."""
    space = pages.workspace(request)
    return pages.render(request, "data_checked.html", checked=_checked(space, space.draft("train")))


routes = [
    Route("/data", pages.view(screen)),
    Route("/data-choose", choose, methods=["POST"]),
    Route("/data-columns", rename, methods=["POST"]),
    Route("/data-check", check, methods=["POST"]),
    Route("/data-checked", pages.view(checked)),
]
