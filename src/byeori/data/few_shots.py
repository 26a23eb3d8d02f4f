"""A prompt with finished rows in front of it: what a model does that is shown the task instead of trained on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from byeori.data import chat
from byeori.data.tokenize import Encoding, encode_prompt, encode_row

Row = Mapping[str, Any]


def encode_with_shots(row: Row, shots: Sequence[Row], encoding: Encoding) -> list[int]:
    """Return the token ids of a row's prompt after `shots`, each of which has an answer.

    By a template the shots stand one after the other, parted by an empty line; in a chat each is a question and an
    answer before the row's first question.

    Raises:
        TemplateError: as `encode_prompt`.
    """
    if encoding.template is None:
        return encode_prompt(_chat(row, shots), encoding)
    between = encoding.encoder.ids("\n\n")
    ids = list(encoding.prefix)
    for shot in shots:
        example = encode_row(shot, encoding).token_ids
        ended = len(example) - (encoding.eos is not None and example[-1] == encoding.eos)
        ids += [*_bare(example[:ended], encoding), *between]
    return [*ids, *_bare(encode_prompt(row, encoding), encoding)]


def _bare(ids: Sequence[int], encoding: Encoding) -> Sequence[int]:
    size = len(encoding.prefix)
    return ids[size:] if size and tuple(ids[:size]) == encoding.prefix else ids


def _chat(row: Row, shots: Sequence[Row]) -> dict[str, Any]:
    """Return a conversation with the last question and answer of each shot behind its system message."""
    asked = chat.until_last_answer(row)
    messages: Any = asked["messages"]
    first = next((at for at, turn in enumerate(messages) if turn["role"] != "system"), len(messages))
    pairs: list[Any] = []
    for shot in shots:
        told: Any = chat.until_last_answer(shot)["messages"]
        pairs += [turn for turn in told if turn["role"] in ("user", "assistant")][-2:]
    return {**asked, "messages": [*messages[:first], *pairs, *messages[first:]]}
