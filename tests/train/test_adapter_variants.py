"""Runs with other adapters than plain LoRA: resumed to the bit, merged as PEFT does, trained further, planned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import byeori
from byeori import config
from byeori.commands import _planned, _rows
from byeori.data import row_kinds, tokenized
from byeori.distributed import processes
from byeori.errors import CheckpointError, ConfigError
from byeori.model import adapter
from byeori.train import state
from runs import log, losses, same, settings, sft, stop_after

KINDS: dict[str, dict[str, Any]] = {
    "pissa": {"lora_init": "pissa"},
    "olora": {"lora_init": "olora", "use_rslora": True, "lora_dropout": 0.1},
    "dora": {"use_dora": True, "rank_pattern": "q_proj=2 down_proj=6"},
    "mica": {"lora_init": "mica", "layers_to_transform": "1"},
    "eva": {"lora_init": "eva", "rank_pattern": "down_proj=6"},
    "loftq": {"lora_init": "loftq", "load_in_4bit": True, "use_rslora": True},
}
IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35]])


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_and_merged(
    kind: str, tiny_model: Path, title_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = KINDS[kind]
    whole = sft(tiny_model, title_rows, tmp_path / "whole", **how)
    assert whole.last_loss < whole.first_loss
    stop_after(7, monkeypatch)
    with pytest.raises(state.Interrupted):
        sft(tiny_model, title_rows, tmp_path / "cut", **how)
    monkeypatch.undo()
    sft(tiny_model, title_rows, tmp_path / "cut", **how, resume_from_checkpoint="latest")
    same(tmp_path / "whole", tmp_path / "cut", whole.steps)

    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "whole")
    expected = tuned(IDS).logits
    merged = byeori.merge(peft_model_path=tmp_path / "whole", output_dir=tmp_path / "merged", dtype="float32")
    assert merged.verdict == "equal"
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(found(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert (expected - AutoModelForCausalLM.from_pretrained(tiny_model)(IDS).logits).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["pissa", "dora"])
def test_trained_further(kind: str, tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    """The first loss is that of the finished adapter; a DPO run begins at a margin of zero."""
    sft(tiny_model, title_rows, tmp_path / "one", **KINDS[kind], val_set_size=4, num_epochs=1)
    last = [line["eval_loss"] for line in log(tmp_path / "one") if "eval_loss" in line][-1]
    again = settings(tmp_path / "one", title_rows, tmp_path / "two", val_set_size=4, max_steps=1, learning_rate=1e-12)
    del again["lora_r"], again["lora_alpha"]
    byeori.sft(**again)
    first = next(line["eval_loss"] for line in log(tmp_path / "two") if "eval_loss" in line)
    assert first == pytest.approx(last, rel=1e-5)
    one, two = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("one", "two"))
    assert [one[name] for name in ("r", "lora_alpha", "use_dora", "rank_pattern")] == [
        two[name] for name in ("r", "lora_alpha", "use_dora", "rank_pattern")
    ]


def test_dpo_refers_to_the_untouched_base(tiny_model: Path, tmp_path: Path) -> None:
    """PiSSA's adapter, switched off, leaves the base: the first step's margin is zero, its loss ln 2."""
    rows = tmp_path / "pairs.jsonl"
    pair = {"prompt": "제목을 지어라", "chosen": "봄이 왔다", "rejected": "비가 왔다"}
    rows.write_text("".join(json.dumps(pair | {"prompt": f"{n} 제목"}) + "\n" for n in range(8)), encoding="utf-8")
    how = settings(tiny_model, rows, tmp_path / "dpo", lora_init="pissa", max_steps=2, warmup_steps=0)
    byeori.dpo(**how)
    assert losses(tmp_path / "dpo")[0] == pytest.approx(0.693147, abs=1e-5)


def test_a_checkpoint_of_another_start(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    sft(tiny_model, title_rows, tmp_path / "run", lora_init="pissa", max_steps=1, num_epochs=1)
    assert load_file(tmp_path / "run" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="was written with --lora_init pissa, not default; go on with the same"):
        sft(tiny_model, title_rows, tmp_path / "run", lora_r=8, max_steps=2, resume_from_checkpoint="latest")
    with pytest.raises(ConfigError, match=r"--use_dora True is not that of the adapter .* leave it out"):
        sft(tmp_path / "run", title_rows, tmp_path / "two", lora_r=8, lora_alpha=16, use_dora=True)


def test_what_the_plan_reads(tiny_model: Path) -> None:
    values = {"base_model": str(tiny_model), "data_path": "d", "output_dir": "o"}
    given = {
        "rank_pattern": "q_proj=2",
        "alpha_pattern": ["v_proj=3.5"],
        "layers_to_transform": "0-1",
        "lora_init": "OLoRA",
    }
    run = _planned.planned_run(config.check(config.SftSettings, values | given))
    assert run.adapter.variant.rank_pattern == (("q_proj", 2),)
    assert run.adapter.variant.alpha_pattern == (("v_proj", 3.5),)
    assert run.adapter.variant.layers_to_transform == (0, 1)
    assert run.adapter.variant.init == "olora"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"lora_init": "pisa"}, "did you mean pissa"),
        ({"lora_bias": True, "use_dora": True}, "lora_bias and use_dora are both set"),
        ({"lora_init": "orthogonal", "lora_r": 3}, "lora_init orthogonal needs even ranks, not 3"),
        ({"rank_pattern": "q_proj"}, "give NAME=NUMBER, such as q_proj=32"),
        ({"layers_to_transform": "x"}, "layers_to_transform"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(given: dict[str, Any], sentence: str) -> None:
    values = {"base_model": "m", "data_path": "d", "output_dir": "o"}
    with pytest.raises(ConfigError, match=sentence):
        config.check(config.SftSettings, values | given)


def test_rates_are_those_of_pefts_lora_plus(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    """Three steps of a run against the same steps by PEFT's create_loraplus_optimizer on the run's own batches."""
    how = {"loraplus_lr_ratio": 8, "max_steps": 3, "weight_decay": 0.0, "warmup_steps": 0, "lr_scheduler": "constant"}
    how |= {"max_grad_norm": 0, "max_rows": 4, "batch_size": 4, "num_epochs": 3, "add_eos_token": True}
    sft(tiny_model, title_rows, tmp_path / "run", **how)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = adapter.attach(base, r=4, alpha=8, dropout=0.0, targets=["all-linear"], seed=42)
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=8)
    examples = prepared(settings(tiny_model, title_rows, tmp_path / "x", **how))
    found = []
    for _ in range(3):
        total = torch.zeros(())
        for ids, start in examples:
            logp = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            total = total - sum(logp[at - 1, ids[at]] for at in range(start, len(ids)))
        loss = total / sum(len(ids) - start for ids, start in examples)
        found.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses(tmp_path / "run") == pytest.approx(found, rel=1e-5)
    plain = sft(tiny_model, title_rows, tmp_path / "plain", **how | {"loraplus_lr_ratio": 1})
    assert abs(plain.last_loss - found[-1]) > 1e-3


def prepared(values: dict[str, Any]) -> list[tuple[list[int], int]]:
    """The rows of a run: (token ids, where the answer begins)."""
    given, start = _rows.begin(config.check(config.SftSettings, values))
    alone = processes.Processes(rank=0, world=1, device=torch.device("cpu"))
    rows, _ = _rows.prepare(given, start, row_kind=row_kinds.ANSWER, processes=alone)
    table = tokenized.Rows(table=rows.train)
    return [(list(unit.token_ids), unit.targets[0][0]) for at in range(len(table)) for unit in table.unit(at)]


def test_a_rate_for_the_embedding(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    """Rows that are trained at a rate of next to nothing stay; the head of the same run at the usual rate does not."""
    how = {"trainable_token_indices": "5 9 77", "max_steps": 3, "warmup_steps": 0}
    sft(tiny_model, title_rows, tmp_path / "low", **how, embedding_learning_rate=1e-12)
    sft(tiny_model, title_rows, tmp_path / "same", **how)
    before = AutoModelForCausalLM.from_pretrained(tiny_model).get_input_embeddings().weight[[5, 9, 77]]
    moved = []
    for name in ("low", "same"):
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        rows = next(value for key, value in tensors.items() if "embed_tokens" in key)
        moved.append(float((rows - before).abs().max()))
    assert moved[0] < 1e-9 < 1e-3 < moved[1]
