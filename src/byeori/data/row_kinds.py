"""Kinds of rows: the columns that a row needs, the examples it makes and the function that makes them.

An objective names the kind of row it trains on (losses/base.py), and a run records the name in byeori.yaml. A kind of
row that byeori does not have is a `RowKind` of your own, given to `commands.train.train` with the objective.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from byeori.data import chat, chat_columns, documents, pair_answers, preference, template
from byeori.data.rendered_text import rendered_turns
from byeori.data.template import Template
from byeori.data.tokenize import Encoding, Example, encode_row, encode_turns
from byeori.errors import TemplateError

if TYPE_CHECKING:
    from datasets import Dataset

_GLANCE = 1000  # rows whose values help to choose the template

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowKind:
    """What a row of one kind holds and becomes.

    name: as an objective names it and byeori.yaml records it. command: of byeori, that trains such rows.
    sides: the names of a row's examples, in their order; consecutive examples of a row are never parted.
    answer_columns: the columns that hold the answers; empty if the template names the one answer column.
    chat_columns: a table's columns -> those that are read where the tokenizer's chat template writes the row.
    check_columns: raises TemplateError unless a table has the columns that the kind and the template need.
    choose_template: a table -> the name of the built-in template that fits its columns.
    encode: a row -> its examples, one for each side. Raises TemplateError if the row cannot be trained.
    asked: a row and the template -> the row with the one answer that a generated answer is compared with.
    """

    name: str
    command: str
    sides: tuple[str, ...]
    answer_columns: tuple[str, ...]
    chat_columns: Callable[[Sequence[str]], set[str]]
    check_columns: Callable[[Sequence[str], Template | None], None]
    choose_template: Callable[[Dataset], str]
    encode: Callable[[Row, Encoding], list[Example]]
    asked: Callable[[Row, Template | None], dict[str, Any]]

    @property
    def examples(self) -> int:
        """How many examples a row makes."""
        return len(self.sides)

    def columns_read(self, columns: Sequence[str], chosen: Template | None) -> list[str]:
        """Return those of a table's columns, in its order, that become tokens. Rows equal there are the same row."""
        read = self.columns_wanted(columns, chosen)
        return [name for name in columns if name in read]

    def columns_wanted(self, columns: Sequence[str], chosen: Template | None) -> set[str]:
        """Return the columns that become tokens, and those that would if the table had them."""
        if chosen is None:
            return self.chat_columns(columns)
        answers = [pair_answers.column_of(columns, side) for side in self.answer_columns]
        return {*chosen.prompt_columns, *(answers or [chosen.answer_column])}

    def lacking(self, columns: Sequence[str], chosen: Template) -> list[str]:
        """Return the columns that a template needs and a table does not have."""
        if self.answer_columns:
            return preference.lacking(columns, chosen)
        return chosen.lacking(list(columns), with_answer=True)


def _check_answer(columns: Sequence[str], chosen: Template | None) -> None:
    if chosen is None:
        chat.check_columns(list(columns))
    else:
        chosen.check_columns(list(columns), with_answer=True)


def _check_preference(columns: Sequence[str], chosen: Template | None) -> None:
    for column in preference.lacking(columns, chosen) if chosen else ():
        raise TemplateError(template.unknown_column(column, columns))
    preference.check_columns(columns)


def _choose(rows: Dataset) -> str:
    first = rows.select(range(min(len(rows), _GLANCE)))
    if any(map(chat_columns.needs_chat, first)) and chat_columns.has_conversation(rows.column_names):
        return template.CHAT
    try:
        return template.choose(rows.column_names, texts=chat_columns.plain_columns(first))
    except TemplateError:
        if "text" in rows.column_names and all(rendered_turns(row["text"]) for row in first):
            return template.CHAT
        raise


def _encode_answer(row: Row, encoding: Encoding) -> list[Example]:
    if encoding.template is None:
        return encode_turns(row, encoding)
    _check_nothing_is_left_out(row, encoding.template)
    return [encode_row(row, encoding)]


def _encode_pair(row: Row, encoding: Encoding) -> list[Example]:
    if encoding.template is not None:
        _check_nothing_is_left_out(row, encoding.template)
    return preference.encode_pair(row, encoding)


def _check_nothing_is_left_out(row: Row, chosen: Template) -> None:
    """A template of the user's own may leave out what it likes; a built-in one did not know the column."""
    if chosen.name in _built_in():
        read = [*chosen.prompt_columns, chosen.answer_column]
        said = [row.get(name) for name in (*read, *preference.SIDES)]
        chat_columns.check_nothing_is_left_out(row, said, by=f"the template {chosen.name}", read=read)


@cache
def _built_in() -> frozenset[str]:
    return frozenset(template.shipped())


def _asked(row: Row, chosen: Template | None) -> dict[str, Any]:
    return dict(row) if chosen else chat.until_last_answer(row)


def _asked_chosen(row: Row, chosen: Template | None) -> dict[str, Any]:
    return preference.side_row(row, "chosen", chosen)


ANSWER = RowKind(
    name="answer",
    command="sft",
    sides=("answer",),
    answer_columns=(),
    chat_columns=chat_columns.columns_read,
    check_columns=_check_answer,
    choose_template=_choose,
    encode=_encode_answer,
    asked=_asked,
)
"""A prompt and its answer, or a conversation."""

PREFERENCE = RowKind(
    name="preference",
    command="dpo",
    sides=preference.SIDES,
    answer_columns=preference.SIDES,
    chat_columns=preference.columns_read,
    check_columns=_check_preference,
    choose_template=preference.choose,
    encode=_encode_pair,
    asked=_asked_chosen,
)
"""A prompt with a chosen and a rejected answer."""

DOCUMENT = RowKind(
    name="document",
    command="sft",
    sides=("piece",),
    answer_columns=(),
    chat_columns=chat_columns.columns_read,
    check_columns=_check_answer,
    choose_template=_choose,
    encode=documents.encode_document,
    asked=_asked,
)
"""A text, all of which is trained in pieces."""

ROW_KINDS = {kind.name: kind for kind in (ANSWER, PREFERENCE, DOCUMENT)}


def for_text(kind: RowKind, text_column: str | None) -> RowKind:
    """Return the kind of rows that are trained: documents, if a column of text is named."""
    return DOCUMENT if text_column else kind


def of_table(columns: Sequence[str], chosen: Template | None) -> RowKind:
    """Return the kind of a table's rows: preference, unless the template names a column of theirs as the answer."""
    own = chosen is not None and chosen.answer_column in columns
    return PREFERENCE if preference.is_pairs(columns) and not own else ANSWER


def recorded_name(settings: Mapping[str, Any]) -> str:
    """Return the kind of row that a run recorded with its settings; older runs have a loss where they had pairs."""
    return str(settings.get("row_kind") or (PREFERENCE if "loss" in settings else ANSWER).name)


def recorded(settings: Mapping[str, Any]) -> RowKind:
    """Return the kind of row of a run's settings; answer for a kind that is not byeori's own."""
    return ROW_KINDS.get(recorded_name(settings), ANSWER)
