"""What a tokenizer's chat template does with a conversation: what it shows, and how it writes earlier answers.

Found by rendering conversations of a few words, as training renders those of the rows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from byeori.data.conversation import conversation
from byeori.data.turns import turns
from byeori.errors import TemplateError

_WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Name of the city"}},
            "required": ["city"],
        },
    },
}
_CALL = {"id": "call12345", "type": "function", "function": {"name": "weather", "arguments": '{"city": "서울"}'}}
_Q1, _Q2 = ({"role": "user", "content": text} for text in ("Q1", "Q2"))
_A1, _A2 = ({"role": "assistant", "content": text} for text in ("A1", "A2"))

PROBES: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [_Q1, _A1]},
    "several turns": {"messages": [_Q1, _A1, _Q2, _A2]},
    "system": {"messages": [{"role": "system", "content": "S1"}, _Q1, _A1]},
    "reasoning": {"messages": [_Q1, _A1 | {"reasoning_content": "R1"}, _Q2, _A2 | {"reasoning_content": "R2"}]},
    "tools": {
        "messages": [
            _Q1,
            {"role": "assistant", "content": None, "tool_calls": [_CALL]},
            {"role": "tool", "content": "맑음", "tool_call_id": "call12345", "name": "weather"},
            _A1,
        ],
        "tools": [_WEATHER],
    },
}
"""Rows of a few words, each with something that not every template shows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TemplateFacts:
    """shown: a name of PROBES -> whether the template shows all of such a row.

    trained, later: how an answer is trained, and how it stands in the prompts of later turns; equal if history is
    kept, and "" if the template has no rows of several turns.
    """

    shown: dict[str, bool]
    trained: str = ""
    later: str = ""

    @property
    def rewrites(self) -> bool:
        """Whether earlier answers stand in later prompts in another form than they were trained in."""
        return self.trained != self.later

    def sentences(self) -> list[str]:
        """Return what a user should know."""
        lines = []
        if self.rewrites:
            lines.append(
                f"The chat template rewrites earlier answers ({self.trained!r} is {self.later!r} in later prompts): "
                "each turn is trained after the history that a server sends"
            )
        elif self.later:
            lines.append("The chat template keeps earlier answers as they were trained: turns share their history")
        names = {"system": "system prompts", "tools": "tools and calls", "reasoning": "reasoning"}
        for there, verb in ((True, "shows"), (False, "refuses or leaves out")):
            if listed := [name for key, name in names.items() if self.shown[key] == there]:
                lines.append(f"It {verb} {', '.join(listed)}")
        return [". ".join(lines)]


def template_facts(tokenizer: Any) -> TemplateFacts:
    """Return what a tokenizer's chat template does."""
    shown = {name: _shows(row, tokenizer) for name, row in PROBES.items()}
    if not shown["several turns"]:
        return TemplateFacts(shown=shown)
    kind = "reasoning" if shown["reasoning"] else "several turns"
    first, second = turns(conversation(PROBES[kind]), tokenizer)
    if second.prompt.startswith(first.prompt + first.answer):
        return TemplateFacts(shown=shown, trained=first.answer, later=first.answer)
    same = next((at for at, (a, b) in enumerate(zip(first.prompt, second.prompt, strict=False)) if a != b), None)
    same = len(first.prompt) if same is None else same  # the prompt may open reasoning that history lacks
    later = re.match(r".*?A1(?:\s*<[^<>]*>)?", second.prompt[same:], re.DOTALL)
    return TemplateFacts(shown=shown, trained=first.prompt[same:] + first.answer, later=later.group() if later else "")


def _shows(row: dict[str, Any], tokenizer: Any) -> bool:
    try:
        return bool(turns(conversation(row), tokenizer))
    except TemplateError:
        return False
