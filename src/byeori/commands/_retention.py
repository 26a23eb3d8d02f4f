"""`--retention FILE`: does the tuned model still know what the base knew? The loss of both on general rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from byeori.artifacts import saved_model
from byeori.artifacts.saved_model import SavedModel
from byeori.data import row_kinds, sources, template
from byeori.data.sources import ROW
from byeori.data.tokenize import Example
from byeori.evaluate import compare as comparison
from byeori.evaluate.generate import OpenEngine
from byeori.evaluate.verdict import retention_sentence
from byeori.support import console
from byeori.support.journal import Journal


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneralRows:
    """Rows of another kind than was trained. names: what messages call them. examples: of each row its answer."""

    names: Sequence[str] = ()
    examples: Sequence[list[Example]] = ()

    def measure(self, open_engine: OpenEngine, journal: Journal, metrics: dict[str, Any]) -> dict[str, Any]:
        """Return the numbers of a comparison with those of these rows under `retention`, and a sentence about them."""
        if not self.examples:
            return metrics
        found = comparison.losses_of(open_engine, self.examples, self.names, journal, console.progress)
        said = {"name": "retention", "sentence": retention_sentence(found), "undermines": False}
        return metrics | {"retention": found, "findings": [*metrics["findings"], said]}


def general_rows(path: str | None, saved: SavedModel, policy: str) -> GeneralRows:
    """Read the rows, by the adapter's template if it fits their columns, else by the built-in one that does.

    policy: what is done with rows without a prompt or an answer, stop or drop.

    Raises:
        DataError, TemplateError: if they cannot be read.
    """
    if path is None:
        return GeneralRows()
    table = sources.load_rows([path])
    own = saved_model.template_of(saved, None)
    columns = table.rows.column_names
    fits = own is not None and not own.lacking(columns, with_answer=True)
    row_kind = row_kinds.ANSWER
    chosen = own if fits else template.resolve(row_kind.choose_template(table.rows))
    row_kind.check_columns(columns, chosen)
    encoding = saved_model.encoding(saved, chosen, **({"cutoff_len": saved.max_length} if saved.max_length else {}))
    rows = comparison.comparable_rows(table, encoding, row_kind, policy)
    _, examples = comparison.examples_of(rows, encoding, row_kind)
    return GeneralRows(names=[table.name(row[ROW]) for row in rows], examples=examples)
