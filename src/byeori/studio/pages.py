"""Templates and texts of the page: HTML that is escaped everywhere, in English or Korean."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from byeori.config import Settings
from byeori.config.flags import flags
from byeori.errors import ByeoriError
from byeori.studio import settings_text
from byeori.studio.workspace import Workspace
from byeori.support.text_files import sentence

LANGUAGES = {"en": "English", "ko": "한국어"}
LANGUAGE = "byeori-language"
_LONGEST_TEXT = 4_000_000  # bytes of a field
SCREENS = ("home", "data", "template", "plan", "train", "try", "compare", "ship")


def workspace(request: Request) -> Workspace:
    """Return the folder that the page works in."""
    found: Workspace = request.app.state.workspace
    return found


def language(request: Request) -> str:
    """Return the language of a request: chosen on the page, or the first one that the browser asks for."""
    chosen = request.cookies.get(LANGUAGE)
    if chosen in LANGUAGES:
        return chosen
    wanted = (
        item.split(";")[0].split("-")[0].strip() for item in request.headers.get("accept-language", "").split(",")
    )
    return next((item for item in wanted if item in LANGUAGES), "en")


@functools.cache
def texts() -> dict[str, list[str]]:
    """Return key -> the text in each of the languages."""
    loaded: dict[str, list[str]] = yaml.safe_load(
        resources.files("byeori.studio").joinpath("texts.yaml").read_text("utf-8")
    )
    return loaded


def text(key: str, spoken: str, **values: Any) -> str:
    """Return a text of the page. values: for its {names}; they are escaped where the text is shown."""
    return texts()[key][list(LANGUAGES).index(spoken)].format(**values)


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(request: Request, name: str, status: int = 200, **values: Any) -> Response:
    """Answer with a template. Its `t` is `text` in the language of the request."""
    spoken = language(request)
    html = (
        _environment()
        .get_template(name)
        .render(
            t=functools.partial(text, spoken=spoken),
            spoken=spoken,
            languages=LANGUAGES,
            screens=SCREENS,
            folder=workspace(request).folder,
            up="../" * (request.url.path.count("/") - 1),
            back=request.url.path.rpartition("/")[2] + (f"?{request.url.query}" if request.url.query else ""),
            about=functools.partial(settings_text.about, spoken=spoken),
            **values,
        )
    )
    return HTMLResponse(html, status)


def go(place: str) -> Response:
    """Answer a form with another screen. Addresses are relative, so that they hold behind any proxy."""
    return RedirectResponse(place, 303)


Screen = Callable[..., Response]
Act = Callable[[Request, FormData], Response]


def action(screen: Screen) -> Callable[[Act], Callable[[Request], Awaitable[Response]]]:
    """Make an endpoint of a function of (request, form). What the user can fix is said on the screen."""

    def decorate(act: Act) -> Callable[[Request], Awaitable[Response]]:
        @functools.wraps(act)
        async def endpoint(request: Request) -> Response:
            async with request.form(max_part_size=_LONGEST_TEXT) as form:
                try:
                    return await run_in_threadpool(act, request, form)
                except ByeoriError as error:
                    return await run_in_threadpool(screen, request, error=sentence(error))

        return endpoint

    return decorate


def view(screen: Screen) -> Screen:
    """Make an endpoint of a screen: what the user can fix is said in place of it."""

    @functools.wraps(screen)
    def endpoint(request: Request) -> Response:
        try:
            return screen(request)
        except ByeoriError as error:
            return render(request, "problem.html", 400, here="", error=sentence(error))

    return endpoint


def copies(command: str, kind: type[Settings], values: dict[str, Any]) -> dict[str, str]:
    """Return what the buttons at the end of a screen copy."""
    values = {name: value for name, value in values.items() if name in flags(kind)}
    return {"command": settings_text.as_command(command, kind, values), "yaml": settings_text.as_yaml(values)}
