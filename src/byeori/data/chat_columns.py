"""The columns that a row's conversation stands in, and the turns in them.

    {"instruction": "I", "input": "X", "output": "O", "history": [["Q", "A"]]}  -> user Q | assistant A | user I\\nX | O

What the columns are called comes from the formats of OpenAI, ShareGPT, LLaMA-Factory, Axolotl, TRL and HH-RLHF.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from byeori.data.message_forms import ITEMS, Turn, turns_in_one_form
from byeori.data.rendered_text import hh_turns, rendered_turns
from byeori.errors import TemplateError

COLUMNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "contents")
"""Columns of a row that may hold the messages; the first that holds some is read."""
SYSTEM = ("system", "system_prompt", "systemInstruction", "system_instruction")
"""Columns that may hold the system message."""
CONTEXT_COLUMNS = (*SYSTEM, "tools", "functions")
"""Columns beside the messages that belong to the conversation."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names of the reasoning before an answer, as a key of a message or as a column beside a single answer."""
EMPTY: tuple[object, ...] = (None, "", "[]", "{}", [], {})
"""Values of a column that hold nothing."""

_ASKED = ("prompt", "instruction", "question", "query", "input")
_ANSWERED = ("completion", "output", "answer", "response", "generation")
_SINGLE = (*_ASKED, *_ANSWERED, "history", *REASONING)
_MESSAGES = COLUMNS[:2]  # whose text is that of messages; the others may be called so and hold plain text
# what a question is about or chooses from, and answers that are better than the one beside them (Axolotl's names)
_BESIDE = ("context", "article", "passage", "choices", "options", "reflection", "corrected", "revision")
_CALLS, _MEDIA = ("tool_calls", "function_call"), ("image", "images", "video", "videos", "audio", "audios")
ONLY_TEXT = "byeori trains text alone, also on models that see images"
CARRYING = (*COLUMNS, *CONTEXT_COLUMNS, *_ASKED, "history", *REASONING, *_CALLS, *_MEDIA, *_BESIDE)
"""Columns that look as if the model should see them: a row whose example lacks them is refused."""
_OBJECTS = re.compile(r"\s*\[?\s*\{\s*['\"]")


def parsed(value: object) -> Any:
    """Return JSON text of a list or an object as that, and Python's, which pandas writes; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return _literal(value)
    return value


def _literal(text: str) -> Any:
    """Python's text of a list of objects, or of one; other text as it is."""
    if not _OBJECTS.match(text):
        return text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # "\d" in a text
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def is_turns(value: object) -> bool:
    """Return whether a value is a list of turns with roles, JSON text of one, or HH-RLHF's text."""
    turns = parsed(value)
    listed = (
        isinstance(turns, (list, tuple)) and bool(turns) and all(map(_is_turn, turns)) and any(map(_has_role, turns))
    )
    return listed or bool(hh_turns(value))


def _has_role(turn: Turn) -> bool:
    return any(isinstance(turn.get(key), str) for key in ("role", "from"))


def _is_turn(turn: object) -> bool:
    return isinstance(turn, Mapping) and (_has_role(turn) or turn.get("type") in ITEMS)


def list_of_turns(value: object, name: str) -> list[Turn]:
    """Return the turns that the column `name` holds.

    Raises:
        TemplateError: if it holds something else.
    """
    turns = hh_turns(value) or parsed(value)
    if not (isinstance(turns, (list, tuple)) and turns and all(isinstance(turn, Mapping) for turn in turns)):
        raise TemplateError(f"the column `{name}` is not a list of turns with a role and a text each")
    return list(turns_in_one_form(turns))


def turns_of_row(row: Mapping[str, object]) -> tuple[list[Turn], int]:
    """Return the turns of a row, and how many of them are a prompt that is never trained.

    Raises:
        TemplateError: if no column holds any.
    """
    if name := _talk(row):
        return list_of_turns(row[name], name), 0
    asked, answered = (_first(row, names) for names in (_ASKED, _ANSWERED))
    turns, fixed = question_of_row(row), 0
    if answered and is_turns(row[answered]):
        fixed, turns = len(turns), [*turns, *list_of_turns(row[answered], answered)]
    elif asked and _is_calls(row):
        turns = [*turns, {"role": "assistant", "content": "", "tool_calls": row["answers"]}]
    elif answered and asked:
        fixed = len(turns) if is_turns(row[asked]) else 0
        reasoning = {name: row[name] for name in REASONING if row.get(name) not in EMPTY}
        turns = [*turns, {"role": "assistant", "content": row[answered], **reasoning}]
    turns = turns or rendered_turns(row.get("text"))
    if not turns:
        raise TemplateError("the column `messages` is empty or not a list of turns with a role and a text each")
    return turns, fixed


def _is_calls(row: Mapping[str, object]) -> bool:
    """Return whether `answers` are calls of the row's tools, as in xLAM's data."""
    calls = parsed(row.get("answers")) if row.get("tools") not in EMPTY else None
    return (
        isinstance(calls, list)
        and bool(calls)
        and all(isinstance(call, Mapping) and call.get("name") for call in calls)
    )


