"""A stand-in for the Hugging Face Hub: as much of its HTTP interface as publishing needs, in a thread of the test.

POST /api/repos/create, GET /api/models/ID, POST /api/models/ID/branch/NAME, POST /api/validate-yaml,
POST /api/models/ID/preupload/REV, POST /ID.git/info/lfs/objects/batch, PUT /lfs/OID, POST /api/models/ID/commit/REV
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_goodTokenThatNobodyMaySee"


@dataclass
class Repository:
    """What has arrived. files: (branch, name) -> bytes."""

    private: bool
    files: dict[tuple[str, str], bytes] = field(default_factory=dict)
    branches: set[str] = field(default_factory=lambda: {"main"})
    messages: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """The server's state. writers: owners that the token may write to. fault: path's pattern -> status to answer."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    writers: set[str] = field(default_factory=lambda: {"me"})
    fault: dict[str, int] = field(default_factory=dict)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status >= 400:
            self.send_header("X-Error-Message", str(value.get("error", "")))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def handle_any(self) -> None:
        body, path = self.body(), self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        for pattern, status in self.hub.fault.items():
            if re.search(pattern, path):
                return self.answer(status, {"error": f"fault, and your token was {TOKEN}"})
        if path.startswith("/lfs/"):  # the real address is signed and takes no token
            return self.put(path.removeprefix("/lfs/"), body)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            good = json.loads(body)["content"].startswith("---\n")
            return self.answer(
                200 if good else 400, {"errors": [] if good else [{"message": "no header"}], "warnings": []}
            )
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/(.+))?", path):
            return self.repository(match[1], match[2], match[3], body)
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.batch(json.loads(body))
        return self.answer(404, {"error": f"the stand-in does not know {path}"})

    do_GET = do_POST = do_PUT = handle_any

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        address = {"url": f"{self.hub.url}/{name}"}
        if wanted["organization"] not in self.hub.writers:
            return self.answer(
                403, {"error": f"You don't have the rights to create a model under {wanted['organization']}"}
            )
        if name in self.hub.repositories:
            return self.answer(409, {"error": "You already created this model repo", **address})
        self.hub.repositories[name] = Repository(private=wanted.get("visibility") == "private")
        return self.answer(200, address)

    def repository(self, name: str, what: str | None, revision: str | None, body: bytes) -> None:
        found = self.hub.repositories.get(name)
        if found is None:
            return self.answer(404, {"error": "Repository not found"})
        if what is None:
            files = [{"rfilename": file} for branch, file in found.files if branch == "main"]
            return self.answer(200, {"id": name, "private": found.private, "siblings": files})
        if what == "branch":
            found.branches.add(str(revision))
            return self.answer(200, {})
        if revision not in found.branches:
            return self.answer(404, {"error": f"Invalid rev id: {revision}"})
        if what == "preupload":
            modes = [
                {
                    "path": item["path"],
                    "uploadMode": "lfs" if item["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for item in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": modes})
        return self.commit(found, str(revision), name, [json.loads(line) for line in body.splitlines()])

    def batch(self, wanted: dict[str, Any]) -> None:
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}} for item in wanted["objects"]
        ]
        return self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400, {"error": "the bytes do not have this sha256"})
        self.hub.blobs[oid] = body
        return self.answer(200, {})

    def commit(self, found: Repository, revision: str, name: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                found.messages.append(value["summary"])
            elif line["key"] == "file":
                found.files[revision, value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                found.files[revision, value["path"]] = self.hub.blobs[value["oid"]]
            else:
                return self.answer(400, {"error": f"the stand-in does not know {line['key']}"})
        return self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/c0ffee", "commitOid": "c0ffee"})


@contextmanager
def serve() -> Iterator[Hub]:
    """A Hub on a free port of this machine, for as long as the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
