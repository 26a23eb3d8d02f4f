"""Who may see the page: whoever has its token, from the page itself. Everything else is refused before a route runs."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from fnmatch import fnmatch
from urllib.parse import urlencode, urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_LOCAL = ("127.0.0.1", "localhost", "::1")
_SAFE = ("GET", "HEAD")
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; frame-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # with no-referrer browsers would send no Origin either
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """Checks each request's host, origin and token; adds the headers that keep scripts out.

    origins: addresses of the page besides this machine's own, with * for any text. root_path: removed from paths.
    """

    def __init__(self, app: ASGIApp, *, token: str, origins: Sequence[str] = (), root_path: str = "") -> None:
        self.app, self.token = app, token
        self.origins, self.root_path = [origin.rstrip("/") for origin in origins], root_path.rstrip("/")
        # browsers send cookies of one port to all others of a machine, so each page has a name of its own
        self.cookie = f"byeori-studio-{hashlib.sha256(token.encode()).hexdigest()[:10]}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass the request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self.root_path and scope["path"].startswith(self.root_path + "/"):
            scope = {**scope, "path": scope["path"].removeprefix(self.root_path)}
        answer = self._answer(Request(scope)) or self.app

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await answer(scope, receive, with_headers)

    def _answer(self, request: Request) -> Response | None:
        """Return what to answer in place of the page; None to let the request in."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if not self._known_host(host):
            return PlainTextResponse(
                f"This page does not know the address {host!r}; start byeori studio with --origin, such as "
                f"--origin https://{host}",
                421,
            )
        if origin is None and request.method not in _SAFE:
            return PlainTextResponse("A form of this page sends an Origin; this request has none.", 403)
        # a proxy may put this machine's name in the place of its own, as nginx does
        if origin is not None and urlsplit(origin).netloc != host and origin not in self.origins:
            return PlainTextResponse(
                "This request comes from another page. If you came here through a proxy, start byeori studio with "
                f"--origin {origin}",
                403,
            )
        if request.headers.get("sec-fetch-site") in ("cross-site", "same-site") and not _is_visit(request):
            return PlainTextResponse("This request comes from another page.", 403)
        given = request.query_params.get("token")
        if given is not None and request.method in _SAFE and self._is_token(given):
            return self._signed_in(request)
        if self._is_token(request.cookies.get(self.cookie, "")):
            return None
        return PlainTextResponse(
            "This page needs the address with the token that `byeori studio` printed in its terminal.", 403
        )

    def _known_host(self, host: str) -> bool:
        try:
            if urlsplit(f"//{host}").hostname in _LOCAL:
                return True
        except ValueError:
            return False
        return any(fnmatch(host.lower(), urlsplit(origin).netloc.lower()) for origin in self.origins)

    def _is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode(), self.token.encode())

    def _signed_in(self, request: Request) -> Response:
        """Keep the token in a cookie of this folder of the address, and take it out of the address."""
        rest = urlencode([(name, value) for name, value in request.query_params.multi_items() if name != "token"])
        place = request.url.path.rsplit("/", 1)[-1] or "."
        answer = RedirectResponse(place + (f"?{rest}" if rest else ""), 303)
        answer.set_cookie(self.cookie, self.token, path=None, httponly=True, samesite="strict")
        return answer


def _is_visit(request: Request) -> bool:
    """Whether a person follows a link to the page, which may stand anywhere."""
    return request.method in _SAFE and request.headers.get("sec-fetch-mode") == "navigate"
