"""What a plain PyTorch loop needs of a run: its rows as tokens, and the loss of one of them."""

from __future__ import annotations

from typing import Any

import torch

from byeori import config
from byeori.commands import _rows as rows
from byeori.data import row_kinds, tokenized
from byeori.data.tokenize import Example
from byeori.distributed import processes


def prepared(values: dict[str, Any]) -> rows.Prepared:
    checked, begun = rows.begin(config.check(config.SftSettings, values))
    alone = processes.Processes(rank=0, world=1, device=torch.device("cpu"))
    return rows.prepare(checked, begun, row_kind=row_kinds.ANSWER, processes=alone)[0]


def examples(values: dict[str, Any], *, held_out: bool = False) -> dict[int, Example]:
    """Tokenized rows by their place in the source."""
    found = prepared(values)
    table = found.held_out if held_out else found.train
    assert table is not None
    rows = [tokenized.example(table, index) for index in range(len(table))]
    return {example.row: example for example in rows}


def sequence_loss(model: Any, example: Example) -> torch.Tensor:
    """Cross entropy over the trained tokens of one sequence, summed; the labels as transformers takes them."""
    ids = torch.tensor([list(example.token_ids)])
    labels = torch.full_like(ids, -100)
    for start, end in example.targets:
        labels[:, start:end] = ids[:, start:end]
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum", ignore_index=-100)
