"""A reverse proxy, which serves another server under a path of its own, as JupyterHub's and nginx do."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PLACE = "/user/me/proxy/8080"


class Proxy(ThreadingHTTPServer):
    """behind: the port of the other server. keeps_path, keeps_host: whether it passes on the path and the name that it
    was asked by."""

    behind = 0
    daemon_threads = True

    def __init__(self, *, keeps_path: bool, keeps_host: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.keeps_path, self.keeps_host = keeps_path, keeps_host
        self.origin = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Proxy

    def _answer(self) -> None:
        if not self.path.startswith(PLACE + "/"):
            self.send_error(404)
            return
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        if not self.server.keeps_host:
            headers["Host"] = f"127.0.0.1:{self.server.behind}"
        other = http.client.HTTPConnection("127.0.0.1", self.server.behind)
        path = self.path if self.server.keeps_path else self.path.removeprefix(PLACE)
        other.request(self.command, path, body, headers)
        found = other.getresponse()
        content = found.read()
        self.send_response(found.status)
        for name, value in found.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = _answer

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def proxy(*, keeps_path: bool, keeps_host: bool) -> Iterator[Proxy]:
    """A proxy that serves until the end of the block."""
    with Proxy(keeps_path=keeps_path, keeps_host=keeps_host) as front:
        threading.Thread(target=front.serve_forever, daemon=True).start()
        yield front
        front.shutdown()
