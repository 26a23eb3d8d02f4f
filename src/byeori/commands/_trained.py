"""The rows that an adapter was trained on, if their tables are still here: what a comparison holds against them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from byeori.artifacts import saved_model
from byeori.artifacts.saved_model import SavedModel
from byeori.commands._rows import with_template_columns
from byeori.data import near_copies, places, row_kinds, sources
from byeori.data.row_kinds import RowKind
from byeori.data.sources import ROW, Table
from byeori.data.template import Template
from byeori.errors import ByeoriError, TemplateError
from byeori.evaluate import compare as comparison

if TYPE_CHECKING:
    from datasets import Dataset

_ANSWERS = 20_000  # rows among which the most frequent answer is looked for
_COPIES = 200_000  # rows among which near copies are looked for


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """rows: without those that were held out. table: all of them. columns: those that the run read."""

    rows: Dataset
    table: Table
    row_kind: RowKind
    template: Template | None
    columns: list[str]

    def among(self, table: Table) -> np.ndarray:
        """Return which rows of a table [rows] were trained on, comparing the columns that the run read."""
        common = [name for name in self.columns if name in table.rows.column_names]
        if not common:
            return np.zeros(len(table.rows), dtype=bool)
        return np.isin(sources.hashes(table.rows, common), sources.hashes(self.rows, common))

    def answers(self) -> list[str]:
        """Return the answers of the rows, of many the first."""
        found = []
        for row in self.rows.select(range(min(len(self.rows), _ANSWERS))):
            try:
                asked = self.row_kind.asked(row, self.template)
                found.append(comparison.reference_of(asked, self.template))
            except (TemplateError, KeyError, IndexError):  # a row that the run dropped
                continue
        return found

    def near(
        self, items: Sequence[Mapping[str, Any]], template: Template | None, on_progress: near_copies.OnProgress
    ) -> list[int]:
        """Return the indices of the items whose input is a near copy of a row's, equal ones too.

        template: that of the items. Inputs with different numbers ask different things.
        """
        texts = []
        for row in self.rows.select(range(min(len(self.rows), _COPIES))):
            try:
                item = comparison.texts_of(row, self.row_kind.asked(row, self.template), self.template)
            except (TemplateError, KeyError, IndexError):  # a row that the run dropped
                continue
            texts.append(comparison.input_of(item, self.template))
        asked = [comparison.input_of(item, template) for item in items]
        pairs = near_copies.pairs(texts, asked, on_progress)
        return sorted({item for row, item, _ in pairs if near_copies.same_numbers(texts[row], asked[item])})

    def shots(self, table: Table, count: int, seed: int) -> list[Mapping[str, Any]]:
        """Return rows to put into a prompt, none of them a row of `table`."""
        common = [name for name in self.columns if name in table.rows.column_names]
        if not common:
            return []
        there = np.isin(sources.hashes(self.rows, common), sources.hashes(table.rows, common))
        chosen = np.random.default_rng(seed).permutation(np.flatnonzero(~there))
        found: list[Mapping[str, Any]] = []
        for index in chosen[: 10 * count]:
            row = self.rows[int(index)]
            try:
                found.append(self.row_kind.asked(row, self.template))
            except TemplateError:
                continue
        return found[:count]


def rows_of(saved: SavedModel) -> Trained | None:
    """Return the rows that an adapter was trained on.

    None if the tables of the run are not here any more, or cannot be split as they were.
    """
    run = saved.settings
    if not places.are_local(run.get("data_path") or []):
        return None
    try:
        template = saved_model.template_of(saved, None)
        row_kind = row_kinds.recorded(run)
        table = with_template_columns(sources.load_recorded(run), row_kind, template)
        columns = row_kind.columns_read(table.rows.column_names, template)
        rows, _ = sources.split_rows(table.rows, run["val_set_size"], run["seed"], columns)
    except (ByeoriError, KeyError):
        return None
    return Trained(rows=rows, table=table, row_kind=row_kind, template=template, columns=columns)


def indices(trained: Trained | None, table: Table, rows: list[dict[str, Any]]) -> list[int]:
    """Return the indices of the rows, which are some of a table's, that were trained on."""
    if trained is None:
        return []
    return [int(index) for index in np.flatnonzero(trained.among(table)[[row[ROW] for row in rows]])]
