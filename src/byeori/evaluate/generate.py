"""Answer every row of a table: prompts -> an engine -> rows with their answers, nothing of it lost."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from byeori.data import sources, tokenize
from byeori.data.tokenize import Encoding
from byeori.errors import DataError, TemplateError
from byeori.evaluate.engines.base import Answer, Engine, Sampling, Side
from byeori.support.journal import Journal

OpenEngine = Callable[[], Engine]
"""Loads a model when the first row needs it."""


def encode_prompts(
    rows: Sequence[Mapping[str, Any]], encoding: Encoding, row_name: Callable[[int], str]
) -> list[list[int]]:
    """Return the token ids of every row's prompt. row_name: file and line of a row, given its position.

    Raises:
        DataError: if a row has no text for a column of the prompt.
    """
    prompts = []
    for row in rows:
        try:
            prompts.append(tokenize.encode_prompt(row, encoding))
        except TemplateError as error:
            raise DataError(f"{row_name(int(row[sources.ROW]))}: {error}; fix or remove the row") from None
    return prompts


def answer_rows(
    open_engine: OpenEngine,
    rows: Sequence[Mapping[str, Any]],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    column: str,
    journal: Journal,
    on_progress: Callable[[int, int], None],
) -> tuple[list[str], str]:
    """Answer every row; returns the answers, and the rows as jsonl text with the answers in `column`.

    journal: keeps each answer when it is finished. on_progress: called with (rows done, total).
    """
    answer_side(open_engine, prompts, sampling, "tuned", journal, on_progress)
    answers = [str(journal.items[f"tuned {row}"]["text"]) for row in range(len(prompts))]
    columns = [{name: row[name] for name in row if name != sources.ROW} for row in rows]
    text = "".join(json_line({**row, column: answer}) for row, answer in zip(columns, answers, strict=True))
    return answers, text


def answer_side(
    open_engine: OpenEngine,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    side: Side,
    journal: Journal,
    on_progress: Callable[[int, int], None],
    *,
    name: str | None = None,
) -> None:
    """Put one side's answers to all prompts into the journal, as `NAME ROW`; those that it has already stay.

    name: the side by default.
    """
    name = name or side
    missing = {row: ids for row, ids in enumerate(prompts) if f"{name} {row}" not in journal.items}
    done = len(prompts) - len(missing)

    def on_answer(row: int, answer: Answer) -> None:
        nonlocal done
        done += 1
        journal.add(f"{name} {row}", {"text": answer.text, "stopped": answer.stopped, "tokens": answer.tokens})
        on_progress(done, len(prompts))

    if missing:
        open_engine().answers(missing, sampling, side, on_answer)


def json_line(item: Mapping[str, Any]) -> str:
    """Return one line of a jsonl file; dates and other types that JSON lacks become text."""
    return json.dumps(item, ensure_ascii=False, default=str) + "\n"


def answer_column(columns: Sequence[str]) -> str:
    """Return `output`, or `output_2`, ... if the rows already have such a column, as Alpaca's do."""
    names = ("output", *(f"output_{number}" for number in range(2, len(columns) + 3)))
    return next(name for name in names if name not in columns)
