"""Ollama's Modelfile: GGUF files, the prompt in Go's template language, what ends an answer, greedy decoding."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from byeori.artifacts import saved_model
from byeori.artifacts.saved_model import SavedModel
from byeori.data import bounded_jinja, ollama_template
from byeori.data.ollama_template import OllamaTemplate
from byeori.data.template import Template

_CONTEXT = 4096  # Ollama's default


def compiled(saved: SavedModel, template: Template | None) -> OllamaTemplate | None:
    """Compile the prompt of a model; None if Ollama cannot build it."""
    tokenizer = saved.tokenizer
    front = "".join(tokenizer.convert_ids_to_tokens(saved_model.encoding(saved, template).prefix))
    if template:
        return ollama_template.of_template(template, front)

    def render(messages: list[dict[str, str]]) -> str:
        return bounded_jinja.render(tokenizer, messages, add_generation_prompt=True)

    return ollama_template.of_chat_template(render, str(tokenizer.chat_template), front)


def not_compiled(template: Template | None) -> str:
    """Return why there is no TEMPLATE, and what to do instead."""
    reason = (
        f"the template needs the columns {', '.join(template.required_columns)}, and Ollama knows one text of the user"
        if template
        else "the chat template is more than fixed words around the turns"
    )
    return f"Ollama cannot build this prompt: {reason}; send it the whole prompt with `raw`, or serve it with llama.cpp"


def modelfile(
    *,
    model: str,
    adapter: str | None,
    template: OllamaTemplate | None,
    system: str,
    stops: Sequence[str],
    context: int | None,
) -> str:
    """Return the text of a Modelfile.

    model, adapter: names of GGUF files next to it. system: the system prompt that all rows share, "" for none. stops:
    texts that end an answer. context: of prompt and answer in tokens; None for Ollama's default.
    """
    lines = [f"FROM ./{model}"]
    if adapter:
        lines.append(f"ADAPTER ./{adapter}")
    lines.append(f'TEMPLATE """{template.go if template else ollama_template.ANYTHING}"""')
    if system and '"""' not in system:
        lines.append(f'SYSTEM """{system}"""')
    lines += [f"PARAMETER stop {_value(stop)}" for stop in stops]
    # Ollama's defaults sample and penalise repetition, and answers would be others than `byeori compare` measured
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]
    if context:
        lines.append(f"PARAMETER num_ctx {context}")
    return "\n".join(lines) + "\n"


def context_of(saved: SavedModel) -> int | None:
    """Return the context that the trained prompts need, if that is more than Ollama's default."""
    trained = saved.settings.get("cutoff_len")
    needed = 2 * trained if isinstance(trained, int) else 0
    return min(needed, saved.max_length or sys.maxsize) if needed > _CONTEXT else None


def shared_system(requests: Sequence[dict[str, Any]]) -> str:
    """Return the system prompt with which every request begins, "" if they do not share one."""
    firsts = {m["content"] if (m := request["messages"][0])["role"] == "system" else "" for request in requests}
    return str(firsts.pop()) if len(firsts) == 1 else ""


def _value(text: str) -> str:
    return f'"""{text}"""' if set('"\n') & set(text) else f'"{text}"'
