"""Text that a template has made of a conversation already -> its turns, for the template of the model at hand.

### Human: Q### Assistant: A                  -> user Q | assistant A
<s>[INST] <<SYS>>\\nS\\n<</SYS>>\\n\\nQ [/INST] A </s>   -> system S | user Q | assistant A
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_ROLES = {"Human": "user", "Assistant": "assistant", "model": "assistant"}
_SPLIT = {
    "\n\nHuman:": re.compile(r"\n\n(Human|Assistant):"),  # HH-RLHF
    "### Human:": re.compile(r"### (Human|Assistant):"),  # Guanaco
}
_ROLE = r"(?P<role>system|user|assistant)"
_TURNS = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        rf"<\|im_start\|>{_ROLE}\n(?P<text>.*?)<\|im_end\|>\s*",  # ChatML
        # Llama 3
        rf"(<\|begin_of_text\|>)?<\|start_header_id\|>{_ROLE}<\|end_header_id\|>\n\n(?P<text>.*?)<\|eot_id\|>\s*",
        r"(<bos>)?<start_of_turn>(?P<role>user|model)\n(?P<text>.*?)<end_of_turn>\s*",  # Gemma
        rf"<\|{_ROLE}\|>\n?(?P<text>.*?)(<\|end\|>|</s>)\s*",  # Phi, Zephyr
        # Llama 2, Mistral
        r"(<s>)?\s*\[INST\](?P<asked>.*?)\[/INST\](?P<answer>.*?)(</s>\s*|(?=<s>|\Z))",
    )
]


_SYSTEM = ("<<SYS>>", "<</SYS>>")


def hh_turns(value: object) -> list[Mapping[str, Any]]:
    """Return the turns of HH-RLHF's text, "\\\\n\\\\nHuman: ...\\\\n\\\\nAssistant: ..."; none if it is other text."""
    return _split(value, "\n\nHuman:") if isinstance(value, str) else []


def rendered_turns(value: object) -> list[Mapping[str, Any]]:
    """Return the turns of a text all of which ChatML, Llama 2 and 3, Gemma, Phi, Zephyr or Guanaco would write.

    None if it is other text, or a part of it is.
    """
    if not isinstance(value, str):
        return []
    for start in _SPLIT:
        if turns := _split(value, start):
            return turns
    text = value.strip()
    return next((turns for pattern in _TURNS if (turns := _matched(text, pattern))), [])


def _split(text: str, start: str) -> list[Mapping[str, Any]]:
    if not text.startswith(start):
        return []
    pieces = _SPLIT[start].split(text)[1:]
    return [
        {"role": _ROLES[name], "content": said.strip()} for name, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def _matched(text: str, pattern: re.Pattern[str]) -> list[Mapping[str, Any]]:
    turns: list[Mapping[str, Any]] = []
    at = 0
    while at < len(text):
        match = pattern.match(text, at)
        if match is None or match.end() == at:
            return []
        turns += _said(match.groupdict())
        at = match.end()
    return turns


def _said(found: Mapping[str, str | None]) -> Iterator[Mapping[str, Any]]:
    if role := found.get("role"):
        yield {"role": _ROLES.get(role, role), "content": (found["text"] or "").strip()}
        return
    asked, answer = (str(found[name]).strip() for name in ("asked", "answer"))
    if asked.startswith(_SYSTEM[0]):
        system, _, asked = asked.removeprefix(_SYSTEM[0]).partition(_SYSTEM[1])
        yield {"role": "system", "content": system.strip()}
    yield {"role": "user", "content": asked.strip()}
    yield {"role": "assistant", "content": answer}
