"""Rows of messages -> segments, by the tokenizer's own chat template.

    messages ── chat template ──> <user> why <end> <model> | because <end> | <user> really | ...
                                                             trained

A turn's text is found by rendering the conversation up to it with and without it, so any chat template will do that
keeps what it wrote before and what it was given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from byeori.data.template import Segment
from byeori.errors import TemplateError
from byeori.support.text_files import one_line

COLUMNS = ("messages", "conversations")
"""Columns of a row that are read; the first that holds something."""

_ROLES = {"human": "user", **dict.fromkeys(("gpt", "chatgpt", "model", "bing", "bard"), "assistant")}  # ShareGPT's
_CALLS = ("tool_calls", "function_call")
_NONE: tuple[object, ...] = (None, "", "[]", [], {})
_PROBE = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def segments(row: Mapping[str, object], tokenizer: Any, *, with_answer: bool = True) -> tuple[Segment, ...]:
    """Every assistant turn trained but those of weight 0 and those that are empty, nothing else.

    Raises:
        TemplateError: no messages, no assistant turn, an empty last one, tools, or a chat template that rewrites
            earlier turns or leaves out a part of an answer.
    """
    messages = messages_of(row)
    if not with_answer:
        if messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        return (Segment(text=_render(tokenizer, messages, generation=True), trained=False),)
    trained = _trained_turns(row, messages)
    full, done = _render(tokenizer, messages, generation=False), 0
    out: list[Segment] = []
    for index in trained:
        after = _render(tokenizer, messages[: index + 1], generation=False)
        before = _before(tokenizer, messages[: index + 1], after)
        start, end = len(before), max(len(before), len(after.rstrip()))
        if not (after.startswith(before) and full.startswith(after[:end]) and start >= done):
            raise TemplateError(
                f"the tokenizer's chat template rewrites earlier turns (message {index + 1}), so this conversation "
                "cannot be trained as one row; make each assistant turn the last of a row of its own"
            )
        _check_kept(messages[index]["content"], before, full[start:end], index + 1)
        out.append(Segment(text=full[done:start], trained=False))
        out.append(Segment(text=full[start:end], trained=True))
        done = end
    out.append(Segment(text=full[done:], trained=False))
    return tuple(segment for segment in out if segment.text)


def last_turn_segments(row: Mapping[str, object], tokenizer: Any) -> tuple[Segment, ...]:
    """Rows with `messages` whose last turn, an assistant's, is the answer and alone is trained.

    Raises:
        TemplateError: tools, or a chat template that refuses the messages, rewrites the prompt once it is answered or
            leaves out a part of the answer.
    """
    messages = messages_of(row)
    after = _render(tokenizer, messages, generation=False)
    before = _before(tokenizer, messages, after)
    if not after.startswith(before):
        raise TemplateError("the tokenizer's chat template rewrites the prompt once it is answered")
    end = max(len(before), len(after.rstrip()))
    _check_kept(messages[-1]["content"], before, after[len(before) : end], len(messages))
    parts = ((after[: len(before)], False), (after[len(before) : end], True), (after[end:], False))
    return tuple(Segment(text=text, trained=trained) for text, trained in parts if text)


def turn_end(tokenizer: Any) -> int | None:
    """The token of its own with which the chat template ends an assistant's turn; None where there is none."""
    answer = _probe(tokenizer)
    last = tokenizer(answer, add_special_tokens=False)["input_ids"][-1] if answer else None
    return last if last in tokenizer.added_tokens_decoder else None


def leaves_turns_open(tokenizer: Any) -> bool:
    """Whether the chat template writes no token behind an answer that would tell a model to stop."""
    return bool(_probe(tokenizer)) and turn_end(tokenizer) is None


def _probe(tokenizer: Any) -> str:
    """The text of an assistant's turn; "" without a chat template, or with one for other rows than these."""
    try:
        parts = last_turn_segments(_PROBE, tokenizer) if tokenizer.chat_template else ()
    except TemplateError:
        return ""
    return "".join(part.text for part in parts if part.trained)


# ---- what a row holds --------------------------------------------------------------------------------------------


def check_columns(columns: list[str]) -> None:
    """See whether there are messages.

    Raises:
        TemplateError: there is no column of them.
    """
    if not set(COLUMNS) & set(columns):
        names = ", ".join(name for name in columns if not name.startswith("__"))
        raise TemplateError(
            f"the template `chat` reads the column `messages` (or `conversations`), and the columns are {names}; "
            "choose another template"
        )


