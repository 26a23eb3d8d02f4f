"""The page as an ASGI application: its screens behind the guard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from byeori.errors import ConfigError
from byeori.studio import compare, data, home, pages, plan, ship, template, train, trying
from byeori.studio.security import Guard
from byeori.studio.workspace import Workspace
from byeori.support import pages as pages_of_files

_SCREENS = (home, data, template, plan, train, trying, compare, ship)
_YEAR = 365 * 24 * 3600


def make_app(workspace: Workspace, token: str, *, origins: Sequence[str] = (), root_path: str = "") -> Starlette:
    """Return the application. origins, root_path: see Guard."""
    static = StaticFiles(directory=Path(__file__).parent / "static")
    app = Starlette(
        routes=[
            *(route for screen in _SCREENS for route in screen.routes),
            Route("/language", _language),
            Route("/page.css", _page_css),
            Mount("/static", static),
        ],
        middleware=[Middleware(Guard, token=token, origins=origins, root_path=root_path)],
        exception_handlers={404: _missing},
    )
    app.state.workspace = workspace
    return app


def _page_css(request: Request) -> Response:
    """The style sheet that the studio shares with the report and the preview."""
    return Response(pages_of_files.asset("support/pages/page.css"), media_type="text/css")


def _missing(request: Request, error: Exception) -> Response:
    return pages.render(
        request, "problem.html", 404, here="", error=pages.said(request, ConfigError("There is no such page."))
    )


def _language(request: Request) -> Response:
    code, back = request.query_params.get("code", ""), urlsplit(request.query_params.get("back", ""))
    known = not back.scheme and not back.netloc and back.path in pages.SCREENS
    answer = pages.go(back.geturl() if known and back.path != "home" else ".")
    if code in pages.LANGUAGES:
        answer.set_cookie(pages.LANGUAGE, code, max_age=_YEAR, path=None, httponly=True, samesite="strict")
    return answer
