"""A row -> a Conversation: messages in one form, the tools they may call, and which turns are trained.

    {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "system": "S"}
        -> system S | user Q | assistant A          trained: [2]

Reads OpenAI's form (`messages`: role, content, tool_calls), ShareGPT's (`conversations`: from, value, function_call,
observation), and what chat_columns.py finds in other columns. Nothing that carries conversation is dropped: a key on a
turn that is not known is an error, and so is a column beside the messages whose text is not in them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from byeori.data.chat_columns import (
    EMPTY,
    ONLY_TEXT,
    REASONING,
    SYSTEM,
    check_nothing_is_left_out,
    parsed,
    turns_of_row,
)
from byeori.data.message_forms import text_of_part, text_of_system
from byeori.data.text_values import compose
from byeori.errors import TemplateError

_ROLES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "model", "bing", "bard", "bot", "ai", "chatbot"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response", "ipython"), "tool"),
    "tool_call": "function_call",
    "function-call": "function_call",
}
_KNOWN_ROLES = {"system", "developer", "user", "assistant", "tool", "function_call"}
_SWITCHES = ("weight", "loss", "train", "masked")  # OpenAI, ms-swift, Axolotl, Axolotl
_TURN_KEYS = {"role", "from", "content", "value", "name", "tool_calls", "function_call", "tool_call_id"}
_TURN_KEYS |= {*REASONING, *_SWITCHES}
# about a message, not in it: WildChat, LMSYS-Chat, OpenAI's and Anthropic's answers
_TURN_KEYS |= {"id", "message_id", "uid", "timestamp", "created", "created_at", "model", "language", "lang", "usage"}
_TURN_KEYS |= {"toxic", "redacted", "hashed_ip", "country", "state", "header", "openai_id", "turn_identifier"}
_TURN_KEYS |= {"finish_reason", "stop_reason", "stop_sequence"}
_SAYING_NOTHING = (("prefix", False), ("type", "message"))  # Mistral, OpenAI's Responses

Turns = Literal["all", "last"]
Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Messages as chat templates read them.

    messages: each with `role` and `content` (text), and where the row has them `reasoning_content` (and its other
        names, `reasoning` and `thinking`), `tool_calls` ({"type": "function", "function": {"name", "arguments"}},
        arguments as an object), `name` and `tool_call_id`.
    tools: JSON schemas of the functions that may be called.
    trained: positions of the assistant's messages that are trained.
    ends_empty: whether the last message is an assistant's that would be trained, but says nothing.
    """

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] = ()
    trained: tuple[int, ...] = ()
    ends_empty: bool = False


def conversation(row: Mapping[str, object], *, train_turns: Turns = "all") -> Conversation:
    """Read the conversation of a row.

    train_turns: `all` trains every assistant turn that no key of its own (`weight`, `loss`, `train`, `masked`)
        excludes, `last` the last of these alone. Turns without text, reasoning or calls are never trained.

    Raises:
        TemplateError: if there are no messages, one of them cannot be read, or a column beside them is not a part.
    """
    turns, first_trained = turns_of_row(row)
    messages: list[Message] = []
    wanted: list[int] = []
    ends_empty = False
    for number, turn in enumerate(turns, 1):
        message, trains = _message(turn, number)
        previous = messages[-1] if messages else None
        if "tool_calls" in message and previous and _continues(previous, message, turn):
            previous["tool_calls"] = [*previous.get("tool_calls", []), *message["tool_calls"]]
            continue
        asked = message["role"] == "assistant" and trains and number > first_trained
        ends_empty = asked and not _says_something(message)
        if asked and not ends_empty:
            wanted.append(len(messages))
        messages.append(message)
    shift = _add_system(row, messages)
    check_nothing_is_left_out(row, messages, by="the chat template")
    wanted = [index + shift for index in wanted]
    return Conversation(
        messages=tuple(compose(messages)),
        tools=tuple(compose([tool for name in ("tools", "functions") for tool in _tools(row.get(name), name)])),
        trained=tuple(wanted[-1:] if train_turns == "last" else wanted),
        ends_empty=ends_empty,
    )


def _continues(previous: Message, message: Message, turn: Mapping[str, Any]) -> bool:
    """Whether a turn of ShareGPT's role `function_call` belongs to the assistant's message before it."""
    raw = str(turn.get("role") or turn.get("from") or "").lower()
    return _ROLES.get(raw, raw) == "function_call" and previous["role"] == "assistant"


def _says_something(message: Message) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content"))


def _add_system(row: Mapping[str, object], messages: list[Message]) -> int:
    """Put the column `system` in front, where the messages do not begin with one; how many messages that adds."""
    added = 0
    for name in SYSTEM:
        value = row.get(name)
        if value in EMPTY or (isinstance(value, str) and not value.strip()):
            continue
        system = text_of_system(value)
        if system is None:
            raise TemplateError(f"the column `{name}` is not text (a {type(value).__name__})")
        if not messages or messages[0]["role"] not in ("system", "developer"):
            messages.insert(0, {"role": "system", "content": system})
            added += 1
        elif messages[0]["content"].strip() != system.strip():
            other = f"the column `{SYSTEM[0]}`" if added else "the first message"
            raise TemplateError(f"the column `{name}` and {other} are two different system prompts; keep one")
    return added