def messages_of(row: Mapping[str, object]) -> list[dict[str, str]]:
    """`messages` (role, content) or ShareGPT's `conversations` (from, value), as roles and contents.

    Raises:
        TemplateError: there are none, a turn has no text, or tools are called or offered, which only text can be.
    """
    if row.get("tools") not in _NONE:
        raise TemplateError(
            "the column `tools` offers tools that the prompt would not name; leave such rows out, or drop the column"
        )
    out = []
    for turn in _turns(row):
        if any(turn.get(name) not in _NONE for name in _CALLS):
            raise TemplateError(
                "a turn in `messages` calls a tool (`tool_calls`), which would not be trained; leave such rows out, or "
                "write the call into the turn's content"
            )
        role, content = (
            turn[first] if turn.get(first) is not None else turn.get(second)
            for first, second in (("role", "from"), ("content", "value"))
        )
        if not isinstance(role, str) or not isinstance(content, str):
            raise TemplateError("a turn in `messages` has no role or no text content")
        out.append({"role": _ROLES.get(role, role), "content": content})
    return out


def until_last_answer(row: Mapping[str, object]) -> dict[str, object]:
    """A row with `messages` that ends with the last assistant turn; others as they are."""
    name = next((name for name in COLUMNS if row.get(name)), None)
    if name is None:
        return dict(row)
    messages = messages_of(row)
    last = max((index for index, turn in enumerate(messages) if turn["role"] == "assistant"), default=len(messages))
    return {**row, name: _turns(row)[: last + 1]}


def _turns(row: Mapping[str, object]) -> list[Mapping[str, Any]]:
    turns = next((row[name] for name in COLUMNS if row.get(name)), None)
    if not isinstance(turns, (list, tuple)) or not turns:
        raise TemplateError("the column `messages` is empty or no list of turns")
    if not all(isinstance(turn, Mapping) for turn in turns):
        raise TemplateError("a turn in `messages` has no role or no text content")
    return list(turns)


def _trained_turns(row: Mapping[str, object], messages: list[dict[str, str]]) -> list[int]:
    """Indices of the assistant's turns without those of weight 0 (as OpenAI's rows have it) and those of no text, which
    would teach a model to end its turn at once."""
    weights = [turn.get("weight") for turn in _turns(row)]
    for index, weight in enumerate(weights, start=1):
        if weight not in (None, 0, 1):
            raise TemplateError(f"message {index} has the weight {weight}; it can be 0 (not trained) or 1")
    assistant = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    trained = [index for index in assistant if weights[index] != 0]
    if not any(messages[index]["content"].strip() for index in trained):
        which = "" if trained or not assistant else " with another weight than 0"
        there = "" if assistant else f" (its roles: {', '.join(sorted({turn['role'] for turn in messages}))})"
        raise TemplateError(f"no assistant turn{which} in `messages`, so there is nothing to train{there}")
    if trained[-1] == assistant[-1] and not messages[assistant[-1]]["content"].strip():
        raise TemplateError("the answer, the last assistant turn in `messages`, is empty")
    return [index for index in trained if messages[index]["content"].strip()]


# ---- what the chat template makes of it --------------------------------------------------------------------------


def _before(tokenizer: Any, messages: list[dict[str, str]], after: str) -> str:
    """What the model is given before it writes the last of these messages; `after` is all of them rendered."""
    if len(messages) > 1:
        return _render(tokenizer, messages[:-1], generation=True)
    return after[: max(0, after.find(messages[0]["content"].strip()))]  # many templates render no empty list


def _check_kept(content: str, before: str, answer: str, number: int) -> None:
    """See whether a trained turn holds all of its content; white space may differ, and the prompt may begin it.

    Raises:
        TemplateError: a part of it is gone.
    """
    if content.strip() in answer:
        return
    words, prompt, text = ("".join(part.split()) for part in (content, before, answer))
    if words not in prompt[max(0, len(prompt) - len(words) + 1) :] + text:
        raise TemplateError(
            f"the tokenizer's chat template leaves out a part of the answer (message {number}), as some do with what "
            "stands before </think>; take that part out of the row, or give a --template of your own"
        )


def _render(tokenizer: Any, messages: list[dict[str, str]], *, generation: bool) -> str:
    from jinja2 import TemplateError as JinjaError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation))
    except (JinjaError, TypeError, ValueError, LookupError, AttributeError) as error:
        reason = one_line(error)
        raise TemplateError(f"the tokenizer's chat template refuses these messages: {reason}") from None
