"""The server of the page: an address with a token, on this machine only."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import webbrowser
from pathlib import Path

import uvicorn

from byeori.config import StudioSettings
from byeori.errors import ConfigError
from byeori.studio.app import make_app
from byeori.studio.workspace import Workspace
from byeori.support.language import translated

HOST = "127.0.0.1"


def serve(settings: StudioSettings) -> None:
    """Serve the page until Ctrl-C."""
    folder = Path(settings.folder)
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}; make it, or give another one")
    listener = _listen(settings.port)
    os.chdir(folder)  # relative paths mean the same here and in the commands that the page starts
    signal.signal(signal.SIGINT, signal.default_int_handler)  # runs inherit it, also if this was started with nohup
    workspace = Workspace(Path.cwd(), [Path(path) for path in settings.models or []])
    token = secrets.token_urlsafe(24)
    app = make_app(workspace, token, origins=settings.origin, root_path=settings.root_path)
    address = f"http://{HOST}:{listener.getsockname()[1]}/?token={token}"
    # not by `say`, which takes tokens out of what it prints
    print(
        translated(f"byeori studio in {workspace.folder}\n\n    {address}\n\nCtrl-C ends the page; runs go on."),
        file=sys.stderr,
        flush=True,
    )
    if settings.open_browser == "on" or (settings.open_browser == "auto" and _has_display()):
        webbrowser.open(address)
    # the address holds the token, so requests are not logged
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=2,
    )
    uvicorn.Server(config).run(sockets=[listener])


def _listen(port: int) -> socket.socket:
    """Return a listening socket; the next free port if the default one is taken.

    Raises:
        ConfigError: if there is none.
    """
    for candidate in [
        port,
        *(range(port + 1, port + 20) if port == StudioSettings.model_fields["port"].default else ()),
    ]:
        try:
            return socket.create_server((HOST, candidate))
        except OSError as error:
            reason = error.strerror
    raise ConfigError(f"cannot listen on {HOST} port {port}: {reason}; give another --port")


def _has_display() -> bool:
    return sys.stdout.isatty() and (sys.platform == "darwin" or bool(os.environ.get("DISPLAY")))
