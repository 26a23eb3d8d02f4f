"""Rows of KTO: one answer each, and a label that says whether it is good."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

from byeori.data import preference
from byeori.data.row_kinds import ANSWER
from byeori.data.template import resolve
from byeori.data.unpaired import check_labels
from byeori.errors import TemplateError

ROW = {"prompt": "Q", "completion": "A"}
TALK = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}


def check(template: str | None, *rows: dict[str, Any]) -> None:
    table = datasets.Dataset.from_list(list(rows))
    check_labels(table, ANSWER.columns_read(table.column_names, resolve(template) if template else None))


@pytest.mark.parametrize(
    ("row", "label", "template"),
    [
        (ROW, "label", "prompt-completion"),  # TRL, Axolotl
        (TALK, "kto_tag", None),  # LLaMA-Factory
        ({"instruction": "I", "input": "", "output": "O"}, "kto_tag", "alpaca"),
        (ROW, "label", "{prompt}\n{completion}"),
    ],
)
@pytest.mark.parametrize(("good", "bad"), [(True, False), (1, 0), ("True", "False"), ("1", "0")])
def test_bad_answers_are_not_trained(
    row: dict[str, Any], label: str, template: str | None, good: Any, bad: Any
) -> None:
    with pytest.raises(TemplateError) as caught:
        check(template, row | {label: good}, row | {label: bad})
    assert str(caught.value).startswith(
        "these rows have one answer each and a label that says whether it is good (KTO): sft would train the answers "
        f"whose '{label}' is false as well"
    )
    check(template, row | {label: good}, row | {label: good})


def test_other_labels() -> None:
    check("prompt-completion", ROW | {"label": "sports"}, ROW | {"label": "false"})
    check("prompt-completion", ROW | {"label": 7}, ROW | {"label": 0})
    check("{prompt} {completion} {label}", ROW | {"label": "true"}, ROW | {"label": "false"})
    check("{text}\n{label}", {"text": "T", "label": "0"}, {"text": "T", "label": "1"})


def test_dpo_names_the_real_reason() -> None:
    with pytest.raises(TemplateError) as caught:
        preference.check_columns(["prompt", "completion", "label"])
    assert str(caught.value) == (
        "these rows have one answer each and a label that says whether it is good (KTO), and dpo needs `chosen` and "
        "`rejected`: join a good and a bad answer to one row"
    )
