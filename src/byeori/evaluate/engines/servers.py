"""Command lines of the servers that others wrote, for a model or an adapter as byeori saves it.

vllm serve          the base, with the adapter as `tuned` beside it
transformers serve  a folder of links in which the adapter lies inside its base
llama-server        GGUF files of both; or the same server from PyPI (llamacpp_server.py)
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from byeori.errors import ConfigError
from byeori.support.foreign_files import json_record

ENGINES = ("vllm", "llamacpp", "transformers")
"""In the order in which `auto` looks for them."""

_INSTALL = {"vllm": "vllm", "llamacpp": "'byeori[gguf]'", "transformers": "'transformers[serving]'"}
# what an adapter's folder has that its base has as well, or instead
_WEIGHTS = "*.safetensors*"


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """A program to start. model: its name in requests. environment: variables to add."""

    command: list[str]
    model: str
    environment: dict[str, str] = field(default_factory=dict)

    def shown(self) -> str:
        """Return the command as one types it."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.command)])


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """Where a server listens."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """Return its address for requests from this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        return f"http://{host}:{self.port}"


def program(engine: str) -> list[str] | None:
    """Return the beginning of an engine's command line; None if it is not installed."""
    here = Path(sys.executable).parent
    if engine == "transformers":
        there = all(map(find_spec, ("fastapi", "uvicorn", "openai")))
        return [sys.executable, "-P", "-m", "transformers.cli.transformers", "serve"] if there else None
    name = {"vllm": "vllm", "llamacpp": "llama-server"}[engine]
    found = shutil.which(name) or shutil.which(name, path=str(here))
    if found:
        return [found, "serve"] if engine == "vllm" else [found]
    own = [sys.executable, "-P", "-m", "byeori.evaluate.engines.llamacpp_server"]
    return own if engine == "llamacpp" and find_spec("xllamacpp") else None


def choose(engine: str) -> str:
    """Return the engine to use: the one that is named, or the first that is installed.

    Raises:
        ConfigError: if it is not installed.
    """
    if engine != "auto":
        if program(engine) is None:
            raise ConfigError(f"--engine {engine} is not installed; pip install {_INSTALL[engine]}")
        return engine
    for name in ENGINES:
        if program(name) is not None:
            return name
    raise ConfigError("no engine is installed; pip install 'transformers[serving]', or vllm on a GPU")


def vllm(
    base: Path,
    folder: Path,
    address: Address,
    *,
    dtype: str,
    rank: int | None,
    ends: dict[str, list[int]] | None,
) -> Server:
    """Return vLLM's server. folder: of the adapter, or of the model (base). rank: of an adapter; None for a model.

    ends: `eos_token_id` of answers, where the base's generation config has not all of them.
    """
    command = [*(program("vllm") or []), str(base), "--host", address.host, "--port", str(address.port)]
    command += ["--dtype", dtype, "--tokenizer", str(folder)]
    if (template := folder / "chat_template.jinja").is_file():
        command += ["--chat-template", str(template)]
    if ends:
        command += ["--override-generation-config", json.dumps(ends)]
    if rank is None:
        return Server(command=[*command, "--served-model-name", folder.name], model=folder.name)
    command += ["--served-model-name", "base", "--enable-lora", "--max-lora-rank", str(rank)]
    return Server(command=[*command, "--lora-modules", f"tuned={folder}"], model="tuned")


def transformers(folder: Path, address: Address, *, dtype: str) -> Server:
    """Return transformers' server for a folder that holds a whole model; see `embedded`."""
    command = [*(program("transformers") or []), str(folder), "--host", address.host, "--port", str(address.port)]
    return Server(command=[*command, "--dtype", dtype], model=str(folder), environment={"HF_HUB_OFFLINE": "1"})


def embedded(base: Path, adapter: Path, ends: dict[str, list[int]], into: Path) -> Path:
    """Fill a folder with links to a base and to an adapter inside it, which transformers loads as one model.

    ends: see `vllm`. Returns the folder.
    """
    for source in (base, adapter):
        for path in source.iterdir():
            target = into / path.name
            if path.is_file() and (source is adapter or path.match(_WEIGHTS) or path.suffix in (".json", ".model")):
                target.unlink(missing_ok=True)
                target.symlink_to(path.resolve())
    config = into / "generation_config.json"
    values = json_record(config, dict[str, Any]) if config.is_file() else {}
    config.unlink(missing_ok=True)
    config.write_text(json.dumps({**values, **ends}), encoding="utf-8")
    return into


def llama_cpp(model: Path, adapter: Path | None, address: Address, *, template: Path | None, context: int) -> Server:
    """Return llama.cpp's own server. model, adapter: GGUF files. context: tokens of prompt and answer."""
    command = [*(program("llamacpp") or []), "-m", str(model), "-c", str(context)]
    command += ["--host", address.host, "--port", str(address.port), "--jinja", "--cache-ram", "0"]
    command += ["--lora", str(adapter)] if adapter else []
    command += ["--chat-template-file", str(template)] if template else []
    return Server(command=command, model="tuned" if adapter else model.stem)


def curl(address: Address, model: str, request: dict[str, Any]) -> str:
    """Return a command that asks a server. request: `messages` and what belongs to them, or `prompt`."""
    body = json.dumps({"model": model, **request, "max_tokens": 128, "temperature": 0}, ensure_ascii=False)
    path = "chat/completions" if "messages" in request else "completions"
    return f"curl {address.url}/v1/{path} -H 'Content-Type: application/json' \\\n  -d {shlex.quote(body)}"
