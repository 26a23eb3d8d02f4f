"""Real chat templates, and conversations to put through them."""

from __future__ import annotations

import random
from functools import cache
from importlib.resources import files
from typing import Any

from byeori.data.template_facts import PROBES

# Meta's first template of Llama 3, which opens an assistant's turn behind every conversation.
ALWAYS_OPEN = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
CONVERSATIONS = PROBES
(WEATHER,) = PROBES["tools"]["tools"]
(CALL,) = PROBES["tools"]["messages"][1]["tool_calls"]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


@cache
def shipped_templates() -> dict[str, str]:
    """The chat templates of today's models that TRL ships, by name; not those that it patched for training."""
    folder = files("trl") / "chat_templates"
    paths = {path.name.removesuffix(".jinja"): path for path in folder.iterdir() if path.name.endswith(".jinja")}
    names = sorted(name for name in paths if not name.endswith("_training"))
    return {name: paths[name].read_text(encoding="utf-8") for name in names}


def random_conversation(seed: int, *, system: bool, tools: bool, reasoning: bool) -> dict[str, Any]:
    """A row of one to four exchanges, in Korean and English, with line breaks and spaces where people leave them."""
    draw = random.Random(seed)
    words = ["서울", "날씨", "the answer", "is", "42", "예산안", "\n", "  ", "```python", "<b>", "{{", "é", "끝."]

    def text() -> str:
        return draw.choice(["안녕", "Q", "A"]) + " ".join(draw.choices(words, k=draw.randint(1, 8))) + draw.choice("?.")

    messages = [{"role": "system", "content": text()}] if system and draw.random() < 0.5 else []
    for _ in range(draw.randint(1, 4)):
        messages.append(user(text()))
        if tools and draw.random() < 0.4:
            messages.append({"role": "assistant", "content": "", "tool_calls": [CALL]})
            messages.append({"role": "tool", "content": text(), "tool_call_id": "call12345", "name": "weather"})
        more = {"reasoning_content": text()} if reasoning and draw.random() < 0.5 else {}
        messages.append(assistant(text(), **more))
    return {"messages": messages} | ({"tools": [WEATHER]} if tools else {})
