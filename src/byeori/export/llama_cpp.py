"""llama.cpp in this process (PyPI: xllamacpp): what its server makes of a chat request, and its greedy answers."""

from __future__ import annotations

import json
import secrets
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from byeori.errors import ConfigError, ModelError
from byeori.support.text_files import one_line

_LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy the environment names


class LlamaCpp:
    """llama.cpp's server with one model, on a port of this machine with a key; it ends with this object.

    model: a GGUF file. adapter: a LoRA in GGUF, or None. context: tokens of prompt and answer. parallel: requests that
    it works on at once. wide_cache: keep keys and values in float32, not float16.
    """

    def __init__(
        self,
        model: Path,
        adapter: Path | None = None,
        *,
        context: int,
        threads: int,
        parallel: int = 1,
        wide_cache: bool = False,
    ) -> None:
        """Start the server.

        Raises:
            ConfigError: if llama.cpp is not installed.
            ModelError: if llama.cpp cannot load the file.
        """
        try:
            import xllamacpp
        except ImportError:
            raise ConfigError(
                "llama.cpp is not installed; pip install 'byeori[gguf]' (an export with --check off needs none)"
            ) from None
        given = xllamacpp.CommonParams()
        self._key = secrets.token_hex(16)
        given.api_keys = [self._key]
        given.model.path = str(model)
        given.n_ctx, given.n_parallel, given.n_batch = context * parallel, parallel, max(context, 512)
        self.parallel = parallel
        given.cache_ram_mib = 0  # it would give a prompt's keys and values to requests with another scale of the LoRA
        if wide_cache:
            given.cache_type_k = given.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        given.cpuparams.n_threads = given.cpuparams_batch.n_threads = threads
        given.verbosity, given.warmup, given.use_jinja, given.fit_params = -1, False, True, False
        given.sampling.temp = 0.0
        if adapter is not None:
            given.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        try:
            self._server: Any = xllamacpp.Server(given)
        except Exception as error:  # a RuntimeError with llama.cpp's words
            raise ModelError(f"llama.cpp cannot load {model}: {one_line(str(error), 200)}") from None

    def prompt(self, request: Mapping[str, Any]) -> str:
        """Return the text of a chat request (`messages`, `tools`, `chat_template_kwargs`)."""
        return str(self.post("/apply-template", dict(request))["prompt"])

    def tokens(self, text: str) -> list[int]:
        """Return the ids of a prompt's text, as the server tokenizes it: with the BOS token if the file says so."""
        return list(self.post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"])

    def answer(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """Return the greedy answer's ids, without the token that ends it."""
        body = {
            "prompt": list(prompt),
            "n_predict": max_new_tokens,
            "temperature": 0.0,
            "repeat_penalty": 1.0,
            "return_tokens": True,
            "cache_prompt": False,
        }
        found = self.post("/completion", body)
        return list(found["tokens"][:-1] if found["stop_type"] == "eos" else found["tokens"])

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Return the reply to a request.

        Raises:
            ModelError: if it is an error.
        """
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        url = self._server.listening_address + path
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with _LOCAL.open(request) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            words = error.read().decode("utf-8", errors="replace")
            raise ModelError(f"llama.cpp's server answers {error.code} to {path}: {one_line(words, 300)}") from None
