"""Rows of one answer and a label that says whether it is good (KTO), whose bad answers SFT must not train."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from byeori.data import chat_columns
from byeori.errors import TemplateError

if TYPE_CHECKING:
    from datasets import Dataset

_LABELS = ("label", "kto_tag")  # TRL and Axolotl, LLaMA-Factory
_GOOD, _BAD = {"true", "1", "1.0"}, {"false", "0", "0.0"}
UNPAIRED = "these rows have one answer each and a label that says whether it is good (KTO)"


def label_column(columns: Sequence[str]) -> str | None:
    """Return the column that says whether the answer of a row is good, of a table that may have one."""
    found = next((name for name in _LABELS if name in columns), None)
    return found if chat_columns.has_conversation(columns) else None


def check_labels(rows: Dataset, read: Collection[str]) -> None:
    """Raise if a column that is not trained says that some answers are bad. read: the columns that become tokens.

    Raises:
        TemplateError: if SFT would train answers that the table calls bad.
    """
    label = label_column(rows.column_names)
    if label is None or label in read:
        return
    import pyarrow.compute as pc

    values = rows.select_columns(label).with_format("arrow")[:].column(label)
    known = {str(value).lower() for value in pc.unique(values).to_pylist() if value is not None}
    if known <= _GOOD | _BAD and known & _BAD:
        raise TemplateError(
            f"{UNPAIRED}: sft would train the answers whose {label!r} is false as well; keep the rows with a good "
            "answer, or make pairs with `chosen` and `rejected` of them for `byeori dpo`"
        )
