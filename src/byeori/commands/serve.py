"""`byeori serve`: start the engine that is installed, with the arguments that this model or adapter needs."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from byeori.artifacts import records, saved_model, serving, tokenizer_files
from byeori.artifacts.saved_model import SavedModel
from byeori.commands import _engine
from byeori.config import ServeSettings
from byeori.data import served_template
from byeori.errors import ConfigError, ModelError
from byeori.evaluate import stop_tokens
from byeori.evaluate.engines import servers
from byeori.evaluate.engines.servers import Address, Server
from byeori.model import load
from byeori.support import console
from byeori.support.console import say

_LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy the environment names
_CONTEXT = 8192  # tokens of prompt and answer that llama.cpp makes room for; --engine_args="-c N" changes it
_END = 15.0  # seconds that a server has to end by itself


@console.quiet_libraries()
def serve(settings: ServeSettings) -> None:
    """Serve a model until Ctrl-C."""
    engine = servers.choose(settings.engine)
    address = Address(host=settings.host, port=settings.port)
    _check_free(address)
    saved = saved_model.find(settings.model, settings.base_model)
    with tempfile.TemporaryDirectory(prefix="byeori-serve-") as scratch:
        server = _server(engine, saved, settings, address, Path(scratch))
        server.command.extend(shlex.split(settings.engine_args or ""))
        say(f"Starting {engine}: {server.shown()}")
        _run(server, address, servers.curl(address, server.model, _request(saved)))


def _server(engine: str, saved: SavedModel, settings: ServeSettings, address: Address, scratch: Path) -> Server:
    folder = saved.folder.resolve()
    base = load.local_folder(saved.base, saved.revision).resolve() if saved.is_adapter else folder
    ends = {"eos_token_id": stop_tokens.of_folder(saved.tokenizer, base)}
    if engine == "llamacpp":
        template = folder / tokenizer_files.CHAT_TEMPLATE
        model, *adapter = _engine.gguf_files(saved, settings.dtype)
        return servers.llama_cpp(
            model,
            adapter[0] if adapter else None,
            address,
            template=template if template.is_file() else None,
            context=min(saved.max_length or _CONTEXT, _CONTEXT),
        )
    if engine == "transformers":
        served = servers.embedded(base, folder, ends, scratch) if saved.is_adapter else folder
        return servers.transformers(served, address, dtype=settings.dtype)
    return servers.vllm(base, folder, address, dtype=settings.dtype, rank=_rank(saved), ends=ends)


def _rank(saved: SavedModel) -> int | None:
    """Return the rank that vLLM is told; None for a whole model.

    Raises:
        ModelError: if vLLM does not serve such an adapter.
    """
    if not saved.is_adapter:
        return None
    config = records.adapter_config(saved.folder)
    if reason := serving.vllm_refuses(config):
        raise ModelError(
            f"vLLM does not serve {saved.name} as an adapter: {reason}; merge it with `byeori merge`, or pass "
            "--engine transformers"
        )
    return serving.vllm_rank(saved.folder)


def _request(saved: SavedModel) -> dict[str, Any]:
    """Return a request that this model's prompt fits."""
    template = saved_model.template_of(saved, None)
    if template:
        request = served_template.request(template, dict.fromkeys(template.prompt_columns, "안녕하세요. Hello."))
        return {name: value for name, value in request.items() if value}
    return {"messages": [{"role": "user", "content": "안녕하세요. Hello."}]}


# ---- the process ---------------------------------------------------------------------------------------------------


def _check_free(address: Address) -> None:
    """Raise ConfigError unless the port can be listened on."""
    try:
        with socket.create_server((address.host, address.port)):
            pass
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {address.host} port {address.port}: {error.strerror}; give another --port"
        ) from None


def _run(server: Server, address: Address, curl: str) -> None:
    """Start a server, show how to ask it once it answers, and wait for its end.

    Raises:
        ModelError: if it ends by itself.
    """
    with _ended_by_sigterm():
        process = subprocess.Popen(server.command, env=os.environ | server.environment)
        try:
            while process.poll() is None and not _answers(address):
                time.sleep(0.3)
            if process.poll() is None:
                say(f"\nReady. Ask it in another terminal, and end it here with Ctrl-C:\n\n{curl}\n")
            process.wait()
        except KeyboardInterrupt:
            say("Stopping")
            return
        finally:
            _end(process)
    raise ModelError(f"the server ended with exit code {process.returncode}; its own lines above say why")


def _answers(address: Address) -> bool:
    try:
        with _LOCAL.open(f"{address.url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process: it may finish what it does first."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C inside, so that no server is left behind."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
