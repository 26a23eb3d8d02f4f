"""Templates and texts of the page: HTML that is escaped everywhere, in English or Korean."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import jinja2
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from byeori.config import Settings
from byeori.config.flags import flags
from byeori.errors import ByeoriError, ConfigError
from byeori.studio import settings_text
from byeori.studio.workspace import Workspace
from byeori.support import language
from byeori.support.text_files import sentence

LANGUAGES = {"en": "English", "ko": "한국어"}
# of a report, whose own policy lets only its own script run
_OF_DOCUMENTS = (
    "sandbox allow-scripts allow-downloads; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; form-action 'none'; base-uri 'none'; frame-ancestors 'self'"
)
LANGUAGE = "byeori-language"
_LONGEST_TEXT = 4_000_000  # bytes of a field
SCREENS = {
    "home": "Home",
    "data": "Data",
    "template": "Template",
    "plan": "Plan",
    "train": "Train",
    "try": "Try",
    "compare": "Compare",
    "ship": "Ship",
}


def workspace(request: Request) -> Workspace:
    """Return the folder that the page works in."""
    found: Workspace = request.app.state.workspace
    return found


def spoken(request: Request) -> str:
    """Return the language of a request: chosen on the page, or the first one that the browser asks for."""
    picked = request.cookies.get(LANGUAGE)
    if picked in LANGUAGES:
        return picked
    wanted = (
        item.split(";")[0].split("-")[0].strip() for item in request.headers.get("accept-language", "").split(",")
    )
    return next((item for item in wanted if item in LANGUAGES), language.chosen())


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"t": language.tr, "translated": language.translated, "about": settings_text.about}
    return environment


def render(request: Request, name: str, /, status: int = 200, **values: Any) -> Response:
    """Answer with a template. Its `t` gives a message in the language of the request."""
    shared = {
        "spoken": spoken(request),
        "languages": LANGUAGES,
        "screens": SCREENS,
        "folder": workspace(request).folder,
        "up": "../" * (request.url.path.count("/") - 1),
        "back": request.url.path.rpartition("/")[2] + (f"?{request.url.query}" if request.url.query else ""),
    }
    with language.speaking(spoken(request)):
        text = _environment().get_template(name).render(shared | values)
    return HTMLResponse(text.encode("utf-8", "replace"), status)  # half a surrogate in a file that is shown


def go(place: str) -> Response:
    """Answer a form with another screen. Addresses are relative, so that they hold behind any proxy."""
    return RedirectResponse(place, 303)


def said(request: Request, error: BaseException) -> str:
    """Return the sentence of an error, in the language of a request if there is one."""
    with language.speaking(spoken(request)):
        return language.translated(sentence(error))


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
                    return await run_in_threadpool(screen, request, error=said(request, error))

        return endpoint

    return decorate


def view(screen: Screen) -> Screen:
    """Make an endpoint of a screen: what the user can fix is said in place of it."""

    @functools.wraps(screen)
    def endpoint(request: Request) -> Response:
        try:
            return screen(request)
        except ByeoriError as error:
            return render(request, "problem.html", 400, here="", error=said(request, error))

    return endpoint


def address(screen: str, **values: str) -> str:
    """Return the relative address of a screen: address("train", run="a b") == "train?run=a+b"."""
    return f"{screen}?{urlencode(values)}" if values else screen


def query(pairs: list[tuple[str, str]]) -> str:
    """Return the query of an address in which a name may stand several times."""
    return urlencode(pairs)


def document(path: Path) -> Response:
    """Answer with a page that a command wrote. It has an origin of its own, so it sees and changes nothing here.

    Raises:
        ConfigError: if it is not there.
    """
    try:
        html = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"there is no page {path.name}; it may have been deleted") from None
    return HTMLResponse(html, headers={"content-security-policy": _OF_DOCUMENTS, "x-frame-options": "SAMEORIGIN"})


def copies(command: str, kind: type[Settings], values: dict[str, Any]) -> dict[str, str]:
    """Return what the buttons at the end of a screen copy."""
    values = {name: value for name, value in values.items() if name in flags(kind)}
    return {"command": settings_text.as_command(command, kind, values), "yaml": settings_text.as_yaml(values)}
