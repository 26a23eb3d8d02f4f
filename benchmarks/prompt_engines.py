"""Prompts of chat requests as transformers, vLLM and llama.cpp make them; served_prompts.py compares them."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

# llama.cpp tells every template today's date, which Llama 3.1's would otherwise replace by this one
DATED = {"chat_template_kwargs": {"date_string": "26 Jul 2024"}}
Request = dict[str, Any]
Engine = Callable[[list[Request]], list[list[int]]]


def by_transformers(tokenizer: Any) -> Engine:
    """The prompts of apply_chat_template."""
    return lambda requests: [
        tokenizer.apply_chat_template(
            request["messages"], tools=request.get("tools"), add_generation_prompt=True, return_dict=False
        )
        for request in requests
    ]


def as_sent(request: Request) -> Request:
    """Return a request as a client sends it: arguments as text, reasoning under one name."""
    messages = []
    for message in request["messages"]:
        sent = {key: value for key, value in message.items() if key not in ("thinking", "reasoning")}
        if "tool_calls" in sent:
            sent["tool_calls"] = [
                call
                | {
                    "function": call["function"]
                    | {"arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}
                }
                for call in sent["tool_calls"]
            ]
        messages.append(sent)
    return request | {"messages": messages}


def by_vllm(python: str, folder: Path) -> Engine:
    """The prompts of vLLM's renderer, in an environment of its own."""

    def engine(requests: list[Request]) -> list[list[int]]:
        file = folder / "requests.jsonl"
        file.write_text("\n".join(json.dumps(as_sent(request)) for request in requests), encoding="utf-8")
        command = [python, str(Path(__file__).with_name("vllm_prompts.py")), str(folder), str(file)]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]

    return engine


def by_llama_cpp(folder: Path) -> Engine:
    """The prompts of llama.cpp's server."""
    from byeori.export.gguf_convert import write_model
    from byeori.export.llama_cpp import LlamaCpp

    write_model(folder, folder / "model.gguf", "f32")
    server = LlamaCpp(folder / "model.gguf", context=512, threads=1)
    return lambda requests: [server.tokens(server.prompt(as_sent(request) | DATED)) for request in requests]


def write_model_folder(folder: Path, tokenizer: Any, kind: str) -> None:
    """Write a random model of two layers with a tokenizer."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32_768}
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **sizes, **heads)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def engines(args: argparse.Namespace, tokenizer: Any, kind: str, folder: Path) -> Iterator[tuple[str, Engine]]:
    """Yield the names of the engines that are asked for, and what each makes of requests."""
    yield "transformers", by_transformers(tokenizer)
    if kind and (args.vllm or args.llama_cpp):
        write_model_folder(folder, tokenizer, kind)
        if args.vllm:
            yield "vLLM", by_vllm(args.vllm, folder)
        if args.llama_cpp:
            yield "llama.cpp", by_llama_cpp(folder)
