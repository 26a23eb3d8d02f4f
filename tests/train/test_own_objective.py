"""A new objective is one file: these two are added from outside the package, as docs/objective.md shows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from byeori.commands.train import train
from byeori.config import SftSettings, check
from byeori.data.row_kinds import PREFERENCE, RowKind
from byeori.data.template import Template
from byeori.data.tokenize import Encoding, Example, encode_row
from byeori.errors import CheckpointError
from byeori.losses.base import Objective, Sums, Targets
from runs import log, settings, sft

# ---- every answer counts the same, however long it is --------------------------------------------------------------


def even_sums(logprobs: torch.Tensor, targets: Targets) -> Sums:
    """Sum over the examples of their mean -log p; and how many answers have a mean under 5 nats."""
    counts = torch.zeros(targets.examples).index_add_(0, targets.owner, targets.weights)
    means = torch.zeros(targets.examples).index_add_(0, targets.owner, -logprobs * targets.weights) / counts
    return Sums(total=means.sum(), logged={"likely": (means.detach() < 5).sum().float()})


EVEN = Objective(sums=even_sums, weight=lambda counts: float(len(counts)), row_kind="answer", logged=("likely",))


def run(objective: Objective, kind: RowKind | None = None, **values: Any) -> Any:
    return train(check(SftSettings, values), objective=objective, row_kind=kind)


def test_an_objective_from_outside_trains_and_logs_its_column(
    tiny_model: Path, title_rows: Path, tmp_path: Path
) -> None:
    values = settings(tiny_model, title_rows, tmp_path / "out", num_epochs=6, warmup_steps=0, max_grad_norm=0)
    result = run(EVEN, **values, val_set_size=4)
    lines = log(tmp_path / "out")
    assert result.last_loss < result.first_loss - 0.5
    steps, evaluations = [line for line in lines if "loss" in line], [line for line in lines if "eval_loss" in line]
    assert all(0 <= line["likely"] <= 1 for line in steps) and all(
        0 <= line["eval_likely"] <= 1 for line in evaluations
    )
    assert yaml.safe_load((tmp_path / "out" / "byeori.yaml").read_text())["row_kind"] == "answer"


def test_its_first_loss_is_that_of_the_base(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    """An adapter begins as nothing: the first loss is the mean over answers of the base model's."""
    values = settings(tiny_model, title_rows, tmp_path / "out", max_steps=1)
    run(EVEN, **values)
    order = json.loads((tmp_path / "out" / "order.json").read_text())[:4]
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    means = [_mean_nll(model, example) for example in _examples(values, order)]
    assert log(tmp_path / "out")[0]["loss"] == pytest.approx(sum(means) / 4, rel=1e-5)


def _examples(values: dict[str, Any], rows: list[int]) -> list[Example]:
    from byeori.commands._rows import begin, prepare
    from byeori.data import row_kinds, tokenized
    from byeori.distributed.processes import Processes

    begun, start = begin(check(SftSettings, values))
    alone = Processes(rank=0, world=1, device=torch.device("cpu"))
    table = prepare(begun, start, row_kind=row_kinds.ANSWER, processes=alone)[0].train
    return [tokenized.example(table, row) for row in rows]


def _mean_nll(model: Any, example: Example) -> float:
    ids = torch.tensor([list(example.token_ids)])
    with torch.no_grad():
        logprobs = model(ids).logits[0].float().log_softmax(-1)
    places = [place for start, end in example.targets for place in range(start, end)]
    return -sum(float(logprobs[place - 1, ids[0, place]]) for place in places) / len(places)


# ---- rows of its own: three answers, best first ---------------------------------------------------------------------

PLACES = ("first", "second", "third")


def encode_ranked(row: Mapping[str, Any], encoding: Encoding) -> list[Example]:
    assert encoding.template is not None
    return [encode_row({**row, encoding.template.answer_column: row[place]}, encoding) for place in PLACES]


def check_ranked(columns: Any, chosen: Template | None) -> None:
    assert set(PLACES) <= set(columns)


RANKED = replace(
    PREFERENCE,
    name="ranked",
    sides=PLACES,
    answer_columns=PLACES,
    check_columns=check_ranked,
    encode=encode_ranked,
)


def ranked_sums(logprobs: torch.Tensor, targets: Targets) -> Sums:
    """Plackett-Luce: the log-odds of the order, from the sums of log-probs [rows, 3]."""
    sums = torch.zeros(targets.examples).index_add_(0, targets.owner, logprobs).view(-1, 3)
    chosen = sums[:, 0] - sums.logsumexp(1) + sums[:, 1] - sums[:, 1:].logsumexp(1)
    right = (sums[:, 0] > sums[:, 1]) & (sums[:, 1] > sums[:, 2])
    return Sums(total=-chosen.sum(), logged={"right_order": right.sum().float()})


RANKING = Objective(sums=ranked_sums, weight=lambda counts: len(counts) / 3, row_kind="ranked", logged=("right_order",))


def test_an_objective_brings_its_own_rows(tiny_model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [{"question": f"{n} 더하기 1은?", "first": f"{n + 1}", "second": f"{n}", "third": "몰라"} for n in range(8)]
    rows.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    output = tmp_path / "out"
    values = settings(tiny_model, rows, output, template="{question}\n{answer}", num_epochs=12, warmup_steps=0)
    result = run(RANKING, RANKED, **values)
    assert result.last_loss < result.first_loss and log(output)[-1]["right_order"] == 1
    assert yaml.safe_load((output / "byeori.yaml").read_text())["row_kind"] == "ranked"
    with pytest.raises(CheckpointError, match="was written with rows of the kind ranked, not answer"):
        sft(tiny_model, rows, output, template="{question}\n{first}", resume_from_checkpoint="latest")
