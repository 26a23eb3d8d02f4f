"""A stand-in for the Hugging Face Hub: as much of its HTTP interface as byeori needs, in a thread of the test.

Publishing: POST /api/repos/create, POST /api/models/ID/branch/NAME, POST /api/validate-yaml,
POST /api/models/ID/preupload/REV, POST /ID.git/info/lfs/objects/batch, PUT /lfs/OID, POST /api/models/ID/commit/REV
Reading: GET /api/models/ID[/revision/REV], GET .../tree/REV[/FOLDER], POST .../paths-info/REV,
GET and HEAD /ID/resolve/REV/FILE; of datasets with /api/datasets/ID and /datasets/ID
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

TOKEN = "hf_goodTokenThatNobodyMaySee"


@dataclass
class Repository:
    """What is there or has arrived. files: (branch, name) -> bytes."""

    private: bool
    files: dict[tuple[str, str], bytes] = field(default_factory=dict)
    branches: set[str] = field(default_factory=lambda: {"main"})
    messages: list[str] = field(default_factory=list)

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(commit, files) of a branch or of a commit."""
        for branch in self.branches:
            files = {name: data for (where, name), data in sorted(self.files.items()) if where == branch}
            commit = hashlib.sha1(repr(files).encode()).hexdigest()
            if revision in (branch, commit):
                return commit, files
        return None


@dataclass
class Fault:
    """What a Hub, or something between, answers. times: how often, then the real answer; None is for ever.

    headers: of the answer. page: an HTML page instead of JSON. cut: whether the body breaks off in the middle.
    """

    status: int = 200
    times: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    page: str | None = None
    cut: bool = False


@dataclass
class Hub:
    """The server's state. repositories: by id, of a dataset by datasets/ID.

    writers: owners that the token may write to. fault: path's pattern -> what to answer: a status, or a Fault.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    writers: set[str] = field(default_factory=lambda: {"me"})
    fault: dict[str, int | Fault] = field(default_factory=dict)

    def put(self, name: str, files: dict[str, bytes] | Path, *, branch: str = "main", private: bool = False) -> None:
        """Files as a branch of a repository; a folder's own where it is one."""
        if isinstance(files, Path):
            files = {path.name: path.read_bytes() for path in files.iterdir() if path.is_file()}
        found = self.repositories.setdefault(name, Repository(private=private))
        found.branches.add(branch)
        found.files |= {(branch, file): data for file, data in files.items()}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    cut = False
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, value: Any, **headers: str) -> None:
        """JSON, or bytes as they are."""
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        headers = {"Content_Type": "application/json"} | headers
        self.send_header("Content-Length", str(len(body)))
        if status >= 400 and isinstance(value, dict):
            self.send_header("X-Error-Message", str(value.get("error", "")))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if self.cut else body)
        if self.cut:
            self.close_connection, self.cut = True, False

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
        for pattern, given in self.hub.fault.items():
            fault = given if isinstance(given, Fault) else Fault(status=given)
            if not re.search(pattern, path) or fault.times == 0:
                continue
            if fault.times is not None:
                fault.times -= 1
            self.cut = fault.cut
            if fault.page is not None:
                return self.answer(fault.status, fault.page.encode(), Content_Type="text/html", **fault.headers)
            if not fault.cut:
                words = {"error": f"fault, and your token was {TOKEN}"}
                return self.answer(fault.status, words, **fault.headers)
        if path.startswith("/lfs/"):  # the real address is signed and takes no token
            return self.put(path.removeprefix("/lfs/"), body)
        if self.command in ("GET", "HEAD") or "/paths-info/" in path:
            return self.read(unquote(path), body)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            good = json.loads(body)["content"].startswith("---\n")
            return self.answer(
                200 if good else 400, {"errors": [] if good else [{"message": "no header"}], "warnings": []}
            )
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/(.+)", path):
            return self.repository(match[1], match[2], match[3], body)
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.batch(json.loads(body))
        return self.answer(404, {"error": f"the stand-in does not know {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    # ---- reading

    def read(self, path: str, body: bytes) -> None:
        address = re.fullmatch(r"/(?:api/)?(models/|datasets/|)([^/]+/[^/]+)(?:/([a-z-]+)/([^/]+)(?:/(.+))?)?", path)
        name = (address[1].removeprefix("models/") + address[2]) if address else ""
        found = self.hub.repositories.get(name)
        seen = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if address is None or found is None or (found.private and not seen):
            return self.answer(404 if seen else 401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        what, revision, file = address[3] or "revision", address[4] or "main", address[5] or ""
        if (version := found.at(revision)) is None:
            return self.answer(404, {"error": f"Invalid rev id: {revision}"}, X_Error_Code="RevisionNotFound")
        commit, files = version
        if what == "resolve":
            if file not in files:
                return self.answer(
                    404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit
                )
            return self.answer(200, files[file], ETag=f'"{_oid(files[file])}"', X_Repo_Commit=commit)
        if what == "revision":
            siblings = [{"rfilename": item, "size": len(data), "blobId": _oid(data)} for item, data in files.items()]
            return self.answer(
                200, {"id": address[2], "sha": commit, "private": found.private, "siblings": siblings, "tags": []}
            )
        wanted = parse_qs(body.decode()).get("paths", []) if what == "paths-info" else None
        entries = _entries(files, file, wanted, deep="recursive=True" in self.path or "recursive=true" in self.path)
        missing = what == "tree" and file and not entries
        return self.answer(404, {"error": "no"}, X_Error_Code="EntryNotFound") if missing else self.answer(200, entries)

    # ---- publishing

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

    def repository(self, name: str, what: str, revision: str, body: bytes) -> None:
        found = self.hub.repositories.get(name)
        if found is None:
            return self.answer(404, {"error": "Repository not found"})
        if what == "branch":
            found.branches.add(revision)
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
        return self.commit(found, revision, name, [json.loads(line) for line in body.splitlines()])

    def batch(self, wanted: dict[str, Any]) -> None:
        objects = [  # what is there already needs no upload
            item
            if item["oid"] in self.hub.blobs
            else {**item, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}}
            for item in wanted["objects"]
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


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _entries(files: dict[str, bytes], folder: str, wanted: list[str] | None, *, deep: bool) -> list[dict[str, Any]]:
    """Files and folders as the Hub lists them: those wanted, or all in a folder."""
    listed: list[dict[str, Any]] = [
        {"type": "file", "path": path, "size": len(data), "oid": _oid(data)} for path, data in files.items()
    ]
    folders = {str(parent) for path in files for parent in Path(path).parents if str(parent) != "."}
    listed += [{"type": "directory", "path": path, "oid": _oid(path.encode())} for path in sorted(folders)]
    if wanted is not None:
        return [item for item in listed if item["path"] in wanted]
    inside = [item for item in listed if not folder or item["path"].startswith(folder + "/")]
    return inside if deep else [item for item in inside if "/" not in item["path"][len(folder) + bool(folder) :]]


@contextmanager
def serve(certificate: Path | None = None) -> Iterator[Hub]:
    """A Hub on a free port of this machine, for as long as the block runs. certificate: with its key, for https."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    hub.url = f"http{'s' if certificate else ''}://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
