"""The same run on 1, 2 and 4 processes, with whole and with sharded weights, packed or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import byeori
import forks
from runs import environment, log, losses, settings
from tiny_models import sample_rows

MANY = Path(__file__).parents[1] / "helpers" / "many.py"
# 24 rows: 2 steps an epoch, the second of 8 rows
STEPS: dict[str, Any] = {"batch_size": 16, "num_epochs": 10, "learning_rate": 1e-3, "save_steps": 10}
PAIRS: dict[str, Any] = {"batch_size": 4, "num_epochs": 2, "learning_rate": 1e-3, "max_grad_norm": 0.5}


def group(processes: int, jobs: list[tuple[str, dict[str, Any]]], folder: Path) -> str:
    """Run jobs one after the other on a group of processes; returns their output."""
    plan = folder / "runs.json"
    plan.write_text(json.dumps(jobs), encoding="utf-8")
    done = forks.run(MANY, plan, processes, env=environment(), timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def apart(one: Path, other: Path) -> float:
    """Distance of two adapters, relative to their size."""
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert found.keys() == expected.keys()
    difference = sum(float((found[name] - expected[name]).square().sum()) for name in expected)
    return (difference / sum(float(tensor.square().sum()) for tensor in expected.values())) ** 0.5


@pytest.fixture(scope="module")
def pair_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = sample_rows("titles-ko-train.jsonl")[:13]
    lines = [
        {"prompt": row["document"][:60], "chosen": row["title"], "rejected": rows[i - 1]["title"]}
        for i, row in enumerate(rows)
    ]
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def job(tiny_model: Path, title_rows: Path, pair_rows: Path) -> Callable[..., tuple[str, dict[str, Any]]]:
    def make(output: Path, command: str = "sft", **changes: Any) -> tuple[str, dict[str, Any]]:
        rows, how = (title_rows, STEPS) if command == "sft" else (pair_rows, PAIRS)
        return command, settings(tiny_model, rows, output, **how | changes)

    return make


@pytest.fixture(scope="module")
def alone(job: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of one process, each in a folder of its name."""
    folder = tmp_path_factory.mktemp("alone")
    for name, changes in KINDS.items():
        command, values = job(folder / name, **changes)
        getattr(byeori, command)(**values)
    return folder


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "4bit": {"load_in_4bit": True},
    "8bit": {"load_in_8bit": True},
    "held-out": {"val_set_size": 5, "num_epochs": 4},
    "dpo": {"command": "dpo"},
}
SHARDED: dict[str, dict[str, Any]] = {
    **{f"{way}-{size}": {"parallel": way, "micro_batch_size": size} for way in ("ddp", "fsdp") for size in (1, 2, 4)},
    "tokens": {"parallel": "fsdp", "micro_batch_tokens": 300},
}


def same(found: Path, expected: Path) -> None:
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)
    assert apart(found, expected) < 1e-4


@pytest.mark.parametrize(
    ("processes", "names"),
    [
        (2, ["ddp-2", "fsdp-1", "tokens"]),
        (4, ["fsdp-4"]),
        pytest.param(2, list(SHARDED), marks=pytest.mark.slow),
        pytest.param(4, list(SHARDED), marks=pytest.mark.slow),
    ],
)
def test_the_run_does_not_depend_on_the_processes(
    processes: int, names: list[str], job: Callable[..., Any], alone: Path, tmp_path: Path
) -> None:
    group(processes, [job(tmp_path / name, **SHARDED[name]) for name in names], tmp_path)
    for name in names:
        assert len(losses(tmp_path / name)) == 20
        same(tmp_path / name, alone / "plain")


def test_packed_evaluated_and_preferred_with_shards(job: Callable[..., Any], alone: Path, tmp_path: Path) -> None:
    jobs = [job(tmp_path / name, parallel="fsdp", **KINDS[name]) for name in KINDS if name != "plain"]
    jobs.append(job(tmp_path / "recomputed", parallel="fsdp", gradient_checkpointing=True))
    told = group(2, jobs, tmp_path)
    assert "2 processes, frozen weights sharded over 2 of them" in told
    for name in KINDS:
        if name != "plain":
            same(tmp_path / name, alone / name)
    same(tmp_path / "recomputed", alone / "plain")
    for name in ("held-out", "dpo"):
        for mine, theirs in zip(log(tmp_path / name), log(alone / name), strict=True):
            for key in {"eval_loss", "margin", "kl", "tokens", "target_tokens"} & set(
                theirs
            ):  # accuracy: signs of zero
                assert mine[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), (name, key)


def test_resumed_on_another_number_of_processes(job: Callable[..., Any], alone: Path, tmp_path: Path) -> None:
    """Half of the run on two processes with shards, then one alone; and the other way round."""
    halves = job(tmp_path / "two-one", parallel="fsdp", max_steps=10, lr_scheduler="constant")
    group(2, [halves], tmp_path)
    whole, rest = (job(tmp_path / name, lr_scheduler="constant")[1] for name in ("whole", "two-one"))
    byeori.sft(**whole)
    byeori.sft(**rest | {"resume_from_checkpoint": "latest"})
    same(tmp_path / "two-one", tmp_path / "whole")
    checkpoint = str(tmp_path / "whole" / "checkpoint-10")
    again = job(tmp_path / "one-two", parallel="fsdp", lr_scheduler="constant", resume_from_checkpoint=checkpoint)
    group(2, [again], tmp_path)
    assert losses(tmp_path / "one-two") == pytest.approx(losses(tmp_path / "whole")[10:], rel=1e-5)
    assert apart(tmp_path / "one-two", tmp_path / "whole") < 1e-4


def test_four_bit_is_not_the_plain_run(alone: Path) -> None:
    assert losses(alone / "4bit")[0] != pytest.approx(losses(alone / "plain")[0], rel=1e-5)
    assert losses(alone / "4bit") == pytest.approx(losses(alone / "plain"), rel=0.05)
    tensors = load_file(alone / "4bit" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_a_four_bit_run_is_merged_exactly_into_the_weights_as_they_are(
    alone: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """merged = W + (alpha / r) B A, with the W of the files and not the rounded one; the report names it."""
    byeori.merge(peft_model_path=alone / "4bit", output_dir=tmp_path / "merged")
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text(encoding="utf-8"))
    assert (report["base"], report["verdict"]) == (str(tiny_model), "equal")
    assert report["trained_over"] == f"{tiny_model}, held in 4 bit"
    adapter, base = load_file(alone / "4bit" / "adapter_model.safetensors"), load_file(tiny_model / "model.safetensors")
    for name, merged in load_file(tmp_path / "merged" / "model.safetensors").items():
        layer = "base_model.model." + name.removesuffix(".weight")
        expected = base[name].double()
        if f"{layer}.lora_A.weight" in adapter:
            a, b = (adapter[f"{layer}.lora_{side}.weight"].double() for side in "AB")
            expected = expected + 8 / 4 * b @ a
        assert torch.allclose(merged, expected.float(), rtol=0, atol=1e-6), name  # rounded, they are 0.01 apart


def test_an_adapter_is_trained_further_over_shards_and_four_bit(
    job: Callable[..., Any], alone: Path, tmp_path: Path
) -> None:
    how = {"base_model": str(alone / "plain"), "max_steps": 4, "lora_r": 4}
    _, values = job(tmp_path / "one", load_in_4bit=True, **how)
    byeori.sft(**values)
    group(2, [job(tmp_path / "two", load_in_4bit=True, parallel="fsdp", **how)], tmp_path)
    same(tmp_path / "two", tmp_path / "one")
    assert losses(tmp_path / "one")[0] < losses(alone / "4bit")[0]
