"""Messages in the forms of other interfaces and programs -> those that conversation.py reads.

    Anthropic  content: [{"type": "thinking", "thinking"}, {"type": "text", "text"}, {"type": "tool_use", "input"}]
    Bedrock    content: [{"text"}, {"toolUse": {"name", "input"}}, {"toolResult": {"content"}}]
    Gemini     parts: [{"text", "thought"}, {"functionCall": {"name", "args"}}, {"functionResponse": {"response"}}]
    Responses  {"type": "reasoning", "summary"}, {"type": "function_call", "arguments"}, {"type": "message", "content"}
    Capybara   {"input": Q, "output": A}

        -> role, content, reasoning_content, tool_calls; a message of role `tool` for each result

A part that is none of these, such as an image, stays where it is; conversation.py names it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Turn = Mapping[str, Any]

ITEMS = ("reasoning", "function_call", "function_call_output")
"""Types of the items of OpenAI's Responses API that are not messages."""
_TEXT = ("text", "input_text", "output_text")  # the last two are OpenAI's Responses
_CALL = ("tool_use", "toolUse", "functionCall", "function_call")
_RESULT = ("tool_result", "toolResult", "functionResponse", "function_response")


def turns_in_one_form(turns: Iterable[Turn]) -> Iterator[Turn]:
    """Yield the turns with texts, reasoning, calls and results where OpenAI's form has them; others as they are."""
    thoughts: list[Any] = []
    for turn in turns:
        if turn.get("role") or turn.get("from"):
            parts = turn["parts"] if turn.get("content") is None and turn.get("parts") else turn.get("content")
            if not thoughts and not isinstance(parts, (list, tuple)):
                yield turn
                continue
            rest = {key: value for key, value in turn.items() if key not in ("parts", "content")}
            yield from _sorted(rest, [*thoughts, *(parts if isinstance(parts, (list, tuple)) else [parts])])
            thoughts = []
        elif turn.get("type") in ITEMS:
            yield from _item(turn, thoughts)
        elif {"input", "output"} <= set(turn):
            rest = {key: value for key, value in turn.items() if key not in ("input", "output")}
            yield {"role": "user", "content": turn["input"]}
            yield {"role": "assistant", **rest, "content": turn["output"]}
        else:
            yield turn


def _item(item: Turn, thoughts: list[Any]) -> Iterator[Turn]:
    """An item of OpenAI's Responses; reasoning is kept for the message or the call that follows."""
    if item["type"] == "reasoning":
        for key in ("summary", "content"):
            parts = item.get(key) or ()
            for part in parts if isinstance(parts, (list, tuple)) else [parts]:
                text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
                thoughts.append({"type": "reasoning", "text": text} if isinstance(text, str) else part)
    elif item["type"] == "function_call_output":
        yield {"role": "tool", "content": item.get("output"), "tool_call_id": item.get("call_id")}
    else:
        if thoughts:
            yield from _sorted({"role": "assistant"}, thoughts)
            thoughts.clear()
        call = {"id": item.get("call_id"), "name": item.get("name"), "arguments": item.get("arguments")}
        yield {"role": "function_call", "content": call}


def _sorted(rest: dict[str, Any], parts: Iterable[Any]) -> Iterator[Turn]:
    """A turn whose content is a list of parts, each of which goes where it belongs."""
    texts, reasoning, calls, results = [], [], [], []
    for part in parts:
        if (call := _inside(part, _CALL)) is not None:
            calls.append(_call(call))
        elif (result := _inside(part, _RESULT)) is not None:
            results.append(_result(result))
        elif (thought := _thought(part)) is not None:
            reasoning.append(thought)
        else:
            texts.append(part)
    yield from results
    if calls:
        rest["tool_calls"] = [*(rest.get("tool_calls") or ()), *calls]
    if reasoning:
        before = rest.get("reasoning_content")
        rest["reasoning_content"] = "\n\n".join([before, *reasoning] if isinstance(before, str) else reasoning)
    if texts or calls or reasoning or not results:
        yield {**rest, "content": texts}


def text_of_part(part: object) -> str | None:
    """Return the text of a part of a content; None if it is something else."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str) and part.get("type", "text") in _TEXT:
        return str(part["text"])
    return None


def text_of_system(value: object) -> str | None:
    """Return the text of a system prompt: text, parts of it, or Gemini's object with parts; None if it is no text."""
    parts = value.get("parts") if isinstance(value, Mapping) else value
    texts = [text_of_part(part) for part in (parts if isinstance(parts, (list, tuple)) else [parts])]
    return None if None in texts else "\n\n".join(str(text) for text in texts)


def _inside(part: object, names: tuple[str, ...]) -> Mapping[str, Any] | None:
    """What a part with one of these types holds, or one with a key of that name."""
    if not isinstance(part, Mapping):
        return None
    if part.get("type") in names:
        return part
    return next((part[name] for name in names if isinstance(part.get(name), Mapping)), None)


def _thought(part: object) -> str | None:
    if not isinstance(part, Mapping):
        return None
    if part.get("type") in ("thinking", "reasoning"):
        found = part.get("thinking", part.get("text"))
        return found if isinstance(found, str) else None
    return part["text"] if part.get("thought") is True and isinstance(part.get("text"), str) else None


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    arguments: Any = next((call[key] for key in ("input", "args", "arguments") if call.get(key) is not None), {})
    number = call.get("id") or call.get("toolUseId")
    return ({"id": number} if number else {}) | {"function": {"name": call.get("name"), "arguments": arguments}}


def _result(result: Mapping[str, Any]) -> dict[str, Any]:
    content = result.get("content", result.get("response"))
    if isinstance(content, (list, tuple)) and not all(text_of_part(part) is None for part in content):
        content = [_as_text(part["json"]) if _is_json(part) else part for part in content]
    elif not isinstance(content, str):
        content = _as_text(content)
    found = {"role": "tool", "content": content, "name": result.get("name")}
    return found | {"tool_call_id": result.get("tool_use_id") or result.get("toolUseId")}


def _as_text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _is_json(part: object) -> bool:
    return isinstance(part, Mapping) and "json" in part