# ---- turns -------------------------------------------------------------------------------------------------------


def _message(turn: Mapping[str, Any], number: int) -> tuple[Message, bool]:
    """One turn in the form that chat templates read, and whether its keys let it be trained."""
    said = [(key, value) for key, value in turn.items() if key not in _TURN_KEYS and value not in EMPTY]
    if unknown := [key for key, value in said if (key, value) not in _SAYING_NOTHING]:
        raise TemplateError(
            f"message {number} has the key {unknown[0]!r}, which would not be trained; remove it, or write what it "
            "holds into the content"
        )
    raw = turn["role"] if turn.get("role") is not None else turn.get("from")
    if not isinstance(raw, str):
        raise TemplateError(f"message {number} has no role")
    role = _ROLES.get(raw.strip().lower(), raw.strip().lower())
    if role not in _KNOWN_ROLES:
        raise TemplateError(
            f"message {number} has the role {raw!r}; roles are system, developer, user, assistant and tool"
        )
    value = turn["content"] if turn.get("content") is not None else turn.get("value")
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(value, number)}, _trains(turn, number)
    message: Message = {"role": role, "content": _text(value, number)}
    calls = turn.get("tool_calls") if turn.get("tool_calls") not in EMPTY else turn.get("function_call")
    if calls not in EMPTY:
        message["tool_calls"] = _calls(calls, number)
    elif value is None and turn.get("reasoning_content") in EMPTY:
        raise TemplateError(f"message {number} has no content")
    reasoning = [_text(turn[key], number) for key in REASONING if turn.get(key) not in EMPTY]
    if len(set(reasoning)) > 1:
        raise TemplateError(
            f"message {number} has two different texts of reasoning; keep one of {', '.join(REASONING)}"
        )
    if reasoning:
        message |= dict.fromkeys(REASONING, reasoning[0])
    message |= {key: turn[key] for key in ("name", "tool_call_id") if turn.get(key) not in EMPTY}
    return message, _trains(turn, number)


def _text(value: object, number: int) -> str:
    """The text of a content: text, or a list of text parts."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    if isinstance(value, (list, tuple)):
        return "".join(_part(part, number) for part in value)
    raise TemplateError(f"message {number} has a content that is not text (a {type(value).__name__})")


def _part(part: object, number: int) -> str:
    if (text := text_of_part(part)) is not None:
        return text
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise TemplateError(f"message {number} has a part of type {kind!r}; {ONLY_TEXT}, so leave such rows out")


def _trains(turn: Mapping[str, Any], number: int) -> bool:
    """Whether `weight`, `loss`, `train` and `masked` let a turn be trained."""
    given = {key: turn[key] for key in _SWITCHES if turn.get(key) is not None}
    for key, value in given.items():
        if value not in (0, 1):
            raise TemplateError(f"message {number} has {key} {value}; it can be 0 (not trained) or 1")
    return all(bool(value) != (key == "masked") for key, value in given.items())


# ---- tools -------------------------------------------------------------------------------------------------------


def _tools(value: object, name: str) -> Sequence[Any]:
    """Tools as a server gets them, {"type": "function", "function": ...}; ShareGPT and `functions` have them bare."""
    tools = parsed(value)
    if tools in EMPTY:
        return ()
    tools = [tools] if isinstance(tools, Mapping) else tools
    if not isinstance(tools, (list, tuple)):
        raise TemplateError(f"the column `{name}` is not a list of tools, nor JSON text of one")
    return [wrapped for tool in tools for wrapped in _wrapped(parsed(tool))]


def _wrapped(tool: Any) -> Iterator[Any]:
    declared = tool.get("functionDeclarations") if isinstance(tool, Mapping) else None
    if isinstance(declared, (list, tuple)):  # Gemini's
        for function in declared:
            yield from _wrapped(function)
        return
    if not isinstance(tool, Mapping) or not isinstance(tool.get("name"), str) or "function" in tool:
        yield tool
        return
    function = {key: value for key, value in tool.items() if key not in ("type", "input_schema", "cache_control")}
    if "input_schema" in tool:  # Anthropic's
        yield {"type": "function", "function": {**function, "parameters": tool["input_schema"]}}
    else:
        yield {"type": "function", "function": function} if tool.get("type", "function") == "function" else tool


def _calls(value: object, number: int) -> list[dict[str, Any]]:
    """Calls of functions, from OpenAI's form, a bare {"name", "arguments"}, a list, or JSON text of these."""
    calls = parsed(value)
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, (list, tuple)) or not calls:
        raise TemplateError(
            f"message {number} calls a tool, and its call is not a JSON object with a name and arguments"
        )
    return [_call(parsed(call), number) for call in calls]


def _call(call: Any, number: int) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise TemplateError(f"message {number} calls a tool without a name")
    arguments = parsed(function.get("arguments", function.get("parameters", {})))
    arguments = {} if arguments in EMPTY else arguments
    if isinstance(arguments, Mapping):  # Arrow gives every object the keys of all: those of other calls are None
        arguments = {key: value for key, value in arguments.items() if value is not None}
    out = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return ({"id": call["id"]} | out) if call.get("id") else out
