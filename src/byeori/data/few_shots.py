"""A prompt with finished rows in front of it: what a model does that is shown the task instead of trained on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from byeori.data import chat
from byeori.data.tokenize import Encoding, encode_prompt, encode_row

Row = Mapping[str, Any]


def encode_with_shots(
    rows: Sequence[Row], prompts: Sequence[Sequence[int]], shots: Sequence[Row], encoding: Encoding
) -> list[list[int]]:
    """Return the token ids of each row's prompt after `shots`, each of which has an answer.

    By a template the shots stand one after the other, parted by an empty line; in a chat each is a question and an
    answer before the row's first question. prompts: those of the rows alone (see `encode_prompt`).

    Raises:
        TemplateError: as `encode_prompt`.
    """
    if encoding.template is None:
        turns = [turn for shot in shots for turn in _asked_and_answered(shot)]
        return [encode_prompt(_chat(row, turns), encoding) for row in rows]
    between = encoding.encoder.ids("\n\n")
    before = list(encoding.prefix)
    for shot in shots:
        example = encode_row(shot, encoding).token_ids
        ended = len(example) - (encoding.eos is not None and example[-1] == encoding.eos)
        before += [*_bare(example[:ended], encoding), *between]
    return [[*before, *_bare(prompt, encoding)] for prompt in prompts]


def _bare(ids: Sequence[int], encoding: Encoding) -> Sequence[int]:
    size = len(encoding.prefix)
    return ids[size:] if size and tuple(ids[:size]) == encoding.prefix else ids


def _asked_and_answered(shot: Row) -> list[Any]:
    """Return the last question and answer of a conversation."""
    told: Any = chat.until_last_answer(shot)["messages"]
    return [turn for turn in told if turn["role"] in ("user", "assistant")][-2:]


def _chat(row: Row, turns: Sequence[Any]) -> dict[str, Any]:
    """Return a conversation with turns of others behind its system message."""
    asked = chat.until_last_answer(row)
    messages: Any = asked["messages"]
    first = next((at for at, turn in enumerate(messages) if turn["role"] != "system"), len(messages))
    return {**asked, "messages": [*messages[:first], *turns, *messages[first:]]}
