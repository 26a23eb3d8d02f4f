"""Rows with a chosen and a rejected answer -> pairs of Examples with the same prompt tokens.

    question, chosen, rejected ── template ──> question + chosen     chosen   q q q | c c
                                               question + rejected   rejected q q q | r r r r

The template is the one for SFT; its answer column is filled with the chosen, then with the rejected answer. Rows of
messages use the tokenizer's chat template; the last assistant turn is the answer, and only that turn is trained.
pair_answers.py reads the two answers and the prompt that both follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from byeori.data import chat_columns, pair_answers, template, tokenize
from byeori.data.pair_answers import SIDES, column_of
from byeori.data.template import Template
from byeori.data.tokenize import Encoding, Example
from byeori.data.unpaired import UNPAIRED, label_column
from byeori.errors import TemplateError
from byeori.support.suggestions import nearest

if TYPE_CHECKING:
    from datasets import Dataset

_GLANCE = 1000  # rows whose values help to choose the template
_SAME = "the chosen and the rejected answer are the same, so there is nothing to prefer"


def choose(rows: Dataset) -> str:
    """Return the name of the template for a table of pairs: `chat` if its first rows hold messages.

    Raises:
        TemplateError: if a row has no pair of answers, or no built-in template fits the prompt's columns.
    """
    columns = [name for name in rows.column_names if not name.startswith("__")]
    check_columns(columns)
    if any(map(pair_answers.is_chat, rows.select(range(min(len(rows), _GLANCE))))):
        return template.CHAT
    read = {column_of(columns, side) for side in SIDES}
    prompts = [name for name in columns if name not in read]
    return template.choose(prompts, with_answer=False) if prompts else pair_answers.IMPLICIT


def is_pairs(columns: Sequence[str]) -> bool:
    """Return whether a table has the columns of both answers."""
    return all(column_of(columns, side) in columns for side in SIDES)


def check_columns(columns: Sequence[str]) -> None:
    """Raise TemplateError if the column of an answer is missing."""
    if not is_pairs(columns) and label_column(columns):
        raise TemplateError(
            f"{UNPAIRED}, and dpo needs `chosen` and `rejected`: join a good and a bad answer to one row"
        )
    several = next((name for name in ("completions", "answers") if name in columns), None)
    if not is_pairs(columns) and several:
        raise TemplateError(
            f"the column {several!r} (as in openbmb/UltraFeedback and Nectar) holds several answers with their scores, "
            "and dpo needs `chosen` and `rejected`: make pairs of them, for example of the best and the worst"
        )
    for side in SIDES:
        if column_of(columns, side) not in columns:
            names = [name for name in columns if not name.startswith("__")]
            raise TemplateError(
                "preference rows need the columns chosen and rejected, and there is no "
                f"{side!r}{nearest(side, names)}; the columns are {', '.join(names)}; rename yours, or train on one "
                "answer per row with `byeori sft`"
            )


def lacking(columns: Sequence[str], chosen: Template) -> list[str]:
    """Return the columns that a template needs for its prompt and a table of pairs does not have."""
    found = {*columns, *(["prompt"] if pair_answers.is_implicit(columns) else [])}
    return chosen.lacking(list(found), with_answer=False)


def columns_read(columns: Sequence[str]) -> set[str]:
    """Return those of a table's columns that its conversations are made of."""
    return chat_columns.columns_read(columns) | {column_of(columns, side) for side in SIDES}


def side_row(row: Mapping[str, object], side: str, chosen: Template | None) -> dict[str, object]:
    """Return the row as SFT expects it, with the answer of one side.

    Raises:
        TemplateError: if the answer is empty or not text, its messages do not end with an assistant turn, or the two
            answers do not follow the same prompt.
    """
    return _sides(row, chosen)[side]


def _sides(row: Mapping[str, object], chosen: Template | None) -> dict[str, dict[str, object]]:
    row = pair_answers.flat(row)
    if chosen is not None:
        return pair_answers.with_texts(row, chosen)
    kept = {name: row[name] for name in ("tools", "functions", "__row__") if name in row}
    return {side: kept | {"messages": messages} for side, messages in pair_answers.conversations(row).items()}


def encode_pair(row: Mapping[str, object], encoding: Encoding) -> list[Example]:
    """Return the examples [chosen, rejected]; a prompt that is too long is shortened equally in both.

    Raises:
        TemplateError: as `tokenize.encode_row` and `side_row`, or if the two answers are the same.
        TooLongError: if the row does not fit into cutoff_len.
    """
    filled = list(_sides(row, encoding.template).values())
    if encoding.template is None:
        pair = [tokenize.encode_turns(side, replace(encoding, train_turns="last"))[-1] for side in filled]
        if pair[0] == pair[1]:
            raise TemplateError(_SAME)
        return pair
    if filled[0] == filled[1]:
        raise TemplateError(_SAME)
    return tokenize.encode_rows(filled, encoding)
