"""A row of preferences -> two examples that share their prompt, token for token.

Columns: `chosen` and `rejected` (text, or messages), and whatever the template asks: `question` (and `system`),
`prompt`, ... The template's last column stands for the answer, which is filled with each side in turn. Where the sides
are messages, the last assistant turn is the answer and everything before it is the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from byeori.data import template, tokenize
from byeori.data.template import Segment
from byeori.data.tokenize import Encoding, Example
from byeori.errors import TemplateError

SIDES = ("chosen", "rejected")


def choose(columns: list[str], has_messages: bool) -> str:
    """The shipped template for these columns; `chat` where the sides are messages.

    Raises:
        TemplateError: no chosen or rejected, or no template whose prompt columns are there.
    """
    missing = [side for side in SIDES if side not in columns]
    if missing:
        raise TemplateError(template.unknown_column(missing[0], columns).replace("the template names", "DPO needs"))
    if has_messages:
        return template.CHAT
    for name in ("question-answer", "prompt-completion", "alpaca"):
        found = template.parse(template.shipped()[name], name)
        if set(found.prompt_columns) - found.optional_columns <= set(columns):
            return name
    return template.choose([name for name in columns if name not in SIDES])


def sides_of(row: Mapping[str, Any], how: Encoding) -> tuple[dict[str, Any], dict[str, Any]]:
    """The row as the template sees it, once with each answer."""
    if how.template is not None:
        column = how.template.answer_column
        return {**row, column: row.get("chosen")}, {**row, column: row.get("rejected")}
    chosen, rejected = ({**row, "messages": _turns(row, side)} for side in SIDES)
    return chosen, rejected


def _turns(row: Mapping[str, Any], side: str) -> list[dict[str, str]]:
    """The whole conversation of a side: its own messages, behind those of `prompt` where it has them."""
    answer, prompt = row.get(side), row.get("prompt")
    before = list(prompt) if isinstance(prompt, list) else []
    if isinstance(prompt, str) and not isinstance(answer, list):
        before = [{"role": "user", "content": prompt}]
    after = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
    return [*before, *after]


def encode_pair(row: Mapping[str, Any], how: Encoding) -> tuple[Example, Example]:
    """Chosen and rejected, with the same prompt: shortened, for both, as far as the longer answer asks for.

    Raises:
        TemplateError: a column is missing or no text, an answer is empty, or both are the same.
        TooLongError: the longer answer does not fit into cutoff_len.
    """
    segments = [_answered(side, how) for side in sides_of(row, how)]
    if _answer(segments[0]) == _answer(segments[1]):
        raise TemplateError("chosen and rejected are the same text, so there is nothing to prefer")
    position = int(row.get("__row__", 0))
    fitted = [tokenize.fit(parts, how, position) for parts in segments]
    if any(example.shortened for example, _ in fitted):
        shorter = max(fitted, key=lambda found: found[0].shortened)[1]
        prompt = tuple(part for part in shorter if not part.trained)
        fitted = [tokenize.fit((*prompt, *_trained(parts)), how, position) for parts in segments]
    lost = max(example.shortened for example, _ in fitted)
    chosen, rejected = (replace(example, shortened=lost) for example, _ in fitted)
    return chosen, rejected


def _answered(row: Mapping[str, Any], how: Encoding) -> tuple[Segment, ...]:
    """The row's segments with only the last answer trained: earlier turns of a conversation are prompt."""
    segments = tokenize.row_segments(row, how)
    last = max(index for index, part in enumerate(segments) if part.trained and part.text.strip())
    first = last
    while first and segments[first - 1].trained:
        first -= 1
    return tuple(replace(part, trained=index >= first) for index, part in enumerate(segments))


def _trained(segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
    return tuple(part for part in segments if part.trained)


def _answer(segments: tuple[Segment, ...]) -> str:
    return "".join(part.text for part in _trained(segments))