def question_of_row(row: Mapping[str, object]) -> list[Turn]:
    """Return the turns before the answer, of a row whose columns hold one question: with its history and its input."""
    name = _talk(row) or _first(row, _ASKED)
    if name is None:
        return []
    if name in COLUMNS or is_turns(row[name]):
        turns = list_of_turns(row[name], name)
    else:
        parts = [row[name], row.get("input") if name != "input" else None]
        text = "\n".join(str(part) for part in parts if part not in EMPTY)  # as LLaMA-Factory joins them
        turns = [{"role": "user", "content": text}]
    return [*_history(row.get("history")), *turns]


def needs_chat(row: Mapping[str, object]) -> bool:
    """Return whether a row's question is messages, or has more beside it than built-in templates have a place for."""
    asked = _first(row, _ASKED)
    beside = ["history", "tools", "functions", *SYSTEM[1:], *REASONING]
    beside += ["system"] if asked == "prompt" else []
    beside += ["input"] if asked not in ("instruction", "input") else []
    if asked is None:
        return False
    return any(parsed(row.get(name)) not in EMPTY for name in beside) or is_turns(row[asked])


def _talk(row: Mapping[str, object]) -> str | None:
    """The column of the messages. SAMSum's `dialogue` and others of that name may be plain text."""
    held = [name for name in COLUMNS if row.get(name) not in EMPTY]
    return next((name for name in held if name in _MESSAGES or not is_plain(row[name])), None)


def is_plain(value: object) -> bool:
    """Return whether a value is text, and not that of a list of turns."""
    return isinstance(value, str) and not is_turns(value)


def plain_columns(rows: Iterable[Mapping[str, object]]) -> set[str]:
    """Return the columns that are called as those of messages are, and hold plain text in all of these rows."""
    values = [{name: row[name] for name in COLUMNS if row.get(name) not in EMPTY} for row in rows]
    names = {name for found in values for name in found}
    return {name for name in names if name not in _MESSAGES and all(is_plain(found.get(name, "")) for found in values)}


def _first(row: Mapping[str, object], names: Iterable[str]) -> str | None:
    return next((name for name in names if row.get(name) not in EMPTY), None)


def _history(value: object) -> Iterator[Turn]:
    """Turns from LLaMA-Factory's `history`: pairs of a question and its answer, or messages."""
    turns = parsed(value)
    for turn in () if turns in EMPTY else turns:
        if isinstance(turn, Mapping):
            yield turn
        elif isinstance(turn, (list, tuple)) and len(turn) == 2:
            yield from ({"role": role, "content": text} for role, text in zip(("user", "assistant"), turn, strict=True))
        else:
            raise TemplateError("the column `history` is not a list of pairs, a question and its answer each")


# ---- which columns, and what they leave out ----------------------------------------------------------------------


def has_conversation(columns: Sequence[str]) -> bool:
    """Return whether a table has columns that a conversation can be read from."""
    if set(COLUMNS) & set(columns) or {"answers", "tools"} <= set(columns):
        return True
    return all(set(names) & set(columns) for names in (_ASKED, _ANSWERED))


def has_question(columns: Sequence[str]) -> bool:
    """Return whether a table has columns that the turns before an answer can be read from."""
    return bool({*COLUMNS, *_ASKED} & set(columns))


def columns_read(columns: Sequence[str]) -> set[str]:
    """Return those of a table's columns that its conversations are made of."""
    single = set(_SINGLE)
    if "tools" in columns:
        single.add("answers")
    if not set(_ASKED) & set(columns):
        single.add("text")
    return (set(COLUMNS) & set(columns) or single) | set(CONTEXT_COLUMNS)


def check_nothing_is_left_out(
    row: Mapping[str, object], said: object, *, by: str, read: Collection[str] | None = None
) -> None:
    """Raise where a column that carries conversation is neither read nor found in what the row's example says.

    said: messages, or whatever holds all the texts of the example. by: what wrote it, for the message.
    read: the columns that the example is made of; by default those that a conversation is.

    Raises:
        TemplateError: naming the column.
    """
    if read is None:
        first = _talk(row) or _first(row, _ASKED) or ""
        beside = () if first in COLUMNS else ("input", "history", *REASONING)
        read = {*CONTEXT_COLUMNS, first, *beside}
    left = [name for name in CARRYING if name not in read and parsed(row.get(name)) not in EMPTY]
    if not left:
        return
    bare = "".join("".join(texts(said)).split())
    for name in left:
        if not all("".join(part.split()) in bare for part in texts(parsed(row[name]))):
            if name in _MEDIA:
                raise TemplateError(
                    f"the column {name!r} is not text; {ONLY_TEXT}, so leave such rows or the column out"
                )
            raise TemplateError(
                f"the column {name!r} looks like a part of the conversation, and {by} does not use it; remove or "
                "rename the column, or give a --template of your own"
            )


def texts(value: object) -> Iterator[str]:
    """Yield the texts in a value of lists and objects, without roles and types; a value without any as a whole."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key not in ("role", "from", "type", "id", "tool_call_id") and item not in EMPTY:
                yield from texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from texts(item)
    else:
        yield str(value)
