"""Rows with a chosen and a rejected answer -> pairs of Examples with the same prompt tokens.

    question, chosen, rejected ── template ──> question + chosen     chosen   q q q | c c
                                               question + rejected   rejected q q q | r r r r

The template is the one for SFT; its answer column is filled with the chosen, then with the rejected answer. Rows of
messages use the tokenizer's chat template; the last assistant turn is the answer, and only that turn is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from byeori.data import template, tokenize
from byeori.data.conversation import COLUMNS, CONTEXT_COLUMNS, conversation
from byeori.data.template import Segment, Template
from byeori.data.tokenize import Encoding, Example
from byeori.errors import TemplateError
from byeori.support.suggestions import nearest

if TYPE_CHECKING:
    from datasets import Features

SIDES = ("chosen", "rejected")
_OPENING = ("system", "user", "human")
_SAME = "the chosen and the rejected answer are the same, so there is nothing to prefer"


def choose(features: Features) -> str:
    """Return the name of the template for a table with these columns: `chat` if they hold lists of messages.

    Raises:
        TemplateError: if a row has no pair of answers, or no built-in template fits the prompt's columns.
    """
    from datasets import Value

    columns = [name for name in features if not name.startswith("__")]
    check_columns(columns)
    if not all(isinstance(features[name], Value) for name in ("chosen", "prompt") if name in features):
        return template.CHAT
    prompts = [name for name in columns if name not in SIDES]
    if not prompts:
        raise TemplateError(
            "there are no columns other than chosen and rejected; add the prompt that they answer as `prompt`"
        )
    return template.choose(prompts, with_answer=False)


def check_columns(columns: list[str]) -> None:
    """Raise TemplateError if the column of an answer is missing."""
    for side in SIDES:
        if side not in columns:
            names = [name for name in columns if not name.startswith("__")]
            raise TemplateError(
                "preference rows need the columns chosen and rejected, and there is no "
                f"{side!r}{nearest(side, names)}; the columns are {', '.join(names)}; rename yours, or train on one "
                "answer per row with `byeori sft`"
            )


def columns_read(columns: Sequence[str]) -> set[str]:
    """Return those of a table's columns that its conversations are made of."""
    prompt = {"prompt", "question"} & set(columns) or set(COLUMNS)
    return prompt | {*CONTEXT_COLUMNS, *SIDES}


def side_row(row: Mapping[str, object], side: str, chosen: Template | None) -> dict[str, object]:
    """Return the row as SFT expects it, with the answer of one side.

    Raises:
        TemplateError: if the answer is empty or not text, or its messages do not end with an assistant turn.
    """
    answer = None if template.is_missing(row[side]) else row[side]
    if chosen is None:
        return {**row, "messages": _conversation(row, answer, side)}
    if answer is not None and not isinstance(answer, str):
        raise TemplateError(template.not_text(side, answer))
    if not answer or not answer.strip():
        raise TemplateError(f"the answer, column {side!r}, is empty")
    return {**row, chosen.answer_column: answer}


def _conversation(row: Mapping[str, object], answer: object, side: str) -> list[dict[str, Any]]:
    """Join system, prompt or question, and an answer, each text or messages, to one conversation.

    An answer whose messages begin with the system or the user is the whole conversation, as in some tables.
    """
    prompt = next((row[name] for name in ("prompt", "question", *COLUMNS) if row.get(name)), None)
    turns = _turns(prompt, "user")
    if isinstance(row.get("system"), str) and str(row["system"]).strip():
        turns = [*_turns(row["system"], "system"), *turns]
    ending = _turns(answer, "assistant")
    whole = bool(ending) and isinstance(ending[0], Mapping) and ending[0].get("role", ending[0].get("from")) in _OPENING
    messages = list(conversation({"messages": ending if whole else [*turns, *ending]}).messages)
    if not ending or messages[-1]["role"] != "assistant" or not conversation({"messages": messages[-1:]}).trained:
        raise TemplateError(f"the answer, column {side!r}, is empty: its messages do not end with an assistant turn")
    return messages


def _turns(value: object, role: str) -> list[Any]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, Mapping):  # LLaMA-Factory's answers are single turns
        return [value]
    return list(value) if isinstance(value, (list, tuple)) else []


def encode_pair(row: Mapping[str, object], encoding: Encoding) -> list[Example]:
    """Return the examples [chosen, rejected]; a prompt that is too long is shortened equally in both.

    Raises:
        TemplateError: as `tokenize.encode_row`, or if the two answers are the same.
        TooLongError: if the row does not fit into cutoff_len.
    """
    filled = [side_row(row, side, encoding.template) for side in SIDES]
    if encoding.template is None:
        pair = [tokenize.encode_turns(side, replace(encoding, train_turns="last"))[-1] for side in filled]
        if pair[0] == pair[1]:
            raise TemplateError(_SAME)
        return pair
    number = int(str(row.get("__row__", 0)))
    sides = [tokenize.row_segments(side, encoding) for side in filled]
    if sides[0] == sides[1]:
        raise TemplateError(_SAME)
    fitted = [tokenize.fit(segments, encoding, number) for segments in sides]
    whole = [len(example.token_ids) + example.shortened for example, _ in fitted]
    while cut := max(example.shortened for example, _ in fitted):
        longer = next(segments for example, segments in fitted if example.shortened == cut)
        fitted = [tokenize.fit(_with_prompt_of(longer, segments), encoding, number) for _, segments in fitted]
    pair = [
        replace(example, shortened=before - len(example.token_ids))
        for (example, _), before in zip(fitted, whole, strict=True)
    ]
    if not all(example.targets for example in pair):
        raise TemplateError(tokenize.NO_TARGETS)
    return pair


def _with_prompt_of(shorter: tuple[Segment, ...], segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
    """Return the segments with the texts of another side's prompt columns."""
    texts = (segment for segment in shorter if segment.column and not segment.trained)
    return tuple(next(texts) if segment.column and not segment.trained else segment for segment in segments)
